"""Argument checks shared by the ops.

They run before any kernel and cost about a microsecond each. A message is one line: the op, the argument, what was
found, what is expected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

import torch

from mvkernels.dispatch.exporting import exporting

# A patch as large as the map makes every pixel its own group, a larger one too; and likewise with windows. With more
# than this, kernels' integers would overflow.
LARGEST = 2**31 - 1

any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
"""Whether autocast is on for any device."""

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# Subclasses whose layout is strided although they are not dense: without storage yet, or with a mask.
_NOT_DENSE = (torch.nn.parameter.UninitializedTensorMixin, torch.masked.MaskedTensor)  # type: ignore[attr-defined]

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensors(op: str, **named: Any) -> None:
    """Every value is a dense tensor of one floating dtype on one device.

    Raises TypeError (not a tensor, or not float16, bfloat16, float32, float64) or ValueError
    (mixed dtypes or devices).
    """
    first = None
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}, want a torch.Tensor")
        if value.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} has dtype {short(value.dtype)}, want float16, bfloat16, float32 or float64")
        if value.layout is not torch.strided:
            raise TypeError(f"{op}: {name} has layout {short(value.layout)}, want a dense (strided) tensor")
        if value.is_nested or isinstance(value, _NOT_DENSE):
            kind = "nested tensor" if value.is_nested else type(value).__name__
            raise TypeError(f"{op}: {name} is a {kind}, want a dense (strided) tensor")
    for name, value in named.items():
        if first is None:
            first, first_name = value, name
        elif value.dtype != first.dtype:
            raise ValueError(
                f"{op}: {name} has dtype {short(value.dtype)}, {first_name} has {short(first.dtype)}, want one dtype"
            )
        elif value.device != first.device:
            raise ValueError(f"{op}: {name} is on {value.device}, {first_name} is on {first.device}, want one device")


def alike(first: Any, *others: Any) -> bool:
    """Whether all arguments pass :func:`tensors`: a fast test for the usual case."""
    if type(first) not in _PLAIN and not _dense(first):
        return False
    dtype, device = first.dtype, first.device
    # A nested tensor may be of the usual class, and have the usual layout.
    if dtype not in FLOATING or first.layout is not torch.strided or first.is_nested:
        return False
    for other in others:
        if not (
            (type(other) in _PLAIN or _dense(other))
            and other.dtype == dtype
            and other.device == device
            and other.layout is torch.strided
            and not other.is_nested
        ):
            return False
    return True


def _dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, _NOT_DENSE)


def rank(op: str, name: str, value: torch.Tensor, axes: str) -> None:
    """The tensor has as many axes as ``axes`` names, as in "(B, heads, head_dim, H, W)"."""
    wanted = axes.count(",") + 1
    if value.dim() != wanted:
        raise ValueError(f"{op}: {name} has {value.dim()} axes {shape(value)}, want {wanted}: {axes}")


def same(op: str, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor, axes: Sequence[int]) -> None:
    """The two tensors have the same sizes along ``axes``."""
    for axis in axes:
        if value.shape[axis] != other.shape[axis]:
            raise ValueError(
                f"{op}: {name} is {shape(value)}, {other_name} is {shape(other)}: they differ along axis {axis}"
            )


def exactly(op: str, name: str, value: torch.Tensor, axes: str, size: Sequence[int]) -> None:
    """The tensor has these axes, as "(B, C, H, W)" names them, of this size."""
    rank(op, name, value, axes)
    if value.shape != torch.Size(size):
        raise ValueError(f"{op}: {name} is {shape(value)}, want {tuple(size)}")


def map_of(op: str, value: torch.Tensor, channels: int) -> None:
    """The input x of a module is a map (B, channels, H, W)."""
    if value.dim() != 4 or value.shape[1] != channels:
        raise ValueError(f"{op}: x is {shape(value)}, want (B, {channels}, H, W)")


def not_empty(op: str, name: str, value: torch.Tensor, **axes: int) -> None:
    """The named axes (``H=3``) are not of size 0."""
    for axis_name, axis in axes.items():
        if value.shape[axis] == 0:
            raise ValueError(f"{op}: {name} is {shape(value)}: {axis_name} is 0, want at least 1")


def pair(op: str, name: str, value: Any, least: int = 1, most: int | None = LARGEST) -> tuple[int, int]:
    """The pair that ``value`` stands for: an int or a pair of ints, each at least ``least``, cut to ``most``."""
    both = (value, value) if isinstance(value, int) else value
    if not isinstance(both, (tuple, list)) and isinstance(value, Integral):  # NumPy's
        both = (int(value), int(value))
    if not isinstance(both, (tuple, list)) or len(both) != 2:
        kind = TypeError if not isinstance(both, (tuple, list)) else ValueError
        raise kind(f"{op}: {name} is {value!r}, want an int or a pair of ints")
    for part in both:
        if not isinstance(part, (int, Integral)) or isinstance(part, bool):
            raise TypeError(f"{op}: {name} is {value!r}, want an int or a pair of ints")
        if part < least:
            raise ValueError(f"{op}: {name} is {value!r}, want at least {least}")
    # index(): a compiler takes a number that says what to compute as it is, and does not leave it open.
    first, second = index(both[0]), index(both[1])
    return (first, second) if most is None else (min(first, most), min(second, most))


def stride(op: str, value: Any) -> int:
    """The stride of a convolution, 1 or 2."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: stride is {value!r}, want 1 or 2")
    if value not in (1, 2):
        raise ValueError(f"{op}: stride is {value}, want 1 or 2")
    return index(value)


