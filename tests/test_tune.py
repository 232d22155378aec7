"""Tuning: the search on a device that is not timed seriously, the file it writes, its command line."""

from __future__ import annotations

import json
import os

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
    from mvkernels.ops.patch_attention.triton import configs as of_the_op

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
        pytest.importorskip("mvkernels.ops.patch_attention.triton.configs")
        assert configs.config("patch_attention", "forward_rows", device.name, key)["num_warps"] == 8
        tune.save(path, "patch_attention", [finding({})], device)
        assert json.loads(path.read_text())["configs"] == {}
    finally:
        monkeypatch.undo()
        configs.forget()
