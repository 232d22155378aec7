"""Counts, family by family, how many attention modules of other packages' image models are swapped.

Every model of up to 100 M parameters is built on the meta device, without weights, and swapped. Writes
benchmarks/results/coverage.csv and docs/coverage.md; with ``--page`` only the page, from the file. ``--check`` changes
nothing and exits with 1 if the page is not what the file says.
"""

from __future__ import annotations

import argparse
import collections
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from _figures import files_are, read
from _results import ROOT, write
from torch import nn

import mvkernels
from mvkernels import report, third_party
from mvkernels.commands import command

MOST = 100_000_000
PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
FILE = ROOT / "coverage.csv"
Named = Iterator[tuple[str, str, Callable[[], nn.Module]]]


@dataclass
class Family:
    """What the models of a family come to."""

    models: int = 0
    found: collections.Counter[str] = field(default_factory=collections.Counter)
    """Attention modules, by class."""
    swapped: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    smallest: tuple[int, str, int, int] | None = None
    """(parameters, name, attention modules, how many of them are swapped)"""

    def add(self, name: str, model: nn.Module) -> None:
        parameters = sum(p.numel() for p in model.parameters())
        if parameters > MOST:
            return
        entries = mvkernels.swap(model).entries
        if not entries:
            return
        self.models += 1
        self.found.update(entry.module_class for entry in entries)
        self.swapped.update(entry.module_class for entry in entries if entry.swapped)
        self.reasons.update(f"{entry.module_class}: {entry.reason}" for entry in entries if not entry.swapped)
        this = (parameters, name, len(entries), sum(entry.swapped for entry in entries))
        self.smallest = min(filter(None, (self.smallest, this)))

    def row(self) -> dict[str, Any]:
        assert self.smallest is not None
        classes = (f"{name} {self.swapped[name]}/{count}" for name, count in sorted(self.found.items()))
        reasons = (f"{reason} ({count})" for reason, count in self.reasons.most_common(3))
        return {
            "models": self.models, "modules": self.found.total(), "swapped": self.swapped.total(),
            "classes": "; ".join(classes), "reasons": "; ".join(reasons), "example": self.smallest[1],
            "example_modules": self.smallest[2], "example_swapped": self.smallest[3],
        }  # fmt: skip


def of_timm() -> Named:
    timm = third_party.load("timm")
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            yield module, name, lambda name=name: timm.create_model(name)


def of_torchvision() -> Named:
    models = third_party.load("torchvision.models")
    for name in models.list_models(module=models):
        builder = models.get_model_builder(name)
        yield builder.__module__.rpartition(".")[2], name, builder


def of_transformers() -> Named:
    transformers = third_party.load("transformers")
    for mapping in (transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.MODEL_FOR_BACKBONE_MAPPING):
        for config, model in mapping.items():
            for kind in model if isinstance(model, (list, tuple)) else (model,):
                yield config.model_type, kind.__name__, lambda kind=kind, config=config: kind(config())


PACKAGES: dict[str, Callable[[], Named]] = {
    "timm": of_timm,
    "torchvision": of_torchvision,
    "transformers": of_transformers,
}


def build(package: str, example: str) -> nn.Module:
    """A model by its name, on the meta device."""
    return next(on_meta(make) for _, name, make in PACKAGES[package]() if name == example)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return make()


def measure() -> list[dict[str, Any]]:
    rows = []
    for package, models in PACKAGES.items():
        families: dict[str, Family] = collections.defaultdict(Family)
        for family, name, make in models():
            try:
                families[family].add(name, on_meta(make))
            except Exception as error:  # a model that needs another package, or a picture size, is told and left out
                lines = str(error).splitlines() or [""]
                print(f"{package} {name}: {type(error).__name__}: {lines[0]}", file=sys.stderr)
        same = {"date": date.today().isoformat(), "commit": report.commit(), "package": package}
        same["version"] = sys.modules[package].__version__
        rows += [{**same, "family": name, **found.row()} for name, found in sorted(families.items()) if found.models]
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """docs/coverage.md."""
    some = [row for row in rows if int(row["swapped"])]
    parts = [
        "# Coverage\n",
        "See how many of the attention modules in timm's, torchvision's and transformers' image models are swapped by "
        "`mvkernels.swap`, and why the others are not.\n",
        "Written by `benchmarks/swap_coverage.py` from `benchmarks/results/coverage.csv`; no number is typed by hand. "
        "Every "
        "model of up to 100 M parameters is built without weights and swapped; those that cannot be, for they need "
        "another package or copy weights as they are built, are left out. A family has a row if one of its models has "
        "attention.\n",
    ]
    for package in dict.fromkeys(row["package"] for row in rows):
        mine = [row for row in rows if row["package"] == package]
        done = [row for row in mine if int(row["swapped"])]
        parts.append(f"## {package}\n")
        first, known, everything = mine[0], of_total(done), of_total(mine)
        parts.append(
            f"{package} {first['version']}, {first['date']}, commit `{first['commit']}`: {total(mine, 'models')} "
            f"models with attention. In the {len(done)} families with a fused form {known} attention modules are "
            f"swapped, of all {len(mine)} families {everything}.\n"
        )
        lines = ["| family | models | attention modules | swapped | left as they are |", "| --- " * 5 + "|"]
        for row in sorted(mine, key=lambda row: (-int(row["swapped"]), -int(row["modules"]), row["family"])):
            left = row["reasons"].replace("|", "/") or "–"
            lines.append(f"| {row['family']} | {row['models']} | {row['modules']} | {row['swapped']} | {left} |")
        parts.append("\n".join(lines) + "\n")
    share = 100 * total(some, "swapped") / max(1, total(some, "modules"))
    parts.insert(3, f"In the families with a fused form {share:.0f} % of the attention modules are swapped.\n")
    return "\n".join(parts)


def of_total(rows: list[dict[str, Any]]) -> str:
    return f"{total(rows, 'swapped')} of {total(rows, 'modules')}"


def total(rows: list[dict[str, Any]], column: str) -> int:
    return sum(int(row[column]) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from the file")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.page and not options.check:
        write(measure(), FILE)
    return files_are({PAGE: page(read(FILE))}, options.check, "benchmarks/swap_coverage.py")


if __name__ == "__main__":
    sys.exit(command.run("swap_coverage", main))