def sequence(op: str, name: str, value: Any) -> None:
    """A list, a tuple or another sequence of tensors, such as a ParameterList; not a single tensor."""
    if isinstance(value, (torch.Tensor, str, bytes, dict)) or not (
        hasattr(value, "__len__") and hasattr(value, "__getitem__")
    ):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, want a list of tensors")


def number(op: str, name: str, value: Any, default: float) -> float:
    """A real number, or ``default`` for None."""
    if value is None:
        return default
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r}, want a number or None")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} is too large for a float") from None


def has_autocast(device: str) -> bool:
    """Whether a device type has autocast.

    CPUs and CUDA do, and torch is not asked: Dynamo of torch 2.9 and 2.10 cannot trace the question.
    """
    return device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)


def autocast_on(device: str) -> bool:
    """Whether autocast is on for a device type."""
    return has_autocast(device) and torch.is_autocast_enabled(device)


def autocast(*values: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Inside ``torch.autocast`` cast float32 and half inputs to its dtype, as scaled_dot_product_attention does."""
    # One test for all devices, usually false. Dynamo traces the longer way.
    if not torch.compiler.is_compiling() and not any_autocast():
        return values
    first = values[0]
    if not isinstance(first, torch.Tensor):
        return values
    device = first.device.type
    if not autocast_on(device):
        return values
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dtype != torch.float64 else v
        for v in values
    )


def without_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast is off for a device type. Where it is off already nothing is added to an export."""
    return torch.autocast(device, enabled=False) if autocast_on(device) else contextlib.nullcontext()


def known(condition: Any) -> bool:
    """Whether a condition on sizes or strides holds. In an export: whether it holds for all sizes.

    Otherwise the exported graph would be limited to the sizes for which the condition has the same value.
    """
    if not exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a second to import

    return statically_known_true(condition)


def channels_last(value: torch.Tensor) -> bool:
    """Whether a map (B, heads, head_dim, H, W), or (B, C, H, W), has its channels innermost."""
    return known(value.stride(-3) == 1)


def empty_map(like: torch.Tensor, head_dim: int) -> torch.Tensor:
    """An uninitialised map of ``like``'s sizes and memory layout, with another head_dim.

    Dense in the order (B, H, W, heads, head_dim) if ``like``'s stride over head_dim is 1, else in
    (B, heads, head_dim, H, W). A map of four axes (B, C, H, W) counts as one head of C channels.
    Both the kernels and their fake implementations use this function.
    """
    if like.dim() == 4:
        b, _, height, width = like.shape
        if channels_last(like):
            return like.new_empty((b, height, width, head_dim)).permute(0, 3, 1, 2)
        return like.new_empty((b, head_dim, height, width))
    b, h, _, height, width = like.shape
    if channels_last(like):
        return like.new_empty((b, height, width, h, head_dim)).permute(0, 3, 4, 1, 2)
    return like.new_empty((b, h, head_dim, height, width))


def lay_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``value`` in the memory layout of ``empty_map(like)``; without a copy if it has that layout already."""
    if like.dim() == 4:
        return lay_as(value.unsqueeze(1), like.unsqueeze(1)).squeeze(1)
    if exporting():  # strides of axes of size 1 are not worth a node, nor a guard on the sizes
        if channels_last(like):
            return value.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        return value.contiguous()
    # Through one axis and back: contiguous() alone leaves the strides of axes of size 1 as they are.
    if channels_last(like):
        b, h, d, height, width = value.shape
        dense = value.permute(0, 3, 4, 1, 2).contiguous().flatten()
        return dense.view(b, height, width, h, d).permute(0, 3, 4, 1, 2)
    return value.contiguous().flatten().view(value.shape)


def shape(value: torch.Tensor) -> str:
    return "(" + ", ".join(str(size) for size in value.shape) + ("," if value.dim() == 1 else "") + ")"


def short(value: Any) -> str:
    return str(value).removeprefix("torch.")
