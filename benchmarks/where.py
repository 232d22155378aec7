"""Where the time of a whole model goes, original and swapped, eager, with frozen weights and on packed ones:
convolutions, matrix products, this library's ops for inference, its attention, the rest; beside what their FLOPs take
at the rate of a matrix product measured in the same run.

The file keeps the rows of models that are not measured this time.
"""

from __future__ import annotations

import argparse
import collections
import copy
import sys
from typing import Any

import torch
from _models import Compiled, Model, forward
from _results import folder, keep_pages, merge, show
from swapped import MODELS, built
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mvkernels import report, third_party
from mvkernels.bench import timing
from mvkernels.commands import command
from mvkernels.swap import swap

DEFAULT = ["timm:mobilevit_s", "timm:efficientvit_b1", "timm:efficientformer_l1", "timm:poolformer_s12"]
DEFAULT += ["mvmodels:mobile_former_294m", "timm:coatnet_0_224", "timm:swin_tiny_patch4_window7_224"]
SAME = ("model", "size", "batch", "layout")
PACKED = ("inverted_residual", "conv3x3", "pointwise")
PARTS = ("convolutions", "matrix products", *PACKED, "other fused ops", "the rest")


def part_of(name: str) -> str:
    """The part that a kernel of the profile, or an operator whose FLOPs were counted, belongs to."""
    if name.startswith("mvkernels"):
        return next((op for op in PACKED if name.endswith(f"::{op}")), "other fused ops")
    if "conv" in name:
        return "convolutions"
    products = ("mm", "_linear", "::linear", "attention", "matmul")  # and not bilinear
    return "matrix products" if any(product in name for product in products) else "the rest"


def flops(model: nn.Module, image: Tensor) -> collections.Counter[str]:
    """FLOPs of the original by part, as PyTorch counts them: a multiply-add is two."""
    found: collections.Counter[str] = collections.Counter()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    for operator, count in counter.get_flop_counts()["Global"].items():
        found[part_of(str(operator))] += count
    return found


def microseconds(model: Model, image: Tensor, runs: int) -> collections.Counter[str]:
    """Time inside kernels by part and run, under the profiler, which adds a microsecond or two to each."""
    call = forward(model, image)
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(runs):
            call()
    found: collections.Counter[str] = collections.Counter()
    for event in recorded.key_averages():
        found[part_of(event.key)] += event.self_cpu_time_total / runs
    return found


def rows_of(name: str, layout: torch.memory_format, options: argparse.Namespace) -> list[dict[str, Any]]:
    size = MODELS[name]
    original = built(name).to(memory_format=layout)
    swapped = copy.deepcopy(original)
    swap(swapped)
    image = third_party.picture(None, size, options.batch)[0].contiguous(memory_format=layout)
    models: dict[str, Model] = {"original": original, "swapped": swapped}
    torch._dynamo.reset()
    inference = copy.deepcopy(original)
    swap(inference, inference=True)
    models |= {f"{who}, freezing": Compiled(copy.deepcopy(model), image) for who, model in models.items()}
    models["swapped, inference"] = inference
    counted, rates = flops(original, image), timing.measure_rates()
    times = timing.interleave({who: forward(model, image) for who, model in models.items()}, min_time=options.seconds)
    rows = []
    for who, model in models.items():
        spent = microseconds(model, image, options.runs)
        columns = {
            **report.machine(),
            "model": name,
            "size": size,
            "batch": options.batch,
            "layout": report.short(layout).removesuffix("_format"),
            "provider": who,
            "median_us": round(times[who].median * 1e6, 1),
            "min_us": round(times[who].min * 1e6, 1),
            "matmul_gflop_s": round(rates.matmul / 1e9, 1),
        }
        for part in PARTS:
            floor = counted[part] / rates.matmul * 1e6
            found = {"part": part, "kernels_us": round(spent[part], 1), "flops": counted[part]}
            rows.append({**columns, **found, "floor_us": round(floor, 1)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=DEFAULT)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layout", nargs="+", default=["contiguous"], choices=("contiguous", "channels_last"))
    parser.add_argument("--runs", type=int, default=10, help="under the profiler")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each, without the profiler")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    unknown = [name for name in options.model if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]}, want some of {', '.join(MODELS)}")
    keep_pages()
    torch.set_num_threads(1)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for name in options.model:
        for layout in options.layout:
            rows = rows_of(name, formats[layout], options)
            shown = ("model", "layout", "provider", "median_us", "part", "kernels_us", "floor_us")
            show(rows, shown)
            if not options.no_file:
                merge(rows, folder() / "where.csv", SAME)
    return 0


if __name__ == "__main__":
    sys.exit(command.run("where", main))
