"""The activations that ops take by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import gelu, hardswish, relu, relu6, silu

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": relu,
    "silu": silu,
    "hardswish": hardswish,
    "gelu": gelu,
    "relu6": relu6,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}
"""PyTorch's functions, in the order of ``Activation`` in csrc/cpu/common/activations.h."""

EXPONENTIAL = ("silu", "gelu", "gelu_tanh")
"""Those that take an exponential."""

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
"""Their numbers for the C++ kernels."""


def check(op: str, name: object) -> None:
    """Raises ValueError if there is no such activation."""
    if name is not None and (not isinstance(name, str) or name not in ACTIVATIONS):
        wanted = ", ".join(repr(each) for each in ACTIVATIONS if each is not None)
        raise ValueError(f"{op}: activation is {name!r}, want {wanted} or None")
