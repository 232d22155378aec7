"""ReLU linear attention of one map whose pixels are divided among processes.

All that a pixel needs of the others are two sums over them, of k vᵀ and of k, and sums add up: every rank sums its own
pixels, one all-reduce of head_dim + 1 rows of head_dim numbers for each head makes the sums of the whole map, and every
rank computes its own pixels from them. Nothing that grows with the map is sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mvkernels.dispatch.backend import BackendUnavailable, requested
from mvkernels.dispatch.checks import lay_as, without_autocast

_NAME = "relu_linear_attention"


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, on every rank.

    The loss is the sum of all ranks' losses, and each depends on each rank's tensor through the sum: so the gradient of
    a rank's tensor is the sum of what the ranks have for the sum.
    """

    @staticmethod
    def forward(value: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        from torch.distributed import _functional_collectives as collectives

        return collectives.wait_tensor(collectives.all_reduce(value, "sum", group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum_over_ranks(grad.contiguous(), ctx.group), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], value: Tensor, group: Any) -> tuple[Tensor, int]:  # type: ignore[override]
        return _sum_over_ranks(value.movedim(in_dims[0], 0).contiguous(), group), 0


class _SumOverRanksForwardMode(_SumOverRanks):
    """With a forward-mode derivative, which the compiler does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        return _sum_over_ranks(tangent.contiguous(), ctx.group)


def _sum_over_ranks(value: Tensor, group: Any) -> Tensor:
    kind = _SumOverRanks if torch.compiler.is_compiling() else _SumOverRanksForwardMode
    return kind.apply(value, group)


def attention(query: Tensor, key: Tensor, value: Tensor, eps: float, group: Any, backend: str | None) -> Tensor:
    """:func:`mvkernels.relu_linear_attention` of checked arguments, over the pixels of all ranks of ``group``.

    Raises TypeError if ``group`` is not a process group or this process is not in it, and BackendUnavailable if a
    backend other than "reference" was asked for.
    """
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        outside = group == dist.GroupMember.NON_GROUP_MEMBER
        found = "a group without this process" if outside else f"a {type(group).__name__}"
        raise TypeError(f"{_NAME}: process_group is {found}, want a torch.distributed.ProcessGroup with this process")
    name = requested(backend)
    if name not in ("auto", "reference"):
        raise BackendUnavailable(
            f"{_NAME}: backend {name} cannot run this: with a process_group only backend 'reference' can"
        )
    sums = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query.device.type):
        q, k, v = (m.flatten(3).to(sums) for m in (query, key, value))
        q, k = q.relu(), k.relu()
        local = torch.cat((v @ k.transpose(-2, -1), k.sum(-1).unsqueeze(-2)), dim=-2)  # (B, h, D + 1, D)
        total = _sum_over_ranks(local.contiguous(), group) @ q
        out = total[..., :-1, :] / (total[..., -1:, :] + eps)
        return lay_as(out.to(query.dtype).unflatten(3, query.shape[3:]), query)
