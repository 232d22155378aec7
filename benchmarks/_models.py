"""What the benchmarks of whole models share: the two calls that are timed, the check before them, the columns."""

from __future__ import annotations

import argparse
import copy
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

from mvkernels import report
from mvkernels.bench import timing

Model = Callable[[Tensor], Any]
SHOWN = ("model", "size", "batch", "mode", "provider", "median_us", "min_us", "speedup_median", "speedup_min")
SAME = ("model", "size", "batch", "dtype", "layout", "mode")
"""The columns that say which rows of a file a new measurement takes the place of."""


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, such that the run can begin."""
    options = parser.parse_args()
    sizes = options.size if isinstance(options.size, list) else [options.size]
    for name, values in (("batch", options.batch), ("threads", [options.threads]), ("size", sizes)):
        if any(value is not None and value < 1 for value in values):
            parser.error(f"--{name} is less than 1")
    try:
        report.check_device(options.device)
    except report.UsageError as error:
        parser.error(str(error))
    return options


def tensors(out: Any) -> list[Tensor]:
    """The outputs of a model: a tensor, transformers' logits, or a list of maps."""
    out = getattr(out, "logits", out)
    return [out] if isinstance(out, Tensor) else [*out]


def forward(model: Model, image: Tensor) -> Callable[[], Any]:
    """Inference."""

    def call() -> Any:
        with torch.no_grad():
            return model(image)

    return call


def full(model: nn.Module | Compiled, image: Tensor) -> Callable[[], Any]:
    """A step of training but for the optimizer's, which is the same for everyone."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def call() -> Any:
        loss = sum(out.square().mean() for out in tensors(model(image)))
        return torch.autograd.grad(loss, parameters, allow_unused=True)  # type: ignore[arg-type]

    return call


class Compiled:
    """A model under torch.compile, alone as a user has it: what Dynamo compiles it keeps with the code object, and asks
    all of it in every call, so that models of one class slow each other down.

    ``frozen_for``: a picture for which it is compiled now, its weights made constants of the compiled code.
    """

    def __init__(self, model: nn.Module, frozen_for: Tensor | None = None) -> None:
        def call(x: Tensor) -> Any:
            return model(x)

        own = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
        self.parameters = model.parameters
        self._compiled = torch.compile(own)
        if frozen_for is not None:
            # Not by options={"freezing": True}: it comes too late, and nothing is frozen (torch 2.13).
            with torch._inductor.config.patch(freezing=True), torch.no_grad():
                self._compiled(frozen_for)

    def __call__(self, x: Tensor) -> Any:
        return self._compiled(x)


def in_mode(mode: str, models: Mapping[str, nn.Module], compiled: bool) -> dict[str, Any]:
    """Copies of the models as the mode wants them, and each under torch.compile."""
    copies = {who: copy.deepcopy(model).train(mode == "full") for who, model in models.items()}
    if not compiled:
        return copies
    torch._dynamo.reset()
    return copies | {f"{who}, compiled": Compiled(copy.deepcopy(model)) for who, model in copies.items()}


def calls(mode: str, models: Mapping[str, Any], image: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed: inference, each answer checked against the first one's, or a step of training.

    Nothing, said on stderr, where the model cannot train on so few pictures: a batch norm needs two values.
    """
    if mode == "fwd":
        check(models, image)
        return {who: forward(model, image) for who, model in models.items()}
    steps = {who: full(model, image) for who, model in models.items()}
    try:
        next(iter(steps.values()))()
    except ValueError as error:
        print(f"training step left out: {error}", file=sys.stderr)
        return {}
    return steps


def check(models: Mapping[str, Model], image: Tensor) -> None:
    """No time for a model that computes something else than the first, beyond what depth makes of rounding."""
    allowed = 1e-2 if image.dtype == torch.float32 else 1.0
    with torch.no_grad():
        expected = tensors(next(iter(models.values()))(image))
        for name, model in models.items():
            for out, wanted in zip(tensors(model(image)), expected, strict=True):
                error = float((out - wanted).abs().max() / wanted.abs().max())
                if not error < allowed:
                    raise SystemExit(f"{name}: its answer differs by {error:.1e} of the largest")


def rows(
    calls: Mapping[str, Callable[[], Any]],
    columns: Mapping[str, Any],
    device: str,
    rounds: int | None,
    seconds: float = 2.0,
) -> Iterator[dict[str, Any]]:
    """A row for each call, all timed in turn in one process; the first is what the others are compared with."""
    if not calls:
        return
    times = timing.interleave(calls, device, rounds, min_time=seconds)
    first = next(iter(times.values()))
    for who, t in times.items():
        yield {
            **report.machine(device),
            **columns,
            "provider": who,
            **time_columns(t, first),
            "peak_bytes": timing.peak_bytes(calls[who], device),
            **wall_columns(calls[who], device, columns["batch"]),
        }


def wall_columns(call: Callable[[], Any], device: str, batch: int) -> dict[str, Any]:
    """On a GPU: time per call of a caller who makes one after another, and pictures a second; nothing on a CPU."""
    wall = timing.wall(call, device, seconds=0.5)
    return {} if wall is None else {"wall_us": round(wall * 1e6, 1), "images_s": round(batch / wall, 1)}


def time_columns(t: timing.Times, first: timing.Times) -> dict[str, Any]:
    """The samples of a call, and how many times as fast as the first one's they are."""
    return {
        "median_us": round(t.median * 1e6, 1),
        "min_us": round(t.min * 1e6, 1),
        "p20_us": round(t.quantile(0.2) * 1e6, 1),
        "p80_us": round(t.quantile(0.8) * 1e6, 1),
        "rounds": len(t.samples),
        "speedup_median": round(first.median / t.median, 3),
        "speedup_min": round(first.min / t.min, 3),
    }


def show(found: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    lines = [(*(row[key] for key in SHOWN), report.megabytes(row["peak_bytes"])) for row in found]
    print(report.table(lines, (*SHOWN, "peak_MB")))
