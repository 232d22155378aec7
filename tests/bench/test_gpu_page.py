"""The page of what GPUs measured, made of files such as a run leaves."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mvkernels import files

ROOT = Path(__file__).resolve().parents[2]
RUN = {"date": "2026-01-02", "device": "NVIDIA H200", "capability": "sm_90", "torch": "2.11.0", "commit": "abc",
       "threads": "16"}  # fmt: skip


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("_gpu_page")


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_csv(path, list(rows[0]), rows)


def test_without_files_it_says_so(page: ModuleType, tmp_path: Path) -> None:
    assert "No GPU has run them yet" in page.page(tmp_path)


def test_every_shape_has_its_peers_and_its_prediction(page: ModuleType, tmp_path: Path) -> None:
    call = {"op": "patch_attention", "model": "m@256", "label": "4x36", "batch": "128", "dtype": "bfloat16",
            "layout": "channels_last"}  # fmt: skip
    timed = {**RUN, **call, "mode": "fwd", "floor_us": "40", "strides": "", "allocator": ""}
    ours = {"provider": "triton", "median_us": "50", "wall_us": "61.5", "speedup_median": "3", "speedup_wall": "2",
            "fraction_of_floor": "0.8"}  # fmt: skip
    eager = {"provider": "eager", "median_us": "150", "wall_us": "123", "speedup_median": "", "fraction_of_floor": ""}
    write(tmp_path / "nvidia-h200-sm-90" / "patch_attention.csv", [timed | ours, {**timed, **ours, **eager}])
    predicted = {**call, "mode": "fwd", "kernel": "all"}
    of_both = [
        {**predicted, "device": device, "backend": backend, "predicted_us": us}
        for device, backend, us in (("H100", "triton", 70), ("H200", "triton", 55), ("H200", "cuda", 45))
    ]
    write(tmp_path / "audit" / "prediction.csv", of_both)
    text = page.page(tmp_path)
    shape = "| patch_attention | m@256 4x36 | 128 | forward | 50 | 55 | 150 | – | – | 3.00× | 61.5 | 123 |"
    assert "## NVIDIA H200\n" in text and shape in text and "No op has been timed" not in text


def test_whole_models_beside_what_others_publish(page: ModuleType, tmp_path: Path) -> None:
    model = {**RUN, "model": "timm:mobilevit_s", "size": "256", "batch": "128", "dtype": "bfloat16", "mode": "fwd"}
    rows = [
        {**model, "provider": who, "median_us": us, "speedup_median": 20000 / us, "images_s": 128e6 / us}
        for who, us in (("original, compiled", 20000), ("swapped, compiled", 16000))
    ]
    write(tmp_path / "nvidia-h200-sm-90" / "swapped.csv", rows)
    right = {**RUN, "op": "patch_attention", "dtype": "bfloat16", "ok": "True", "error": "1", "allowed": "4"}
    write(tmp_path / "nvidia-h200-sm-90" / "verify.csv", [right])
    (tmp_path / "published.csv").write_bytes((ROOT / "benchmarks" / "results" / "published.csv").read_bytes())
    text = page.page(tmp_path)
    line = "| timm:mobilevit_s | 256 | 128 | bfloat16 | forward | swapped, compiled | 16.00 ms | 1.25× | 8,000 |"
    assert line in text and "| patch_attention | bfloat16 | 1 | 0 | 25 % |" in text
    assert "| timm:mobilevit_s | 256 | 768 | RTX 4090 | 2.9.1 | forward | [5,814](https://github.com/" in text
    assert "efficientvit" not in text  # at another size than any that was measured


@pytest.mark.parametrize(("clocks", "said"), [("free", "left the clocks alone"), ("", "at the clock that it sets")])
def test_counters_say_at_which_clock(page: ModuleType, clocks: str, said: str) -> None:
    counted = {"op": "patch_attention", "kernel": "forward_rows", "grid": "2048", "ns": "1500", "registers": "255"}
    counted |= {"warp_instructions": "2e6"} | {f"{name}_percent": "10" for name in ("sm", "dram", "occupancy")}
    (text,) = page.counters([{**RUN, **counted, "clocks": clocks}])
    assert said in text and "| patch_attention | `forward_rows` | 2048 | 1.5 | 10 % |" in text


def test_the_plan_measures_models_at_the_published_sizes(page: ModuleType) -> None:
    plan = importlib.import_module("_gpu_plan")
    published = {(row["model"], int(row["size"])) for row in page.read(ROOT / "benchmarks/results/published.csv")}
    assert published == set(plan.MODELS.items())
    for model, size in plan.MODELS.items():
        (step,) = [step for step in plan.steps() if step.name == f"time {model}, compiled"]
        assert step.command[step.command.index("--size") + 1] == str(size)
