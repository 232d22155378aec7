"""Train Mobile-Former on scikit-learn's digits, on one or several backends, and compare the curves.

The 8 x 8 pictures are enlarged to 32 x 32 and a quarter of them is held out. Each backend starts from the same
weights and sees the same batches. Writes the curves as CSV, one row for each backend and epoch, and a picture of
them; rows of backends that are not run stay in the file. Exits with 1 if a run ends below --wanted.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mvkernels
import mvmodels
from mvkernels import bench_report, report
from mvkernels.backend import requested

COLUMNS = ("backend", "epoch", "loss", "accuracy", "cpu_seconds", "model", "parameters", "device", "threads", "torch")


def digits(size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(pictures (N, 1, size, size), labels (N,)) to train on and to test on: 1347 and 450."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise report.UsageError("scikit-learn is not installed: pip install 'mvkernels[models]'") from None
    data = load_digits()
    pictures = torch.from_numpy(data.images).float()[:, None] / 8.0 - 1.0
    pictures = F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=data.target)
    return (pictures[train], labels[train]), (pictures[test], labels[test])


def train(options: argparse.Namespace, backend: str, progress: report.Progress) -> list[dict[str, Any]]:
    """One row for each epoch: the mean loss, and the accuracy on held-out pictures."""
    (pictures, labels), held_out = digits(options.size)
    torch.manual_seed(options.seed)
    model = mvmodels.create_model(options.model, num_classes=10, in_chans=1, stem_stride=1, backend=backend)
    steps = options.epochs * (len(labels) // options.batch)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, max(steps, 2), pct_start=0.2)
    generator = torch.Generator().manual_seed(options.seed)
    common = {
        "model": options.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        **{key: value for key, value in report.machine().items() if key in COLUMNS},
    }
    rows: list[dict[str, Any]] = []
    start = time.process_time()
    for epoch in range(1, options.epochs + 1):
        progress.step(f"{backend}, epoch {epoch}" + (f", accuracy {rows[-1]['accuracy']:.3f}" if rows else ""))
        losses = []
        model.train()
        # What is left over after whole batches waits for another epoch's order.
        for batch in torch.randperm(len(labels), generator=generator).split(options.batch)[
            : len(labels) // options.batch
        ]:
            loss = F.cross_entropy(model(pictures[batch]), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        rows.append(
            {
                "backend": backend,
                "epoch": epoch,
                "loss": round(float(torch.stack(losses).mean()), 5),
                "accuracy": round(accuracy(model, *held_out), 5),
                "cpu_seconds": round(time.process_time() - start, 2),
                **common,
            }
        )
    return rows


@torch.no_grad()
def accuracy(model: torch.nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """The share of pictures whose largest logit is right."""
    model.eval()
    return float((model(pictures).argmax(1) == labels).float().mean())


def merge(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the file whose backend was not run now, and the new ones."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["backend"] not in {r["backend"] for r in rows}]
    return [*kept, *rows]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over the epochs, a line for each backend."""
    plt = bench_report.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for backend, style in zip(dict.fromkeys(row["backend"] for row in rows), ("-", "--", ":", "-.")):
        mine = [row for row in rows if row["backend"] == backend]
        for axis, what in zip(axes, ("loss", "accuracy")):
            axis.plot([int(r["epoch"]) for r in mine], [float(r[what]) for r in mine], style, label=backend)
            axis.set_xlabel("epoch")
            axis.set_title({"loss": "training loss", "accuracy": "accuracy on held-out digits"}[what], fontsize=10)
    axes[1].axhline(0.95, color="#bbbbbb", linewidth=0.8)
    axes[1].legend()
    figure.suptitle(f"{rows[0]['model']} on scikit-learn's digits", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobile_former_26m", choices=mvmodels.list_models())
    parser.add_argument("--backend", nargs="+", default=["reference"], metavar="NAME", help="reference, cpp, …")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--size", type=int, default=32, help="side of a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wanted", type=float, default=0.95, help="the least accuracy at the end")
    parser.add_argument("--csv", type=Path, help="file of the curves; rows of other backends in it are kept")
    parser.add_argument("--plot", type=Path, help="picture of all curves in the file")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    for name, least in (("epochs", 1), ("batch", 2), ("size", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}, want at least {least}")
    torch.set_num_threads(options.threads)
    try:
        for backend in options.backend:
            requested(backend)  # a misspelt one is told before anything is trained
        return run(options)
    except (report.UsageError, mvkernels.BackendUnavailable, ValueError) as error:
        print(f"train_digits: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    progress = report.Progress(options.epochs * len(options.backend))
    rows: list[dict[str, Any]] = []
    try:
        for backend in options.backend:
            rows += train(options, backend, progress)
    finally:
        progress.close()
    last = [row for row in rows if row["epoch"] == options.epochs]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        shown = ("backend", "epoch", "loss", "accuracy", "cpu_seconds")
        print(report.table([[str(row[key]) for key in shown] for row in rows], shown))
        for row in last:
            print(f"{row['backend']}: {100 * row['accuracy']:.1f} % of held-out digits in {row['cpu_seconds']:.0f} s")
    everything = rows if options.csv is None else merge(options.csv, rows)
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(everything)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(everything, options.plot)
    short = [row["backend"] for row in last if row["accuracy"] < options.wanted]
    if short:
        print(f"train_digits: below {options.wanted:.0%}: {', '.join(short)}", file=sys.stderr)
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
