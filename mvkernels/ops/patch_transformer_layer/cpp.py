"""The layer at inference, of the C++ kernels of other ops: four products on packed weights, and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks
from mvkernels.ops.common import activations
from mvkernels.ops.common import packed as weights
from mvkernels.ops.patch_attention import OP as PATCH_ATTENTION
from mvkernels.ops.patch_attention import patch_attention
from mvkernels.ops.pointwise import forward as product
from mvkernels.ops.pointwise import pack as pack_product
from mvkernels.ops.pointwise import packed_size as product_size

Multiply = Callable[..., Tensor]
"""Of a channels-last map (B, C, H, W), and perhaps another that is added to the result."""


def of_products(
    x: Tensor,
    queries: Multiply,
    projection: Multiply,
    widen: Multiply,
    narrow: Multiply,
    heads: int,
    patch_size: tuple[int, int],
    scale: float | None,
    backend: str | None,
) -> Tensor:
    """The layer on a map x (B, C, H, W), given its products.

    ``queries`` makes the channels [q | k | v], norm and all; ``widen`` is norm, product and activation. ``projection``
    and ``narrow`` add what they are given. No map is copied: query, key and value are slices of one, and the attention
    lies as ``projection`` reads it.
    """
    query, key, value = queries(x).unflatten(1, (3, heads, -1)).unbind(1)
    attended = patch_attention(query, key, value, patch_size, scale=scale, backend=backend)
    x = projection(attended.flatten(1, 2), x)
    return narrow(widen(x), x)


def forward(x: Tensor, *rest: Any) -> Tensor:
    """The op on its checked arguments."""
    *parameters, heads, patch_size, eps, scale, activation, packed = rest
    each = _packs(*parameters) if packed is None else packed.split(_sizes(parameters))
    of_qkv, of_proj, of_fc1, of_fc2 = each
    channels, hidden, code = x.shape[1], parameters[8].shape[0], activations.CODES[activation]
    out = of_products(
        _rows(x),
        lambda x: product(x, of_qkv, 3 * channels, True, eps, 0, None),
        lambda x, plus: product(x, of_proj, channels, False, 0.0, 0, plus),
        lambda x: product(x, of_fc1, hidden, True, eps, code, None),
        lambda x, plus: product(x, of_fc2, channels, False, 0.0, 0, plus),
        heads,
        patch_size,
        scale,
        "cpp",
    )
    return checks.lay_as(out, x)


def _rows(x: Tensor) -> Tensor:
    """x as both products read it that read it, so that they do not copy it twice.

    Of a storage that was freed they say so themselves, before they read it.
    """
    if x.stride(1) == 1 or not (torch.compiler.is_compiling() or x.untyped_storage().nbytes()):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def pack(*parameters: Tensor | None) -> Tensor:
    """The op's parameters, in order, as one tensor: what each product packs of its own, one behind the other.

    Each is whole panels, so that each begins at a multiple of 64 bytes.
    """
    return torch.cat(_packs(*parameters))


def packed_size(*parameters: Tensor | None) -> int:
    """Elements of :func:`pack` of these parameters."""
    return sum(_sizes(parameters))


def _sizes(parameters: Sequence[Any]) -> list[int]:
    return [product_size(parameters[i]) for i in (2, 4, 8, 10)]


def _packs(*parameters: Any) -> tuple[Tensor, ...]:
    norm1, qkv, proj, norm2, fc1, fc2 = (parameters[i : i + 2] for i in range(0, 12, 2))
    return (
        pack_product(*qkv, True, *norm1),
        pack_product(*proj, False, None, None),
        pack_product(*fc1, True, *norm2),
        pack_product(*fc2, False, None, None),
    )


def why_not(x: Tensor, *rest: Any) -> str | None:
    """Why these kernels cannot run the op's checked arguments, or None if they can."""
    heads, patch_size, _, scale = rest[12:16]
    reason = weights.why_not_recorded(x, *rest) or weights.why_not(x)
    if reason:
        return reason
    maps = x.unflatten(1, (heads, -1))
    return PATCH_ATTENTION.why_not["cpp"](maps, maps, maps, patch_size, None, scale)
