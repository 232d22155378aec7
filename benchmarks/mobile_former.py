"""Whole Mobile-Former models: the fused bridges against the reference, plain and under torch.compile."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from _results import folder, keep_pages, write
from torch import Tensor, nn

import mvkernels
import mvmodels
from mvkernels import report, third_party, timing


def on(backend: str, model: nn.Module) -> nn.Module:
    """A copy of the model whose bridges run on the backend, with the same weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (mvkernels.nn.MobileToFormer, mvkernels.nn.FormerToMobile)):
            module.backend = backend
    return model


def forward(model: nn.Module, image: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return model(image)

    return call


def full(model: nn.Module, image: Tensor) -> Callable[[], Any]:
    parameters = list(model.parameters())

    def call() -> Any:
        return torch.autograd.grad(model(image).square().mean(), parameters)

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["mobile_former_26m", "mobile_former_96m", "mobile_former_294m"])
    parser.add_argument("--backend", default="auto", help="of the fused bridges")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", nargs="+", type=int, default=[224])
    parser.add_argument("--mode", nargs="+", default=["fwd"], choices=("fwd", "full"))
    parser.add_argument("--channels-last", action="store_true", help="model and picture in channels-last memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    keep_pages()
    torch.set_num_threads(options.threads)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    rows = []
    for name in options.model:
        model = mvmodels.create_model(name)
        third_party.randomise(model)
        model.eval().to(options.device, memory_format=layout)
        models = {"reference": on("reference", model), "fused": on(options.backend, model)}
        if not options.no_compile:
            torch._dynamo.reset()  # all models are one class, and its code is compiled only so often
            models["reference, compiled"] = torch.compile(on("reference", model))
            models["fused, compiled"] = torch.compile(on(options.backend, model))
        for size in options.size:
            for batch in options.batch:
                image = third_party.picture(None, size, batch)[0].to(options.device, memory_format=layout)
                check(models, image)
                for mode in options.mode:
                    work = {who: (forward if mode == "fwd" else full)(m, image) for who, m in models.items()}
                    times = timing.interleave(work, options.device, options.rounds, min_time=2.0)
                    for who, t in times.items():
                        rows.append(
                            {
                                **report.machine(options.device),
                                "model": name,
                                "size": size,
                                "batch": batch,
                                "layout": report.short(layout).removesuffix("_format"),
                                "mode": mode,
                                "provider": who,
                                "median_us": round(t.median * 1e6, 1),
                                "min_us": round(t.min * 1e6, 1),
                                "p20_us": round(t.quantile(0.2) * 1e6, 1),
                                "p80_us": round(t.quantile(0.8) * 1e6, 1),
                                "rounds": len(t.samples),
                                "speedup_median": round(times["reference"].median / t.median, 3),
                                "speedup_min": round(times["reference"].min / t.min, 3),
                                "peak_bytes": timing.peak_bytes(work[who], options.device),
                            }
                        )
    shown = ("model", "size", "batch", "mode", "provider", "median_us", "min_us", "speedup_median", "speedup_min")
    lines = [(*(row[key] for key in shown), report.megabytes(row["peak_bytes"])) for row in rows]
    print(report.table(lines, (*shown, "peak_MB")))
    if not options.no_file:
        write(rows, folder(options.device) / "mobile_former.csv")
    return 0


def check(models: dict[str, nn.Module], image: Tensor) -> None:
    """No time for a model that computes something else: logits within what a deep float32 network's rounding makes."""
    with torch.no_grad():
        expected = models["reference"](image)
        for name, model in models.items():
            error = float((model(image) - expected).abs().max() / expected.abs().max())
            if not error < 1e-2:
                raise SystemExit(f"{name}: logits differ from the reference by {error:.1e} of the largest")


if __name__ == "__main__":
    sys.exit(main())
