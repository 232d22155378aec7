"""Swap a real MobileViT-S of transformers, run a photograph through both, verify, and time.

Ends with a table and a picture of the timings in ./demo-output. Exits with 1 if the swapped model or a
kernel computes anything else than the original.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch

import mvkernels
from mvkernels import bench, report, third_party
from mvkernels.bench import plots as bench_plots
from mvkernels.bench import timing
from mvkernels.commands import bench as bench_report
from mvkernels.commands import command
from mvkernels.commands import swap as swap_command
from mvkernels.swap import swap, verify_swap


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo-output", help="folder for the picture and the figures")
    parser.add_argument("--image", help="a picture of your own")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pretrained", action="store_true", help="download the published weights")
    parser.add_argument("--threads", type=int, default=1)
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

    # The model as its package has it, and a copy in which the attention is swapped.
    model = third_party.build("transformers:mobilevit_s", options.pretrained)
    image, source = third_party.picture(options.image, options.size)
    image = image.flip(1)  # MobileViT's checkpoints were trained on BGR
    swapped = copy.deepcopy(model)
    found = swap(swapped)
    weights = "pretrained" if options.pretrained else "random weights"
    print(f"\n1. Swap: transformers MobileViT-S, {weights}\n\n{found}")

    print(f"\n2. Run: {source}, {options.size} x {options.size}\n")
    with torch.no_grad():
        before, after = model(image).logits, swapped(image).logits
    labels = model.config.id2label
    for name, logits in (("original", before), ("swapped", after)):
        best = int(logits.argmax())
        print(f"{name:9} top class {labels[best] if options.pretrained else best}, logit {float(logits.max()):.6f}")
    print(f"largest difference of a logit: {float((before - after).abs().max()):.1e}")

    verified = verify_swap(swapped, image)
    print(f"\n3. Verify: outputs and gradients, against the original in float64\n\n{verified}")

    print("\n4. Time: the whole model, and attention alone at its three stages\n")
    models = swap_command.time_models({"original": model, "swapped": swapped}, image)
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


def draw(models: dict[str, timing.Times], rows: list[bench.Row], path: Path) -> None:
    """Bars of time: the whole model left, attention alone at each stage right, forward and with backward."""
    plt = bench_plots.pyplot()
    figure, (whole, forward, full) = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(1, 2, 2))
    colours = {"eager": "#bbbbbb", "sdpa": "#7799bb", "cpp": "#dd6633", "triton": "#dd6633", "reference": "#ddaa55"}
    bars = whole.bar(list(models), [t.median * 1e3 for t in models.values()], color=("#bbbbbb", "#dd6633"))
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
