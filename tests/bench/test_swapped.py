"""The benchmark of whole models: which ways to run them it times, and the tables that pages make of its files."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs a checkout")
SAME = ("model", "size", "batch", "dtype", "layout", "mode")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("threads", [1, 2])
def test_every_way_is_a_row_and_threads_have_a_file_of_their_own(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped, models, results = (importlib.import_module(name) for name in ("swapped", "_models", "_results"))
    compiled: list[nn.Module] = []

    class Compiled:
        def __init__(self, model: nn.Module, frozen_for: torch.Tensor | None = None) -> None:
            compiled.append(model)
            self.parameters, self.model = model.parameters, model

        def __call__(self, x: torch.Tensor) -> Any:
            return self.model(x)

    for module in (swapped, models):
        monkeypatch.setattr(module, "Compiled", Compiled)
    asked: list[tuple[str, int]] = []

    def other(runtime: str, model: nn.Module, image: torch.Tensor, place: Path, threads: int) -> Any:
        asked.append((runtime, threads))
        return model

    monkeypatch.setattr(swapped, "other", other)
    monkeypatch.setattr(swapped, "built", lambda name: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()).eval())
    monkeypatch.setattr(swapped, "keep_pages", lambda: None)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    line = ["swapped.py", "--model", "m", "--size", "8", "--batch", "1", "--mode", "fwd", "--rounds", "1"]
    line += ["--threads", str(threads), "--runtimes", "onnx", "openvino"]
    before = torch.get_num_threads()
    found = {}
    try:
        for more in ([], ["--no-compile"]):
            monkeypatch.setattr(sys, "argv", [*line, *more])
            assert swapped.main() == 0
            path = results.folder() / f"{results.stem('swapped', threads)}.csv"
            rows = results.read(path)
            assert {row["threads"] for row in rows} == {str(threads)}
            found[bool(more)] = [row["provider"] for row in rows]
    finally:
        torch.set_num_threads(before)
    assert [file.name for file in path.parent.iterdir()] == ["swapped.csv" if threads == 1 else "swapped_2_threads.csv"]
    every = ["original", "swapped", "original, compiled", "swapped, compiled", "swapped, norms folded"]
    every += ["swapped, inference", "swapped, inference, compiled", "original, onnx", "original, openvino"]
    assert found == {False: every, True: [way for way in every if "compiled" not in way]}
    assert len(compiled) == 3 and asked == [("onnx", threads), ("openvino", threads)] * 2


def test_the_page_has_a_table_for_each_count_of_threads(tmp_path: Path) -> None:
    results, pages = importlib.import_module("_results"), importlib.import_module("pages")
    ways = ("original", "swapped", "swapped, inference", "original, openvino")
    for threads in (1, 2):
        same = {"model": "a", "size": 64, "batch": 1, "dtype": "float32", "layout": "contiguous", "mode": "fwd"}
        same |= {"device": "cpu", "capability": "avx2", "threads": threads}
        same |= {"torch": "2", "date": "today", "commit": "a"}
        of = [
            {**same, "provider": way, "median_us": 6000 / n / threads, "speedup_median": n}
            for n, way in enumerate(ways, 1)
        ]
        results.merge(of, tmp_path / "somewhere" / f"{results.stem('swapped', threads)}.csv", SAME)
    text = pages.models_page(tmp_path)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    of_one = "## Models of other packages, somewhere"
    assert headings == [of_one, f"{of_one}, 2 threads"]
    for threads in (1, 2):
        assert f"cpu (avx2), {threads} thread(s)" in text
        assert f"| `a` | 64² | 1 | inference | {6 / threads:.1f} ms | 2.00× | 3.00× | 4.00× |" in text
