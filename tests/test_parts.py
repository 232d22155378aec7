"""The profile of the C++ kernels by parts: benchmarks/parts.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _held  # noqa: E402
import pages  # noqa: E402
import parts  # noqa: E402

from mvkernels import report  # noqa: E402
from mvkernels.dispatch import extension  # noqa: E402
from mvkernels.dispatch.registry import OPS  # noqa: E402

HERE = "mvk::avx2::(anonymous namespace)::"
SCRIPT = f"""
 100.000000100:     7f01 {HERE}tile<float, false, 2, 6> (/x/_C.abi3.so)
 100.100000000:     7f02 {HERE}exponentials<float, 2> (/x/_C.abi3.so)
 100.200000000:     7f03 [unknown] ([unknown])
 garbage
 100.300000000:     7f04 mvk::avx2::pack_rows<float>(mvk::avx2::Lattice const&, long) (/with a space/_C.abi3.so)
 101.000000000:     7f05 PyObject_Call (/usr/lib/libpython3.11.so)
"""


@pytest.mark.parametrize(
    ("symbol", "part"),
    [
        (f"{HERE}tile<float, true, 2, 5>", "products"),
        (f"{HERE}product_rows<float, mvk::avx2::(anonymous namespace)::Next>", "products"),
        (f"{HERE}dots_tile<float, 8, 6>", "products"),
        (f"{HERE}softmax<float>", "exponentials"),
        (f"{HERE}depthwise_columns<float, 5, 2>", "convolutions"),
        ("mvk::avx512::Head<float>::panel", "packing"),
        ("mvk::avx512::Head<float>::put_panel(long, long, float const*, long)", "stores"),
        (f"{HERE}unpack_panel_of<float, float>", "stores"),
        (f"{HERE}query_gradients<float>", "rest"),
    ],
)
def test_a_function_belongs_to_a_part(symbol: str, part: str) -> None:
    assert parts.part_of(symbol, "_C.abi3.so") == part
    assert parts.part_of(symbol, "libtorch_cpu.so") == "call"


def test_samples_are_counted_in_their_time() -> None:
    found = parts.samples(SCRIPT.splitlines())
    assert [part for _, part in found] == ["products", "exponentials", "call", "packing", "call"]
    divided = parts.shares(found, 100, 101)
    assert divided.pop("samples") == 4
    assert divided == {part: 0.25 if part in {p for _, p in found} else 0 for part in parts.NAMES}
    assert parts.shares(found, 0, 1) == dict.fromkeys(parts.NAMES, 0) | {"samples": 0}


def test_a_processor_is_held_in_another_process() -> None:
    code = "import sys; sys.path.insert(0, 'benchmarks'); import _held"
    code += "; _held.hold('avx2', ['-c', 'import json, os; print(json.dumps(dict(os.environ)))'])"
    free = {name: value for name, value in os.environ.items() if name not in _held.HELD["avx2"]}
    free["TORCHINDUCTOR_CACHE_DIR"] = "/somewhere"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=free, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere_avx2"
    assert {name: found[name] for name in _held.HELD["avx2"]} == _held.HELD["avx2"]


def test_a_process_that_is_held_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _held.HELD["avx2"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("held twice"))
    _held.hold("avx2", [])
    _held.hold(None, [])


@pytest.mark.skipif(extension.module is None, reason=extension.reason)
@pytest.mark.parametrize("name", parts.ATTENTION)
def test_the_calls_are_those_of_the_kernels(name: str) -> None:
    op = OPS[name]
    found = parts.calls(op, op.suite("small")[-1], "channels_last")
    assert list(found) == ["fwd", "bwd"]
    for call, flops, exponentials, moved in found.values():
        assert call() is not None and flops > 0 and moved > 0
        assert (exponentials == 0) == ("linear" in name)


def test_without_perf_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["parts.py", "--no-file"])
    monkeypatch.setattr(parts, "keep_pages", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(report.UsageError, match="perf, the profiler of Linux, is not installed"):
        parts.main()
    with pytest.raises(report.UsageError, match="ended with status 3"):
        parts.output_of([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_page_has_the_mean_of_each_class() -> None:
    row = {"op": "patch_attention", "mode": "fwd", "size_class": "N<=64", "layout": "channels_last", "threads": "1"}
    row |= {"device": "a processor", "capability": "avx2", "torch": "2", "date": "today", "commit": "c"}
    row |= {"fma_gflop_s": "100", "exp_g_s": "5", "copy_gb_s": "20", "fraction_of_floor": "0.5"}
    row |= dict.fromkeys(pages.SHARES, "0.1") | {"products": "0.4"}
    other = row | {"products": "0.6", "fraction_of_floor": "0.72", "exp_g_s": "6"}
    (text,) = pages.where_kernels_go([row, other])
    assert "(100 GFLOP/s, 5.0 to 6.0 exponentials a ns)" in text
    assert "| `patch_attention` | 17 to 64: 2 | forward | 50 % | 10 % |" in text and text.endswith("| 60 % | 50 % |\n")
    assert pages.where_kernels_go([]) == []
