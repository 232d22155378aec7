"""What is read of machine code for aarch64, and of the log of emulated tests."""

import shutil
import subprocess
from pathlib import Path

import pytest

from release.neon import outcomes
from release.neon_code import disassembled, loops

ROOT = Path(__file__).parents[2]

CODE = """
0000000000000000 <void tile<float, 2>(long)>:
   0:	ldr	q0, [x1]
   4:	ldr	q1, [x2], #16
   8:	fmla	v2.4s, v1.4s, v0.s[0]
   c:	fmla	v3.4s, v1.4s, v0.4s
  10:	str	q4, [sp, #16]
  14:	str	x4, [sp, #32]
  18:	ld1r	{v5.4s}, [x3]
  1c:	subs	x0, x0, #0x1
  20:	b.ne	4 <void tile<float, 2>(long)+0x4>  // b.any
  24:	cbnz	x5, 0 <void tile<float, 2>(long)>
  28:	ret
  2c:	fmla	v2.4s, v1.4s, v0.s[0]
  30:	b	24 <void tile<float, 2>(long)+0x24>

0000000000000040 <copy>:
  40:	ldr	q0, [x1], #16
  44:	str	q0, [x2], #16
  48:	cbnz	x0, 40 <copy>
"""


def test_innermost_loops_are_counted():
    (loop,) = loops(CODE)  # not the outer one, not what returns before it, not a copy
    assert loop.function == "void tile<float, 2>(long)"
    assert (loop.fmla, loop.by_element, loop.broadcasts) == (2, 1, 1)
    assert (loop.loads, loop.spills, loop.instructions) == (2, 1, 8)


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no cross compiler for aarch64")
def test_a_product_takes_factors_by_element(tmp_path):
    includes = ["-O2", "-std=c++20", "-ffp-contract=fast", "-DMVK_ISA=neon", "-I", str(ROOT / "csrc/cpu")]
    made = tmp_path / "gemm.o"
    source = str(ROOT / "csrc/cpu/common/gemm.cpp")
    subprocess.run(["aarch64-linux-gnu-g++", *includes, "-c", source, "-o", str(made)], check=True)
    found = loops(disassembled(made))
    assert found[0].by_element > found[0].fmla / 2
    assert not [loop for loop in found if loop.fmla >= 12 and loop.spills]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("clang++"), reason="no clang")
def test_clang_takes_every_kernel():
    """As macOS on ARM compiles them; its compiler is stricter than GCC about dependent names."""
    sources = [str(path) for path in sorted((ROOT / "csrc/cpu").glob("*/*.cpp"))]
    flags = ["-std=c++20", "-Wall", "-Werror", "-Wno-unknown-warning-option", "-Wno-undefined-var-template"]
    gcc = ["-Wno-maybe-uninitialized", "-Wno-psabi", "-fno-plt", "-ffp-contract=fast"]
    command = ["clang++", "--target=aarch64-linux-gnu", "-fsyntax-only", *flags, *gcc]
    done = subprocess.run(
        [*command, "-DMVK_ISA=neon", "-I", str(ROOT / "csrc/cpu"), *sources],
        capture_output=True,
        text=True,
        check=False,
    )
    if "file not found" in done.stderr:
        pytest.skip("clang has no headers for aarch64")
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_log_that_ends_early_is_not_complete():
    log = "test_a.py::test_b[1] PASSED [ 33%]\ntest_a.py::test_c SKIPPED (no) [ 66%]\ntest_a.py::test_d FAILED [100%]\n"
    assert outcomes(log) == {"passed": 1, "failed": 1, "skipped": 1, "complete": "no"}
    end = "=== 1 failed, 1 passed, 1 skipped in 2.50s ===\n"
    assert outcomes(log + end)["complete"] == "yes"
