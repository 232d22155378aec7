"""Which unit of a processor an instruction needs, and for how many cycles of it."""

from __future__ import annotations

from collections import defaultdict

from _model.counts import Executions
from _model.sass import Instruction
from _model.warps import matrix_cycles

# Lanes a cycle of a processor: CUDA C++ Programming Guide, throughput of native arithmetic instructions, 8.0 and 9.0;
# which pipe has which instruction: Nsight Compute, metrics decoder, pipelines. IMAD has half of the FMA pipe.
FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"}
HEAVY = {"IMAD", "IDP", "IMUL"}
SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "POPC", "BREV", "FLO", "FRND", "I2I"}
EXCHANGE = {"SHFL"}
SHARED = {"LDS", "STS", "LDSM", "STSM"}
GLOBAL = {"LDG", "STG", "LDGSTS", "LD", "ST", "LDL", "STL"}
MATRIX = {"HMMA", "HGMMA", "IMMA", "DMMA", "QGMMA"}
DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP"}
CONTROL = {"BRA", "EXIT", "BAR", "NOP", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "RET",
           "CALL", "LDGDEPBAR", "WARPGROUPSET", "ERRBAR", "CCTL", "YIELD", "BREAK", "S2R", "S2UR", "CS2R", "LDC",
           "ULDC", "VOTE", "VOTEU", "R2UR"}  # fmt: skip
CYCLES = {"fma": 1.0, "heavy": 2.0, "alu": 2.0, "uniform": 2.0, "special": 8.0, "double": 2.0}
"""Of a scheduler's pipe, for an instruction of a warp of 32."""


def unit_of(each: Instruction) -> str:
    """The class of an instruction."""
    base = each.base
    for name, known in (("fma", FMA), ("heavy", HEAVY), ("special", SPECIAL), ("exchange", EXCHANGE),
                        ("shared", SHARED), ("global", GLOBAL), ("matrix", MATRIX), ("double", DOUBLE),
                        ("control", CONTROL)):  # fmt: skip
        if base in known:
            return name
    return "uniform" if base[0] == "U" else "alu"


def instructions(executions: Executions) -> dict[str, float]:
    """Of a warp, by class."""
    return executions.by(unit_of)


def pipes(executions: Executions) -> dict[str, float]:
    """Cycles that a warp needs of each pipe of its scheduler, and to issue."""
    by = instructions(executions)
    found: dict[str, float] = defaultdict(float, issue=sum(by.values()))
    found["fma"] = by.get("fma", 0.0) + by.get("heavy", 0.0)
    for name in ("heavy", "alu", "uniform", "special", "double"):
        found[name] += CYCLES[name] * by.get(name, 0.0)
    matrix = executions.by(lambda each: (each.name, matrix_cycles(each)) if unit_of(each) == "matrix" else None)
    found["matrix"] = sum(cycles * count for (_, cycles), count in matrix.items())
    return dict(found)
