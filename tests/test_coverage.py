"""How many attention modules of other packages' models are swapped: what docs/coverage.md says, or more."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

import mvkernels

ROOT = Path(__file__).resolve().parents[1]
ROWS = list(csv.DictReader((ROOT / "benchmarks" / "results" / "coverage.csv").open(newline="")))
NAMED = {
    "timm": (
        "swin_transformer", "swin_transformer_v2", "maxxvit", "tiny_vit", "levit", "mobilenetv3", "mobilenetv5",
        "efficientformer", "efficientvit_mit", "cpubone", "lowformer",
    ),
    "transformers": ("swin", "swinv2", "donut-swin", "maskformer-swin", "levit", "mobilevit"),
    "torchvision": ("swin_transformer",),
}  # fmt: skip
LEAST = {"timm": 1538, "torchvision": 120, "transformers": 103}
"""Attention modules that are swapped, of all models: raise them when there are more."""


def test_the_page_shows_the_file() -> None:
    script = ROOT / "benchmarks" / "swap_coverage.py"
    found = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_all_attention_of_the_families_that_are_named_is_swapped() -> None:
    found = {(row["package"], row["family"]): row for row in ROWS}
    for package, families in NAMED.items():
        for family in families:
            row = found[package, family]
            assert row["swapped"] == row["modules"], f"{package} {family}: {row['reasons']}"


@pytest.mark.parametrize("package", LEAST)
def test_a_new_file_says_no_less(package: str) -> None:
    assert sum(int(row["swapped"]) for row in ROWS if row["package"] == package) >= LEAST[package]


@pytest.mark.parametrize("row", [r for r in ROWS if int(r["swapped"])], ids=lambda r: f"{r['package']}-{r['family']}")
def test_coverage_does_not_fall(row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each family the smallest model, built and swapped again."""
    pytest.importorskip(row["package"])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import swap_coverage

    report = mvkernels.swap(swap_coverage.build(row["package"], row["example"]))
    assert report.count >= int(row["example_swapped"])
