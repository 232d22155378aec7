"""How an operator takes tensors that vmap has batched: one entry after the other.

PyTorch has two vmaps: ``torch.func.vmap``, and the older one behind ``is_grads_batched=True`` and ``vectorize=True``.
Both have a loop of their own for operators without a rule, and neither loop takes lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_is_batched = torch._C._functorch.is_legacy_batchedtensor


def register(operator: Any, library: torch.library.Library) -> None:
    """Give an operator its rules for both. It must not write into its arguments."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        found = _each(operator, info.batch_size, tree_flatten(in_dims)[0], arguments)
        return found, tree_map(lambda _: 0, found)

    def older_rule(*arguments: Any) -> Any:
        flat, tree = tree_flatten(arguments)
        levels = [_level(value) for value in flat]
        innermost = max(levels)
        dims = [0 if level == innermost else None for level in levels]
        peeled = [value if dim is None else _peel(value, innermost) for value, dim in zip(flat, dims)]
        size = next(value.shape[0] for value, dim in zip(peeled, dims) if dim == 0)
        found = _each(operator, size, dims, tree_unflatten(peeled, tree))
        return tree_map(lambda each: torch._add_batch_dim(each, 0, innermost), found)  # type: ignore[attr-defined]

    torch.library.register_vmap(operator, rule, lib=library)
    library.impl(operator._schema.name, older_rule, "Batched")


def as_a_whole(function: Callable[..., Sequence[Tensor | None]], *values: Tensor | None) -> list[Tensor | None]:
    """``function`` of what the older vmap has batched, with the batch as first axis: a list of as many of the values.

    That vmap is above autograd: what is recorded of a batched tensor itself is lost with it.
    """
    levels = [_level(value) for value in values]
    innermost = max(levels)
    if not innermost:
        return list(function(*values))
    peeled = [_peel(value, level) if level == innermost else value for value, level in zip(values, levels)]
    found = as_a_whole(function, *peeled)
    return [
        torch._add_batch_dim(each, 0, level) if level == innermost else each  # type: ignore[arg-type, attr-defined]
        for each, level in zip(found, levels)
    ]


def _each(operator: Any, size: int, dims: Sequence[int | None], arguments: Any) -> Any:
    """The operator on every entry of its arguments along ``dims`` (by leaf, None: the same for all), stacked."""
    flat, tree = tree_flatten(arguments)
    rows = []
    for i in range(size or 1):  # of no entries one of zeros tells the shapes
        entry = [
            value if dim is None else value.select(dim, i) if size else value.sum(dim) for value, dim in zip(flat, dims)
        ]
        rows.append(operator(*tree_unflatten(entry, tree)))
    columns = zip(*(tree_flatten(row)[0] for row in rows))
    return tree_unflatten([torch.stack(column)[:size] for column in columns], tree_flatten(rows[0])[1])


def _peel(value: Any, level: int, absent: int = 0) -> Tensor:
    """The tensor with its batch of that level as first axis; an axis of ``absent`` entries if it has no such batch."""
    return torch._remove_batch_dim(value, level, absent, 0)  # type: ignore[no-any-return, attr-defined]


def _level(value: Any) -> int:
    """The innermost of the older vmaps that have batched a tensor, 0 if none has."""
    level = 0
    while isinstance(value, Tensor) and _is_batched(value):
        level += 1
        peeled = _peel(value, level)
        if peeled.shape[0] or not _peel(value, level, 1).shape[0]:  # else it has no batch of this level
            value = peeled
    return level
