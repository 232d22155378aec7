"""A random block in a model, and what goes into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mvkernels.swap import eligibility
from mvkernels.swap.report import original_of
from tests.swap.conftest import randomise

Draw = Callable[[st.SearchStrategy], Any]
BATCH_NORM = functional.batch_norm


class ChannelsFirst(nn.Module):
    """Lays out (B, ..., C) in memory as (B, C, ...): so does a convolution before a permutation."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1).contiguous().movedim(1, -1)


def right_batch_norms(mended: Callable[[], bool]) -> Any:
    """PyTorch's is wrong on some layouts of the gradient of one sample, which the originals make.

    Two numbers become 1 and -1, whatever they are. The gradients are then the difference of two large ones: nothing but
    rounding errors in half types.
    """

    def contiguous(grad: Tensor) -> Tensor | None:
        return grad.clone(memory_format=torch.contiguous_format) if mended() else None

    def batch_norm(x: Tensor, *args: Any) -> Tensor:
        if args[4] and x.element_size() == 2 and x.numel() <= 2 * x.shape[1]:
            raise ValueError("a batch norm has two numbers of a half type to learn from")
        out = BATCH_NORM(x, *args)
        if out.requires_grad:
            out.register_hook(contiguous)
        return out

    return mock.patch.object(functional, "batch_norm", batch_norm)


class Model(nn.Module):
    """A block after a layer and a norm, as models have it: the block's input has a gradient of its own."""

    def __init__(self, stem: nn.Module, block: nn.Module, given: dict[str, Any]) -> None:
        super().__init__()
        self.stem, self.block, self.given = stem, block, given

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        with right_batch_norms(lambda: original_of(self.block) is None or bool(eligibility._logged)):
            x = self.stem(x)
        # The fused form calls the block's own as the original does, and PyTorch would be wrong in both.
        with right_batch_norms(lambda: True):
            return self.block((x, *more)) if more else self.block(x, **self.given)


@dataclass(repr=False)
class Drawn:
    """A block, the channels of its input, and the shapes of what goes in beside the batch."""

    block: nn.Module
    channels: int
    sides: tuple[int, ...]
    """Of the map, or one number of tokens."""
    tokens: tuple[int, int] | None = None
    """For bridges: number and width of the tokens that come with the map."""
    rounds: bool = False
    """Whether the original attends in float32, whatever the dtype."""
    free: tuple[str, ...] = ()
    """The parts that the fused form calls as they are, whatever is done to them."""
    last: bool = False
    """Whether the map has its channels last, (B, H, W, C), as tokens always have."""
    turned: bool = False
    """Whether what has its channels last has them first in memory."""
    given: dict[str, Any] = field(default_factory=dict)
    """What else a call is given."""

    def __repr__(self) -> str:
        settings = {n: v for n, v in self.block.__dict__.items() if isinstance(v, (int, float, str, tuple))}
        more = {"tokens": self.tokens, "turned": self.turned, **self.given}
        return f"{type(self.block).__name__}({settings}), {self.channels} channels, {self.sides}, {more}"

    @property
    def _last(self) -> bool:
        return self.last or len(self.sides) == 1

    def model(self, dtype: torch.dtype) -> Model:
        if self._last:
            stem = nn.Sequential(nn.Linear(5, self.channels), nn.LayerNorm(self.channels))
            if self.turned:
                stem.append(ChannelsFirst())
        else:
            stem = nn.Sequential(nn.Conv2d(3, self.channels, 1, bias=False), nn.BatchNorm2d(self.channels))
        model = Model(stem, self.block, self.given)
        randomise(model)
        return model.to(dtype)

    def inputs(self, batch: int, dtype: torch.dtype, channels_last: bool, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        if self._last:
            return [normal(batch, *self.sides, 5)]
        x = normal(batch, 3, *self.sides)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return [x] if self.tokens is None else [x, normal(self.tokens[0], batch, self.tokens[1])]


def sides(draw: Draw, least: int = 1) -> tuple[int, int]:
    return draw(st.integers(least, 8)), draw(st.integers(least, 8))
