"""Products of tf32 on the GPU: their operands are rounded, as the compiled code says without one."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from mvkernels.dispatch.registry import OPS
from mvkernels.triton.repeated import OPTIONS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TARGET = "sm_90"
ROUNDED = 'elementwise_inline_asm "cvt.rna.tf32.f32 '
STRUCTURE = ("ONE_PASS", "PHASES", "SPLIT", "STAGE", "DX", "DTOKENS", "SAVE", "NORM", "RESIDUAL", "BIAS", "STORE_ROWS",
             "EXPANDS", "SY")  # fmt: skip
"""Constants of launches that decide which products a kernel has; beside them, whether CHUNK and D1 are 0."""

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)


@pytest.fixture(scope="module")
def audit():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("audit")
    finally:
        sys.path.remove(str(BENCHMARKS))


def source(unit):
    kernel = getattr(importlib.import_module(unit.module), unit.kernel)
    return ASTSource(
        fn=kernel,
        signature=dict(unit.signature),
        constexprs={(kernel.arg_names.index(name),): value for name, value in unit.constexprs},
        attrs={(index,): [["tt.divisibility", 16]] for index in unit.divisible},
    )


def compiled(audit, unit):
    return triton.compile(source(unit), target=audit.TARGETS[unit.target][0], options=OPTIONS | dict(unit.options))


class Lowered(Exception):
    """Carries what the first stage of the compiler made."""


def first_stage(audit, unit, monkeypatch):
    """The unit's Triton IR; the stages after it, which take nearly all of the time, are not run."""

    def only_first(self, stages, *arguments, add_stages=CUDABackend.add_stages):
        add_stages(self, stages, *arguments)

        def stop(module, metadata):
            raise Lowered(str(module))

        stages["ttgir"] = stop

    with monkeypatch.context() as patched:
        patched.setattr(CUDABackend, "add_stages", only_first)
        try:
            return compiled(audit, unit).asm["ttir"]  # it was in the compiler's cache
        except Lowered as lowered:
            return str(lowered)


def in_tf32(unit):
    """The same launch for float32 maps whose products may round to tf32."""
    types = tuple((name, "*fp32" if type_ == "*bf16" else type_) for name, type_ in unit.signature)
    constants = tuple((name, "tf32" if name == "PRECISION" else value) for name, value in unit.constexprs)
    return dataclasses.replace(unit, signature=types, constexprs=constants)


def structures(audit, op):
    """One unit for each set of products that a kernel of the op can have, whatever dtype it is launched so for."""
    units = {}
    for name in ("tf32", "bf16"):
        triton = [unit for unit in audit.plan([TARGET], [name], False, "", [op]) if isinstance(unit, audit.Unit)]
        for unit in triton:
            constants = dict(unit.constexprs)
            if "PRECISION" in constants:
                told = tuple(constants.get(each) for each in STRUCTURE)
                zero = tuple(constants.get(each) == 0 for each in ("CHUNK", "D1", "C1"))
                units.setdefault((unit.kernel, told, zero), in_tf32(unit))
    return units.values()


def unrounded(ttir):
    """The products of tf32 that have an operand which nothing rounded."""
    made, found, products = {}, [], 0

    def rounded(name):
        how = made.get(name, "")
        moved = re.match(r"tt\.(?:trans|reshape|join) (%[\w#]+)(?:, (%[\w#]+))?", how)
        if moved:
            return all(rounded(part) for part in moved.groups() if part)
        return ROUNDED in how or how.startswith("arith.constant dense<0.000000e+00>")

    for name, how in re.findall(r"^\s*(%[\w#]+) = (.*)", ttir, re.MULTILINE):  # in order: regions may repeat names
        made[name] = how
        product = re.match(r"tt\.dot (%[\w#]+), (%[\w#]+), .*inputPrecision = tf32", how)
        if product:
            products += 1
            if not all(map(rounded, product.groups())):
                found.append(how)
    assert products or "tt.dot" not in ttir
    return found


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if "triton" in op.why_not])
def test_every_operand_of_a_product_in_tf32_is_rounded(audit, op, monkeypatch):
    kernels = set()
    for unit in structures(audit, op):
        assert not unrounded(first_stage(audit, unit, monkeypatch)), unit
        kernels.add(unit.kernel)
    assert len(kernels) >= (2 if OPS[op].has_backward("triton") else 1)


def test_only_tf32_rounds_operands(audit):
    count = {}
    for name in ("tf32", "fp32", "bf16"):
        unit, row = next(
            iter(audit.plan(["sm_80"], [name], False, "forward_slices .* 48 ", ["mobile_to_former"]).items())
        )
        assert row["dtype"] == name
        ptx = compiled(audit, unit).asm["ptx"]
        count[name] = ptx.count("cvt.rna.tf32.f32")
        assert bool(re.search(r"\bmma\.sync\S*\.tf32", ptx)) == (name == "tf32")
    assert count["tf32"] > 0 and count["fp32"] == count["bf16"] == 0
