"""The optional C++ extension ``mvkernels._C``: the loaded module, or the reason why there is none."""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

import torch

# The contract between this Python code and the compiled ops (their schemas). Raised together with
# kInterface in csrc/cpu/register.cpp, so that a stale build is refused and not misread.
INTERFACE = 14
# The first torch whose stable C interface has all functions that the extension uses. 2.9 lacks torch_library_impl,
# torch_parallel_for, torch_get_num_threads and the five for lists, of those in release/torch_symbols.txt.
MINIMUM_TORCH = (2, 10)


def _load() -> tuple[ModuleType | None, str]:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        return None, (
            f"the C++ extension needs torch {wanted} or newer: the C interface of torch {torch.__version__} lacks 8 of "
            f"the 26 functions that it uses; install torch>={wanted}, until then the reference and Triton run"
        )
    try:
        module = importlib.import_module("mvkernels._C")
    except ModuleNotFoundError:
        return None, "the C++ extension is not built (no compiler at install, or MVKERNELS_SKIP_EXT=1)"
    except (ImportError, OSError) as error:
        return None, f"the C++ extension cannot be loaded: {' '.join(str(error).split())}"
    if module.interface() != INTERFACE:
        return None, (
            f"the C++ extension was built for interface {module.interface()}, but this package has interface "
            f"{INTERFACE}: reinstall mvkernels"
        )
    return module, ""


module, reason = _load()
"""The module, or None and the reason in one line."""


# Above this, the rounding error of a sum over head_dim can exceed the error criterion.
_MOST_HEAD_DIM = 256


def why_not(tensor: torch.Tensor, **dims: int) -> str | None:
    """Why the C++ kernels cannot run on ``tensor`` with these ``dims`` (as in ``head_dim=36``), or None if they can."""
    if module is None:
        return reason
    if not tensor.is_cpu:
        return f"the C++ kernels run on CPU tensors, but these tensors are on {tensor.device.type}"
    for size in dims.values():
        if size > _MOST_HEAD_DIM:
            found = ", ".join(f"{name} {size}" for name, size in dims.items()).replace(" ", " is ", 1)
            return f"{found}, want at most {_MOST_HEAD_DIM}"
    return None


def build_info() -> dict[str, Any]:
    """Compiler, flags, torch version and instruction sets of the extension's build; empty without the extension."""
    return json.loads(module.build_info()) if module is not None else {}


def instruction_set() -> str:
    """The instruction set in use: "baseline", "avx2", "avx512", "neon"; empty without the extension."""
    return module.instruction_set() if module is not None else ""
