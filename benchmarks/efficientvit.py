"""Whole models with ReLU linear attention (timm's EfficientViT, a DC-AE encoder): original against swapped, plain and
under torch.compile."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from _results import folder, keep_pages, write
from torch import Tensor, nn

from mvkernels import report, third_party, timing
from mvkernels.swap import swap


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
    parser.add_argument(
        "--model",
        nargs="+",
        default=["timm:efficientvit_b1", "diffusers:dc-ae-f32c32-sana-1.0"],
        help="as for `mvkernels swap`; of an autoencoder the encoder",
    )
    parser.add_argument("--backend", help="of the swapped modules")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--size", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--mode", nargs="+", default=["fwd"], choices=("fwd", "full"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true", help="model and picture in channels-last memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    keep_pages()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    rows = []
    for name in options.model:
        whole = third_party.build(name)
        original = getattr(whole, "encoder", whole).to(options.device, dtype, memory_format=layout)
        del whole  # and with it a decoder
        swapped = copy.deepcopy(original)
        count = swap(swapped, backend=options.backend).count
        for size in options.size:
            for batch in options.batch:
                image = third_party.picture(None, size, batch)[0].to(options.device, dtype, memory_format=layout)
                models: dict[str, Any] = {"original": original, "swapped": swapped}
                if not options.no_compile:
                    torch._dynamo.reset()  # each size compiled for itself, as a model with one size of input is
                    models["original, compiled"] = torch.compile(original)
                    models["swapped, compiled"] = torch.compile(swapped)
                check(models, image)
                for mode in options.mode:
                    work = {who: (forward if mode == "fwd" else full)(m, image) for who, m in models.items()}
                    times = timing.interleave(work, options.device, options.rounds, min_time=2.0)
                    for who, t in times.items():
                        rows.append(
                            {
                                **report.machine(options.device),
                                "model": name,
                                "swapped_blocks": count,
                                "size": size,
                                "batch": batch,
                                "dtype": options.dtype,
                                "layout": report.short(layout).removesuffix("_format"),
                                "mode": mode,
                                "provider": who,
                                "median_us": round(t.median * 1e6, 1),
                                "min_us": round(t.min * 1e6, 1),
                                "p20_us": round(t.quantile(0.2) * 1e6, 1),
                                "p80_us": round(t.quantile(0.8) * 1e6, 1),
                                "rounds": len(t.samples),
                                "speedup_median": round(times["original"].median / t.median, 3),
                                "speedup_min": round(times["original"].min / t.min, 3),
                                "peak_bytes": timing.peak_bytes(work[who], options.device),
                            }
                        )
    shown = ("model", "size", "batch", "mode", "provider", "median_us", "min_us", "speedup_median", "speedup_min")
    lines = [(*(row[key] for key in shown), report.megabytes(row["peak_bytes"])) for row in rows]
    print(report.table(lines, (*shown, "peak_MB")))
    if not options.no_file:
        write(rows, folder(options.device) / "efficientvit.csv")
    return 0


def check(models: dict[str, Any], image: Tensor) -> None:
    """No time for a model that computes something else: what a deep network makes of rounding is all that differs."""
    allowed = 1e-2 if image.dtype == torch.float32 else 1.0
    with torch.no_grad():
        expected = models["original"](image)
        for name, model in models.items():
            error = float((model(image) - expected).abs().max() / expected.abs().max())
            if not error < allowed:
                raise SystemExit(f"{name}: its answer differs from the original's by {error:.1e} of the largest")


if __name__ == "__main__":
    sys.exit(main())
