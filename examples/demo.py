"""Swap a real MobileViT-S of transformers, run a photograph through it, verify, and time.

It is timed beside the original as it is, under torch.compile and in ONNX Runtime, as far as these are there. Ends with
a table and a picture of the timings in ./demo-output. Exits with 1 if the swapped model or a kernel computes anything
else than the original.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mvkernels
from mvkernels import bench, export, report, third_party
from mvkernels.bench import plots as bench_plots
from mvkernels.bench import timing
from mvkernels.commands import bench as bench_report
from mvkernels.commands import command
from mvkernels.commands import swap as swap_command
from mvkernels.swap import swap, verify_swap

Model = Callable[[Tensor], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo-output", help="folder for the picture and the figures")
    parser.add_argument("--image", help="a picture of your own")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pretrained", action="store_true", help="download the published weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-others", action="store_true", help="leave out torch.compile and ONNX Runtime")
    parser.add_argument("--min-time", type=float, default=0.3, help="seconds for each timed op")
    options = parser.parse_args()
    report.restart_keeping_pages(sys.argv)  # else page faults are timed
    torch.set_num_threads(options.threads)
    return run(options)


def run(options: argparse.Namespace) -> int:
    where = report.machine()
    print(
        f"mvkernels {mvkernels.__version__} on {where['device']} ({where['capability']}), {where['threads']} thread(s)"
    )

    # The model as its package has it, a copy in which the attention is swapped, and one for inference only.
    model = third_party.build("transformers:mobilevit_s", options.pretrained)
    image, source = third_party.picture(options.image, options.size)
    image = image.flip(1)  # MobileViT's checkpoints were trained on BGR
    swapped = copy.deepcopy(model)
    found = swap(swapped)
    packed = copy.deepcopy(model)
    swap(packed, inference=True)
    weights = "pretrained" if options.pretrained else "random weights"
    print(f"\n1. Swap: transformers MobileViT-S, {weights}\n\n{found}")

    print(f"\n2. Run: {source}, {options.size} x {options.size}\n")
    with torch.no_grad():
        outputs = {
            name: m(image).logits for name, m in (("original", model), ("swapped", swapped), ("inference", packed))
        }
    labels = model.config.id2label
    for name, logits in outputs.items():
        best = int(logits.argmax())
        print(f"{name:9} top class {labels[best] if options.pretrained else best}, logit {float(logits.max()):.6f}")
    differences = [float((logits - outputs["original"]).abs().max()) for logits in outputs.values()]
    print(f"largest difference of a logit: {max(differences):.1e}")

    verified = verify_swap(packed, image)  # with gradients it does what the one without packed weights does
    print(f"\n3. Verify: outputs and gradients, against the original in float64\n\n{verified}")

    print("\n4. Time: the whole model, and attention alone at its three stages\n")
    contenders: dict[str, Model] = {"original": model}
    if not options.no_others:
        contenders |= others(model, image, options.threads)
    contenders |= {"swapped": swapped, "swapped, inference": packed}
    models = swap_command.time_models(contenders, image)
    print(swap_command.times_table(models), end="\n\n")
    result = bench.measure(
        bench.Options(
            ops=("patch_attention",),
            labels=("mobilevit_s@256",),
            modes=("fwd", "full"),
            against=("eager", "sdpa"),
            threads=options.threads,
            min_time=options.min_time,
        )
    )
    print(bench_report.text(result))

    folder = Path(options.output)
    bench.write_csv(result.rows, folder / "patch_attention.csv")
    print(f"\nFigures: {folder / 'patch_attention.csv'}")
    try:
        draw(models, result.rows, folder / "timings.png")
        print(f"Picture: {folder / 'timings.png'}")
    except report.UsageError as error:
        print(f"No picture: {error}")
    good = verified.ok and not result.wrong
    print("\nAll verified." if good else "\nVERIFICATION FAILED.")
    return 0 if good else 1


def others(model: nn.Module, image: Tensor, threads: int) -> dict[str, Model]:
    """The original by what else there is on this machine; a line is printed for what is not."""
    found: dict[str, Model] = {}
    for name, make in (("compiled", compiled), ("ONNX Runtime", in_onnx_runtime)):
        try:
            found[f"original, {name}"] = make(model, image, threads)
        except Exception as error:  # no compiler, no package, an operator that a version does not know
            print(f"Without {name}: {command.one_line(error).partition('. ')[0]}\n")
    return found


def compiled(model: nn.Module, image: Tensor, threads: int) -> Model:
    print("compiling the original takes about a minute ...", flush=True)
    graph = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        graph(image)
    return graph  # type: ignore[no-any-return]


def in_onnx_runtime(model: nn.Module, image: Tensor, threads: int) -> Model:
    load = export.require("onnx").load
    assert load is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with export.quiet():
            result = export.export_model(model, image, "onnx", path, swapped=False, threads=threads)
            if not result.ok:
                raise report.UsageError(f"its export is wrong by {result.error}")
            return load(path, threads)


def draw(models: dict[str, timing.Times], rows: list[bench.Row], path: Path) -> None:
    """Bars of time: the whole model left, attention alone at each stage right, forward and with backward."""
    plt = bench_plots.pyplot()
    figure, (whole, forward, full) = plt.subplots(1, 3, figsize=(15, 4.2), width_ratios=(2, 2, 2))
    colours = {"eager": "#bbbbbb", "sdpa": "#7799bb", "cpp": "#dd6633", "triton": "#dd6633", "reference": "#ddaa55"}
    ours = ["#dd6633" if name.startswith("swapped") else "#bbbbbb" for name in models]
    names = [name.replace(", ", ",\n") for name in models]
    bars = whole.bar(names, [t.median * 1e3 for t in models.values()], color=ours)
    whole.tick_params("x", labelsize=7)
    whole.bar_label(bars, fmt="%.1f", fontsize=8)
    whole.set_title("MobileViT-S, forward", fontsize=10)
    whole.set_ylabel("median, ms")
    for axis, mode, title in ((forward, "fwd", "attention alone, forward"), (full, "full", "... with backward")):
        mine = [row for row in rows if row.mode == mode and row.median_us is not None]
        labels = list(dict.fromkeys(row.label for row in mine))
        providers = list(dict.fromkeys(row.provider for row in mine))
        thick = 0.8 / max(len(providers), 1)
        for i, provider in enumerate(providers):
            chosen = [row for row in mine if row.provider == provider]
            at = [labels.index(row.label) + (i - (len(providers) - 1) / 2) * thick for row in chosen]
            bars = axis.bar(at, [row.median_us for row in chosen], thick, label=provider, color=colours.get(provider))
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set_yscale("log")
        axis.set_ylabel("median, µs")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    bench_plots.save(figure, path)


if __name__ == "__main__":
    sys.exit(command.run("demo", main))
