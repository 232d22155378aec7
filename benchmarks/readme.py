"""Writes the README's figures from the CSV files under benchmarks/results: its table of whole models, and the
picture in docs/.

The picture is drawn twice, for light and for dark backgrounds. ``--check`` changes nothing and exits with 1 if the
README or a picture is not what the files say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _figures import OPS, OURS, RESULTS, ROOT, Row, files_are, geomean, machines, ratios, read, summary

from mvkernels.bench import svg
from mvkernels.commands import command

BEGIN = "<!-- figures: begin (written by benchmarks/readme.py) -->\n"
END = "<!-- figures: end -->"
COLOURS = {"light": svg.LIGHT, "dark": svg.DARK}
WHO = (("swapped", "swapped"), ("swapped, inference", "swapped, inference=True"),
       ("swapped, compiled", "swapped, compiled"),
       ("original, compiled", "original, torch.compile"), ("original, onnx", "original, ONNX Runtime"),
       ("original, openvino", "original, OpenVINO"))  # fmt: skip


def shown(results: Path) -> Path | None:
    """The machine that the README shows: the one with figures of most ops, then of most rows."""

    def count(folder: Path) -> tuple[int, int]:
        return len(summary(folder)), sum(len(read(path)) for path in folder.glob("*.csv"))

    return max(machines(results), key=count, default=None)


def op_bars(folder: Path) -> list[svg.Bar]:
    """How many times as fast as the best peer each op is, forward, float32."""
    found: list[svg.Bar] = []
    for op, *_ in OPS:
        mine = [r for r in read(folder / f"{op}.csv") if r["provider"] in OURS and r["mode"] == "fwd"]
        speedups = [float(r["speedup_median"]) for r in mine if r["dtype"] == "float32" and r["speedup_median"]]
        if speedups:
            found.append(svg.Bar(op, geomean(speedups), True))
    return found


def model_bars(folder: Path) -> list[tuple[str, list[svg.Bar]]]:
    """Whole models at inference, batch 1: how many times as fast as the original each way to run them is."""
    rows: list[Row] = [r for r in read(folder / "swapped.csv") if (r["batch"], r["layout"]) == ("1", "contiguous")]
    found = {name: ratios(rows, "fwd", name, "original") for name, _ in WHO}
    names = list(dict.fromkeys(model for of in found.values() for model in of))
    return [
        (
            model.split()[0],
            [svg.Bar(label, found[who][model], who.startswith("swapped")) for who, label in WHO if model in found[who]],
        )
        for model in names
    ]


def picture(folder: Path, colours: svg.Colours) -> str:
    """Ops, and whole models, of a machine."""
    ops, models = op_bars(folder), model_bars(folder)
    panels: list[tuple[str, svg.Groups]] = []
    if ops:
        panels.append(
            ("Ops: times as fast as the best peer: eager, torch.compile, and SDPA for softmax (forward)", [("", ops)])
        )
    if models:
        panels.append(("Whole models: times as fast as the original in eager mode (inference)", models))
    return svg.bars(panels, colours, "Speed-up of ops and models")


def render(results: Path) -> str:
    """The block between the markers."""
    folder = shown(results)
    if folder is None or not summary(folder):
        return (
            f"{BEGIN}No figures are committed yet: `make bench` takes them on your machine and writes them here.\n{END}"
        )
    lines = [
        "<picture>",
        '  <source media="(prefers-color-scheme: dark)" srcset="docs/figures-dark.svg">',
        '  <img src="docs/figures-light.svg" alt="How many times as fast ops and whole models are">',
        "</picture>", "", *(summary(folder, of_ops=False) or summary(folder)),
    ]  # fmt: skip
    return BEGIN + "\n".join(lines) + END


def wanted(results: Path) -> dict[Path, str]:
    """Every file, and what is to stand in it."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    found = {readme: before + render(results) + rest.split(END, 1)[1]}
    folder = shown(results)
    if folder is not None and summary(folder):
        found |= {ROOT / "docs" / f"figures-{kind}.svg": picture(folder, of) for kind, of in COLOURS.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    return files_are(wanted(RESULTS), options.check, "benchmarks/readme.py")


if __name__ == "__main__":
    sys.exit(command.run("readme", main))
