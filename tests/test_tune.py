"""Tuning: the search on a device that is not timed seriously, the file it writes, its command line."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch

from mvkernels import tune
from mvkernels.commands import tune as command
from mvkernels.report import UsageError
from mvkernels.triton import configs

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(UsageError, match="needs a CUDA or ROCm device"):
        command.main([])


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_search_refuses_wrong_candidates_and_is_told_once(monkeypatch):
    from mvkernels.ops.patch_attention import OP
    from mvkernels.triton.attention import configs as of_the_op

    assert of_the_op  # its import registers candidates, which would take the place of these

    tried = [{"UNITS": 1}, {"UNITS": 3}]  # a tile of three units is no power of two: it does not compile
    for kernel in ("forward_packed", "backward_packed"):
        monkeypatch.setitem(configs._CANDIDATES, ("patch_attention", kernel), lambda key: tried)
    query = torch.randn(1, 1, 8, 3, 3)
    done: set[tuple[str, str]] = set()
    arguments = {"query": query, "key": query + 1, "value": query - 1, "patch_size": (1, 1)}
    findings = tune.tune_case(OP, arguments, "cpu", done, min_time=0.0)
    assert [(f.kernel, f.tried, f.refused) for f in findings] == [("forward_packed", 2, 1), ("backward_packed", 2, 1)]
    assert all(f.best in ({}, {"UNITS": 1}) and f.best_us <= f.default_us for f in findings)
    assert tune.tune_case(OP, arguments, "cpu", done, min_time=0.0) == []


@pytest.mark.core
def test_the_file_is_merged_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    device = configs.Device("Some GPU 80GB", "sm_90", 132)
    path = configs.file_of(device.name)
    key = {"n": 64, "d": 20, "dv": 20, "bias": 0, "wide": 1, "dtype": "f16", "arch": "sm_90"}
    text = configs.key_text(key)

    def finding(best):
        return tune.Finding("forward_rows", text, 3, 0, 10.0, 8.0, best)

    try:
        tune.save(path, "patch_attention", [finding({"num_warps": 8})], device)
        tune.save(path, "other_op", [], device)
        configs.forget()
        assert path.name == "some_gpu_80gb.json" and json.loads(path.read_text())["device"] == device.name
        pytest.importorskip("mvkernels.triton.attention.configs")
        assert configs.config("patch_attention", "forward_rows", device.name, key)["num_warps"] == 8
        tune.save(path, "patch_attention", [finding({})], device)
        assert json.loads(path.read_text())["configs"] == {}
    finally:
        monkeypatch.undo()
        configs.forget()


KEY = {"bias": 0, "d": 36, "dtype": "bf16", "dv": 36, "n": 256, "wide": 1, "arch": "sm_90"}


def test_what_is_listed_is_tried_and_else_what_is_near(monkeypatch):
    pytest.importorskip("mvkernels.triton.attention.configs")
    of = "patch_attention", "forward_rows"
    listed = [{"num_warps": 2}, {"num_warps": 1}]
    content = {"sm_90": {"patch_attention.forward_rows": {configs.class_of(KEY): listed}}}
    monkeypatch.setattr(configs, "_listed", lambda: content)
    assert tune.to_try(*of, KEY) == listed
    for same in ({"dtype": "f16"}, {"d": 40, "dv": 48}):  # they compile to the same tiles: 32 lanes and 16
        assert tune.to_try(*of, KEY | same) == listed
    for other in ({"arch": "sm_80"}, {"dtype": "f32"}, {"n": 255}, {"d": 60}, {"dv": 32}):
        key = KEY | other
        near = tune.kinds(configs.candidates_of(*of, key), configs.default(*of, key))
        assert len(near) > 2 and tune.to_try(*of, key)[: len(near)] == [kind[0] for kind in near]
        assert sum(map(len, near)) == len(tune.to_try(*of, key))


def parsed(text, arch):
    values = (each.split("=") for each in text.split(","))
    return {name: int(value) if value.isdigit() else value for name, value in values} | {"arch": arch}


def test_what_the_models_ask_for_is_listed_registered_and_was_executed_without_a_fault(of_benchmarks, monkeypatch):
    # Red after a change of what is registered, a heuristic or a key: `python benchmarks/candidates.py` lists anew.
    candidates = importlib.import_module("candidates")
    with candidates.RESULTS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["outcome"] in ("ok", "another kernel")]
    right = {
        (f"{row['op']}.{row['kernel']}", configs.class_of(parsed(row["key"], candidates.ARCH)), row["change"])
        for row in rows
    }
    listed = configs._listed()[candidates.ARCH]

    def unwritten(*size, generator=None, **how):  # nobody looks at the values
        return torch.empty(*size, **how)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", unwritten)
        asked = list(candidates.asked(32, 132))
    # Also of the same name, and for the same key, in two ops.
    assert {(each.default.op, each.default.kernel) for each in asked} == set(configs._CANDIDATES)
    promising = {(kernel, key) for kernel, key, change in right if change}
    assert {(kernel, key) for kernel, keys in listed.items() for key in keys} <= promising
    assert {(each.default.name, configs.class_of(each.key)) for each in asked} >= promising
    for each in asked:
        of, kernel = (each.default.op, each.default.kernel), each.default.name
        if configs.listed(*of, each.key) is None:  # nothing was promising
            continue
        changes = tune.to_try(*of, each.key)
        assert changes == tune.to_try(*of, each.key | {"dtype": "f16"})
        default, registered = configs.default(*of, each.key), configs.candidates_of(*of, each.key)
        assert len(changes) <= tune.MOST and default not in [default | change for change in changes]
        assert all(change in registered for change in changes), each.default
        assert len({json.dumps(default | change, sort_keys=True) for change in changes}) == len(changes)
        for change in changes:
            in_words = " ".join(f"{name}={value}" for name, value in change.items())
            assert (kernel, configs.class_of(each.key), in_words) in right


@pytest.fixture
def of_benchmarks(monkeypatch):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_the_promising_are_the_cheapest_kinds_and_of_each_the_nearest_first(of_benchmarks):
    promising = importlib.import_module("candidates").promising
    kinds = [[{"BLOCK": b, "num_stages": s} for s in (1, 2)] for b in (16, 32, 64, 128, 256, 512)]
    of = [(100, "ok"), (90, "ok"), ("", "spills"), ("", "wrong"), (136, "ok"), ("", "another kernel")]
    rows = [{"cycles": cycles, "outcome": outcome} for cycles, outcome in of]
    blocks = [(change["BLOCK"], change["num_stages"]) for change in promising(kinds, rows, least=math.inf)]
    assert blocks == [(32, 1), (16, 1), (32, 2), (16, 2), (512, 1)]  # 136 is beyond one and a half times 90
    assert [change["BLOCK"] for change in promising(kinds, rows, least=50)] == [512]
    many = [[{"BLOCK": b}] for b in range(20)]
    assert promising(many, [{"cycles": 40 - b, "outcome": "ok"} for b in range(20)], 30) == many_reversed(many)


def many_reversed(kinds):
    return [kind[0] for kind in reversed(kinds)][: tune.MOST]
