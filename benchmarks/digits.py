"""Train the smallest model of each family on scikit-learn's digits, on each backend named, and compare the curves.

The training is that of ``python -m mvmodels.train``: the 8 x 8 pictures are enlarged and a quarter of them is held out;
each backend starts from the same weights and sees the same batches. Writes the curves as CSV, one row for each model,
backend and epoch, and a picture of them; rows of models and backends that are not run stay in the file. Exits with 1
if a run ends below --wanted.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch

import mvmodels
from mvkernels import files, report
from mvkernels.bench import plots as bench_plots
from mvkernels.commands import command
from mvkernels.dispatch.backend import requested
from mvmodels.data import Digits
from mvmodels.engine import Options, Trainer, say

COLUMNS = (
    "model", "backend", "epoch", "loss", "accuracy", "cpu_seconds", "parameters", "size", "device", "threads", "torch"
)  # fmt: skip
# Detectors and segmenters, built on a classifier of the family.
_DENSE = ("_ssdlite", "_deeplabv3")


def smallest() -> list[str]:
    """Of each paper the classifier with the fewest parameters."""
    found: dict[str, str] = {}
    for name in mvmodels.list_models():
        info = mvmodels.model_info(name)
        if name.endswith(_DENSE):
            continue
        best = found.get(info.paper)
        if best is None or info.params < mvmodels.model_info(best).params:
            found[info.paper] = name
    return list(found.values())


def train(options: argparse.Namespace, model: str, backend: str, progress: report.Progress) -> list[dict[str, Any]]:
    """One row for each epoch: the mean loss, and the accuracy on held-out pictures."""
    data = Digits(False, options.size), Digits(True, options.size)
    run = Options(
        model,
        epochs=options.epochs,
        batch_size=options.batch,
        lr=options.lr,
        size=options.size,
        seed=options.seed,
        backend=backend,
        ema=0.0,  # a run of a few epochs has little to average
    )
    common = {
        "model": model,
        "backend": backend,
        "size": options.size,
        **{key: value for key, value in report.machine().items() if key in COLUMNS},
    }
    progress.step(f"{model}, {backend}")

    def told(row: dict[str, Any]) -> None:
        say(f"{model}, {backend}, epoch {row['epoch']}: {row['loss']:.4f}, {100 * row['accuracy']:.2f} %")

    trainer = Trainer(run, *data, report=told if options.verbose else None)
    result = trainer.run()
    seconds, rows = 0.0, []
    for row in result["history"]:
        seconds += row["cpu_seconds"]
        rows.append({**common, **row, "cpu_seconds": round(seconds, 2), "parameters": result["parameters"]})
    return [{key: row[key] for key in COLUMNS} for row in rows]


def merge(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the file whose model was not run on that backend now, and the new ones."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        new = {(row["model"], row["backend"]) for row in rows}
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if (row["model"], row["backend"]) not in new]
    return [*kept, *rows]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over the epochs: a colour for each model, a kind of line for each backend."""
    plt = bench_plots.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    models, backends = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "backend"))
    for m, model in enumerate(models):
        for backend, style in zip(backends, ("-", "--", ":", "-.")):
            mine = [row for row in rows if (row["model"], row["backend"]) == (model, backend)]
            for axis, what in zip(axes, ("loss", "accuracy")):
                line = [int(r["epoch"]) for r in mine], [float(r[what]) for r in mine]
                axis.plot(*line, style, color=f"C{m}", linewidth=1.2, label=f"{model}, {backend}")
    for axis, title in zip(axes, ("training loss", "accuracy on held-out digits")):
        axis.set_xlabel("epoch")
        axis.set_title(title, fontsize=10)
    axes[1].axhline(0.95, color="#bbbbbb", linewidth=0.8)
    axes[1].legend(fontsize=7)
    figure.suptitle("scikit-learn's digits", fontsize=11)
    bench_plots.save(figure, path)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = main.add_argument
    add("--model", nargs="+", metavar="NAME", help="default: the smallest of each family")
    add("--backend", nargs="+", default=["reference", "cpp"], metavar="NAME", help="default: reference cpp")
    add("--epochs", type=int, default=8)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=2e-3)
    add("--size", type=int, default=32, help="side of a picture")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--wanted", type=float, default=0.95, help="the least accuracy at the end")
    add("--csv", type=Path, help="file of the curves; rows of other models and backends in it are kept")
    add("--plot", type=Path, help="picture of all curves in the file")
    add("--verbose", action="store_true", help="a line for each epoch on stderr")
    add("--json", action="store_true", help="print the rows as JSON")
    return main


def main(argv: list[str] | None = None) -> int:
    return command.run("digits", lambda: checked(argv))


def checked(argv: list[str] | None) -> int:
    """Refuse what cannot be done before anything is trained, then train."""
    line = parser()
    options = line.parse_args(argv)
    for name, least in (("epochs", 1), ("batch", 2), ("size", 8), ("threads", 1)):
        if getattr(options, name) < least:
            line.error(f"--{name} is {getattr(options, name)}, want at least {least}")
    torch.set_num_threads(options.threads)
    options.model = options.model or smallest()
    try:
        for backend in options.backend:
            requested(backend)
        for model in options.model:
            mvmodels.model_info(model)
        return run(options)
    except ValueError as error:
        raise report.UsageError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    progress = report.Progress(len(options.model) * len(options.backend))
    rows: list[dict[str, Any]] = []
    try:
        for model in options.model:
            for backend in options.backend:
                rows += train(options, model, backend, progress)
                save(options, rows)  # what is done stays if the rest is interrupted
    finally:
        progress.close()
    last = [row for row in rows if row["epoch"] == options.epochs]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        shown = ("model", "backend", "epoch", "loss", "accuracy", "cpu_seconds")
        print(report.table([[str(row[key]) for key in shown] for row in last], shown))
    short = [f"{row['model']} on {row['backend']}" for row in last if row["accuracy"] < options.wanted]
    if short:
        print(f"digits: below {options.wanted:.0%}: {', '.join(short)}", file=sys.stderr)
    return 1 if short else 0


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The file and the picture, with what they had of others."""
    everything = rows if options.csv is None else merge(options.csv, rows)
    if options.csv is not None:
        files.write_csv(options.csv, COLUMNS, everything)
    if options.plot is not None:
        draw(everything, options.plot)


if __name__ == "__main__":
    sys.exit(main())
