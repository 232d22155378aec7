"""A call of attention inside groups of pixels, without its data. Needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mvkernels.triton.maps import Geometry, Shape
from mvkernels.triton.problem import Problem


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """A call of ``op``. Strides are of ``q``, ``k``, ``v`` and, in the backward, ``g``."""

    op: str
    value_dim: int
    bias: Shape | None
    """Strides of the bias."""
    bias_itemsize: int
    group: tuple[int, int]
    """The size of a patch, or with ``shift`` of a window."""
    shift: tuple[int, int] | None = None
    partners: tuple[int, int] | None = None
    """Height and width of the key and value maps, if they are not the query's."""

    @classmethod
    def of_call(
        cls,
        op: str,
        maps: Sequence[tuple[str, torch.Tensor]],
        bias: torch.Tensor | None,
        group: tuple[int, int],
        shift: tuple[int, int] | None,
        interpreted: bool,
    ) -> AttentionProblem:
        """Of a call on the maps q, k, v and perhaps g, in this order."""
        (_, query), (_, key), (_, value), *_ = maps
        partners = tuple(key.shape[3:])
        return cls.of(
            query, maps, interpreted, op=op, value_dim=value.shape[2], group=group, shift=shift,
            bias=None if bias is None else bias.stride(), bias_itemsize=1 if bias is None else bias.element_size(),
            partners=None if partners == query.shape[3:] else partners,
        )  # fmt: skip

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            self.shape, self.strides, self.dtype.itemsize, self.value_dim, self.group, self.bias, self.bias_itemsize,
            self.shift, self.partners,
        )  # fmt: skip
