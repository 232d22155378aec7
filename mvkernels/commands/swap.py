"""``mvkernels swap``: swap a model, print the report, verify the result, and time it against the original."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mvkernels import report, third_party
from mvkernels.bench import timing
from mvkernels.swap import swap, verify_swap


def command(options: argparse.Namespace, json: Callable[[Any], None] | None) -> int:
    """Returns 1 if the swapped model and the original differ by more than rounding, else 0."""
    report.check_device(options.device)
    torch.set_num_threads(options.threads)
    model = third_party.build(options.model, options.pretrained).to(options.device)
    size = options.size or third_party.input_size(options.model, model)
    image, source = third_party.picture(options.image, size, options.batch)
    if options.model.startswith("transformers:mobilevit"):
        image = image.flip(1)  # these checkpoints were trained on BGR
    image = image.to(options.device)
    third_party.check_size(options.model, model, image)
    backend = None if options.backend == "auto" else options.backend
    swapped = copy.deepcopy(model)
    found = swap(swapped, backend=backend)
    contenders: dict[str, Callable[[Tensor], Any]] = {"original": model, "swapped": swapped}
    if options.inference:
        swapped = copy.deepcopy(model)
        found = swap(swapped, backend=backend, inference=True)
        contenders["swapped, inference"] = swapped
    verified = verify_swap(swapped, image)  # where weights are packed it compares the calls without them too
    if options.compile:
        contenders["original, compiled"] = torch.compile(model)
    times = time_models(contenders, image, options.rounds)

    parameters = sum(p.numel() for p in model.parameters())
    if json is not None:
        json(
            {
                "machine": report.machine(options.device),
                "model": options.model,
                "parameters": parameters,
                "input": list(image.shape),
                "image": source,
                "entries": [asdict(entry) for entry in found.entries],
                "swapped": found.count,
                "packed_bytes": found.packed_bytes,
                "verified": verified.ok,
                "verification": str(verified),
                "times": {
                    name: {"median_us": t.median * 1e6, "min_us": t.min * 1e6, "rounds": len(t.samples)}
                    for name, t in times.items()
                },
            }
        )
    else:
        weights = "pretrained" if options.pretrained else "random weights"
        print(f"{options.model}, {parameters:,} parameters, {weights}; input {tuple(image.shape)}: {source}\n")
        print(found, verified, times_table(times), sep="\n\n")
    if not verified.ok:
        print("mvkernels swap: the swapped model differs from the original", file=sys.stderr)
    return 0 if verified.ok else 1


def time_models(
    models: Mapping[str, Callable[[Tensor], Any]], image: Tensor, rounds: int | None = None
) -> dict[str, timing.Times]:
    """Forward times of several models on one input, measured in turns, without gradients."""

    def forward(model: Callable[[Tensor], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return model(image)

        return call

    calls = {name: forward(model) for name, model in models.items()}
    return timing.interleave(calls, image.device, rounds, min_time=1.0)


def times_table(times: dict[str, timing.Times], first: str = "original") -> str:
    """A table of the times in milliseconds, with the speed-up over ``first``."""
    base = times[first]
    rows = [
        (
            name,
            f"{t.median * 1e3:.2f}",
            f"{t.min * 1e3:.2f}",
            f"{t.quantile(0.2) * 1e3:.2f}..{t.quantile(0.8) * 1e3:.2f}",
            f"{base.median / t.median:.2f}x",
            f"{base.min / t.min:.2f}x",
        )
        for name, t in times.items()
    ]
    return report.table(rows, ("forward", "median ms", "min ms", "p20..p80", "x median", "x min"))
