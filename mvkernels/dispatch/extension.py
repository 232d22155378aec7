"""The optional C++ extension ``mvkernels._C``: loaded if it can be, explained if it cannot."""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

import torch

# The contract between this Python code and the compiled ops (their schemas). Raised together with
# kInterface in csrc/cpu/register.cpp, so that a stale build is refused and not misread.
INTERFACE = 7
# The first torch whose stable C interface has parallel_for.
MINIMUM_TORCH = (2, 10)


def _load() -> tuple[ModuleType | None, str]:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        return None, f"the C++ extension needs torch {wanted} or newer, this is torch {torch.__version__}"
    try:
        module = importlib.import_module("mvkernels._C")
    except ModuleNotFoundError:
        return None, "the C++ extension is not built (no compiler at install, or MVKERNELS_SKIP_EXT=1)"
    except (ImportError, OSError) as error:
        return None, f"the C++ extension does not load: {' '.join(str(error).split())}"
    if module.interface() != INTERFACE:
        return None, (
            f"the C++ extension was built for interface {module.interface()}, this package has {INTERFACE}: reinstall"
        )
    return module, ""


module, reason = _load()
"""The module, or None and the reason in one line."""


# Beyond it sums over head_dim in one chain lose what the error criterion allows.
_MOST_HEAD_DIM = 256


def why_not(tensor: torch.Tensor, **dims: int) -> str | None:
    """Why the C++ kernels cannot run on such a tensor, with heads of these ``dims`` (``head_dim=36``), or None."""
    if module is None:
        return reason
    if not tensor.is_cpu:
        return f"the C++ kernels run on CPU tensors, these are on {tensor.device.type}"
    for size in dims.values():
        if size > _MOST_HEAD_DIM:
            found = ", ".join(f"{name} {size}" for name, size in dims.items()).replace(" ", " is ", 1)
            return f"{found}: more than {_MOST_HEAD_DIM}"
    return None


def build_info() -> dict[str, Any]:
    """Compiler, flags, torch and instruction sets that the extension was built with; empty without it."""
    return json.loads(module.build_info()) if module is not None else {}


def instruction_set() -> str:
    """The instruction set in use: "baseline", "avx2", "avx512", "neon"; empty without the extension."""
    return module.instruction_set() if module is not None else ""
