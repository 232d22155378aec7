"""The profile of the C++ kernels by parts: benchmarks/parts.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _held  # noqa: E402
import parts  # noqa: E402

HERE = "mvk::avx2::(anonymous namespace)::"
SCRIPT = f"""
 100.000000100:     7f01 {HERE}tile<float, false, 2, 6> (/x/_C.abi3.so)
 100.100000000:     7f02 {HERE}exponentials<float, 2> (/x/_C.abi3.so)
 100.200000000:     7f03 [unknown] ([unknown])
 garbage
 100.300000000:     7f04 mvk::avx2::pack_rows<float>(mvk::avx2::Lattice const&, long) (/x/_C.abi3.so)
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
    code += "; _held.hold('avx2', ['-c', 'import os; print(*os.environ)'])"
    free = {name: value for name, value in os.environ.items() if name not in _held.HELD["avx2"]}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=free, capture_output=True, text=True, check=True)
    assert _held.HELD["avx2"].keys() <= set(done.stdout.split())
