"""``ShiftedWindowAttention`` and ``ShiftedWindowAttentionV2`` of torchvision: their windows, in place.

The original hands the weights of ``qkv`` and ``proj`` to a function and never calls these modules, so that their hooks
do not run. That is so here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from mvkernels.swap.eligibility import asked, drops_attention, log_once, not_its_own, replaced, unusual_call
from mvkernels.swap.packing.kinds import sizes_of
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.windows import not_continuous, projections
from mvkernels.swap.swapped import Swapped
from mvkernels.swap.windows import attend_in_windows, gathered, maps_of, other_windows


def why_not(module: Any) -> str:
    """Why the fused form cannot replace this attention in its current state; empty if it can."""
    kind = module.mvk_original if isinstance(module, Swapped) else type(module)
    return replaced(kind, "forward", "get_relative_position_bias") or not_its_own(module, "get_relative_position_bias")


def _declines(self: Any, x: Tensor) -> str:
    reason = unusual_call(x) or asked(why_not, self) or drops_attention(self, self.attention_dropout)
    reason = reason or _other(x, *_windows(self))
    if reason:
        log_once(self, reason)
    return reason


def _windows(self: Any) -> tuple[list[int], list[int], Tensor]:
    """What says which windows there are. The lists may be changed in place."""
    return self.window_size, self.shift_size, self.relative_position_index


def _other(x: Tensor, window: list[int], shift: list[int], index: Tensor) -> str:
    return other_windows(tuple(window), _shift(x, window, shift), index)


def _shift(x: Tensor, window: list[int], shift: list[int]) -> tuple[int, ...]:
    """The shift on a map x (B, H, W, C): none along an axis where one window holds the padded map."""
    return tuple(0 if side <= size else by for side, size, by in zip(x.shape[1:3], window, shift))


def _attend(self: Any, x: Tensor, bias: Tensor | None, biases: Tensor, logit_scale: Tensor | None = None) -> Tensor:
    """``bias`` is that of the projections, ``biases`` (heads, N, N) are those of the positions."""
    return attend_in_windows(
        x,
        tuple(self.window_size),  # type: ignore[arg-type]
        _shift(x, self.window_size, self.shift_size),
        lambda x: maps_of(linear(x, self.qkv.weight, bias), self.num_heads),
        biases,
        lambda x: dropout(linear(x, self.proj.weight, self.proj.bias), self.dropout, self.training),
        logit_scale=logit_scale,
        backend=self.mvk_backend,
    )


def _plan(self: Any, bias: Tensor | None, biases: Tensor, keep: Keep, logit_scale: Tensor | None = None) -> Run | None:
    """:func:`_attend` on packed weights."""
    products = None if self.training or asked(why_not, self) else projections(self, bias, (), keep)
    if products is None:
        return None
    project, out = products
    windows, heads, backend = _windows(self), self.num_heads, self.mvk_backend
    biases = keep(biases)

    def run(x: Tensor) -> Tensor:
        reason = _other(x, *windows)
        if reason:
            raise RuntimeError(reason)
        window, shift, _ = windows
        return attend_in_windows(
            x,
            tuple(window),
            _shift(x, window, shift),
            lambda x: maps_of(project(x), heads),
            biases,
            out,
            logit_scale=logit_scale,
            backend=backend,
        )

    return run


def _gathered(self: Any, table: Tensor) -> Tensor:
    """Position biases (heads, N, N) of a table (offsets, heads)."""
    size = math.prod(self.window_size)
    return gathered(table.t(), self.relative_position_index.view(size, size))


class SwappedAttention(Swapped):
    """A ``ShiftedWindowAttention`` that calls :func:`mvkernels.window_attention`: without roll, partition and mask."""

    mvk_methods = ("_conv_forward", "get_relative_position_bias")

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Rows of the projection's features."""
        return sizes_of(self.proj)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        return _plan(self, self.qkv.bias, _gathered(self, self.relative_position_bias_table), keep)

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        if _declines(self, x):
            return ShiftedWindowAttention.forward(self, x)
        return _attend(self, x, self.qkv.bias, _gathered(self, self.relative_position_bias_table))


def _bias_of_v2(self: Any) -> Tensor | None:
    """That of the projections: keys have none, whatever the parameter says."""
    bias: Tensor | None = self.qkv.bias
    if bias is None:
        return None
    query, key, value = bias.chunk(3)
    return torch.cat((query, torch.zeros_like(key), value))


def _biases_of_v2(self: Any) -> Tensor:
    table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
    return _gathered(self, 16 * torch.sigmoid(table))


class SwappedAttentionV2(Swapped):
    """A ``ShiftedWindowAttentionV2`` that calls :func:`mvkernels.window_attention`."""

    mvk_methods = ("_conv_forward", "get_relative_position_bias")

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Rows of the projection's features."""
        return sizes_of(self.proj)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights."""
        if not_continuous(self.cpb_mlp):
            return None
        return _plan(self, _bias_of_v2(self), _biases_of_v2(self), keep, self.logit_scale)

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        if _declines(self, x):
            return ShiftedWindowAttentionV2.forward(self, x)  # type: ignore[no-any-return]
        return _attend(self, x, _bias_of_v2(self), _biases_of_v2(self), self.logit_scale)


_FORMS: dict[type, type[Swapped]] = {
    ShiftedWindowAttention: SwappedAttention,
    ShiftedWindowAttentionV2: SwappedAttentionV2,
}


def form(module: Any) -> type[Swapped]:
    """The fused form of a module of one of these classes."""
    return _FORMS[type(module)]
