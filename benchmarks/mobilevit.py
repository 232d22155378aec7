"""Whole MobileViT models, original against swapped: forward, and forward with backward."""

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
            return model(image).logits

    return call


def full(model: nn.Module, image: Tensor) -> Callable[[], Any]:
    parameters = list(model.parameters())

    def call() -> Any:
        return torch.autograd.grad(model(image).logits.square().mean(), parameters)

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", nargs="+", type=int, default=[256])
    parser.add_argument("--mode", nargs="+", default=["fwd", "full"], choices=("fwd", "full"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--compile", action="store_true", help="also the original under torch.compile (minutes)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    keep_pages()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.model:
        model = third_party.build(f"transformers:{name}").to(options.device)
        swapped = copy.deepcopy(model)
        count = swap(swapped).count
        models = {"original": model, "swapped": swapped}
        if options.compile:
            models["original, compiled"] = torch.compile(copy.deepcopy(model))
        for size in options.size:
            for batch in options.batch:
                image = third_party.picture(None, size, batch)[0].to(options.device)
                for mode in options.mode:
                    work = {who: (forward if mode == "fwd" else full)(m, image) for who, m in models.items()}
                    times = timing.interleave(work, options.device, options.rounds, min_time=2.0)
                    for who, t in times.items():
                        rows.append(
                            {
                                **report.machine(options.device),
                                "model": f"transformers:{name}",
                                "swapped_blocks": count,
                                "size": size,
                                "batch": batch,
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
        write(rows, folder(options.device) / "mobilevit.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
