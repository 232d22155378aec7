"""Batches whose size follows the picture's: MobileViT's multi-scale training (arXiv 2110.02178, section 3.2)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

Item = tuple[int, int, int]
"""What the sampler yields for a picture: its index, and the height and width that the batch wants."""


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """(h, w) of a size given as one number or as two. Raises ValueError below 1."""
    h, w = (value, value) if isinstance(value, int) else value
    if h < 1 or w < 1:
        raise ValueError(f"{name} is {value}, want at least 1")
    return h, w


def _divisible(value: float, divisor: int) -> int:
    """The nearest multiple of ``divisor``, halves upwards, and one more where that would lose over a tenth."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def multi_scale_sizes(
    batch_size: int,
    base: int | tuple[int, int] = 256,
    minimum: int | tuple[int, int] = 160,
    maximum: int | tuple[int, int] = 320,
    scales: int = 5,
    divisor: int = 32,
    variable: bool = True,
) -> list[tuple[int, int, int]]:
    """The (height, width, batch) that multi-scale training draws from, smallest first.

    ``scales`` sides evenly from ``minimum`` to ``maximum`` and the ``base`` side, each rounded to a multiple of
    ``divisor``; the i-th height goes with the i-th width. With ``variable`` a batch holds as many pixels as
    ``batch_size`` pictures of the base size, hence more of the small ones; else it is always ``batch_size``.

    As in the published code, the base size is among them only where it is a multiple of ``divisor``, and where one
    side's base is one of its evenly spaced sides and the other's is not, the largest of the longer list has no
    partner. Raises ValueError for a number below 1 and a minimum above its maximum.
    """
    for name, value in (("batch_size", batch_size), ("scales", scales), ("divisor", divisor)):
        if value < 1:
            raise ValueError(f"multi_scale_sizes: {name} is {value}, want at least 1")
    base_h, base_w = pair(base, "multi_scale_sizes: base")
    lowest, highest = pair(minimum, "multi_scale_sizes: minimum"), pair(maximum, "multi_scale_sizes: maximum")
    sides = []
    for side, low, high in zip((base_h, base_w), lowest, highest):
        if low > high:
            raise ValueError(f"multi_scale_sizes: minimum is {low}, above the maximum of {high}")
        step = (high - low) / (scales - 1) if scales > 1 else 0.0
        sides.append(sorted(_divisible(v, divisor) for v in {*(low + i * step for i in range(scales)), float(side)}))
    sizes = set()
    for h, w in zip(*sides):
        batch = max(1, int(round(base_h * base_w * batch_size / (h * w), 2))) if variable else batch_size
        sizes.add((h, w, batch))
    return sorted(sizes)


class MultiScaleBatchSampler(Sampler[list[Item]]):
    """A batch sampler that draws a picture size for every batch, and with it the number of pictures.

    Yields lists of ``(index, height, width)``, all of one size in a batch, for a dataset whose items are taken by such
    triples: :class:`Resized` makes one of any other. Used as ``DataLoader(dataset, batch_sampler=sampler)``.

    Every rank of a process group draws the same size at each step, since the draws depend on ``seed`` and epoch
    alone; the pictures are dealt out to ranks in turn, with as many for each, and as many steps. The last batch is
    filled from the front of the rank's share, so that no batch is smaller than it should be.

    Args:
        data: the data set, or how many pictures there are.
        batch_size: pictures of ``base`` size in a batch of one rank.
        sizes: the (height, width, batch) to draw from; by default ``multi_scale_sizes(batch_size, **scales)``.
        shuffle: a new order in every epoch, else the data set's.
        ranks, rank: default to those of the process group, and to 1 and 0 without one.
        seed: of order and sizes.
        scales: base, minimum, maximum, scales, divisor and variable of :func:`multi_scale_sizes`.

    :meth:`set_epoch` before each epoch, as with torch's DistributedSampler; ``len()`` is the number of batches in
    that epoch, which differs from one to the next.
    """

    def __init__(
        self,
        data: Sized | int,
        batch_size: int = 128,
        sizes: list[tuple[int, int, int]] | None = None,
        shuffle: bool = True,
        ranks: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        **scales: Any,
    ) -> None:
        self.length = data if isinstance(data, int) else len(data)
        if self.length < 1:
            raise ValueError("MultiScaleBatchSampler: data is empty")
        self.sizes = multi_scale_sizes(batch_size, **scales) if sizes is None else sorted(sizes)
        if not self.sizes or min(map(min, self.sizes)) < 1:
            raise ValueError(f"MultiScaleBatchSampler: sizes is {sizes}, want (height, width, batch) of at least 1")
        group = dist.is_available() and dist.is_initialized()
        self.ranks = (dist.get_world_size() if group else 1) if ranks is None else ranks
        self.rank = (dist.get_rank() if group else 0) if rank is None else rank
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"MultiScaleBatchSampler: rank is {self.rank} of {self.ranks}")
        self.shuffle, self.seed = shuffle, seed
        self.epoch = self.start = self._handed_out = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Say which epoch comes next, and how many of its batches were used before an interruption."""
        self.epoch, self.start, self._handed_out = epoch, start, start

    def state_dict(self, done: int | None = None) -> dict[str, int]:
        """What :meth:`load_state_dict` needs to go on after ``done`` batches of this epoch.

        By default after those handed out; a DataLoader with workers draws ahead, so say then how many were used.
        """
        return {"epoch": self.epoch, "start": self._handed_out if done is None else done, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises ValueError for a state of another seed."""
        if state["seed"] != self.seed:
            raise ValueError(f"MultiScaleBatchSampler: the state has seed {state['seed']}, the sampler {self.seed}")
        self.set_epoch(state["epoch"], state["start"])

    def draws(self, epoch: int) -> list[tuple[int, int, int]]:
        """The (height, width, batch) of every step of an epoch, the same on all ranks."""
        # Numbers of their own, so that they do not depend on how many were used to shuffle.
        generator = random.Random(f"{self.seed} {epoch} sizes")
        drawn, left = [], math.ceil(self.length / self.ranks)
        while left > 0:
            drawn.append(generator.choice(self.sizes))
            left -= drawn[-1][2]
        return drawn

    def __len__(self) -> int:
        return len(self.draws(self.epoch)) - self.start

    def __iter__(self) -> Iterator[list[Item]]:
        order = list(range(self.length))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch} order").shuffle(order)
        share = math.ceil(self.length / self.ranks)
        mine = [order[i % self.length] for i in range(self.rank, share * self.ranks, self.ranks)]
        at, start = 0, self.start
        # An interrupted epoch is taken up once; the sampler's next pass is a whole one.
        self._handed_out, self.start = start, 0
        for step, (h, w, batch) in enumerate(self.draws(self.epoch)):
            if step >= start:
                self._handed_out = step + 1
                yield [(mine[i % share], h, w) for i in range(at, at + batch)]
            at += batch


class Resized(Dataset[tuple[Tensor, Any]]):
    """A data set of (picture (C, H, W), label) made to take :class:`MultiScaleBatchSampler`'s triples.

    ``resized[index, height, width]`` is the picture at that size, bilinear and antialiased, with its label;
    ``resized[index]`` is the item as it was.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int | Item) -> tuple[Tensor, Any]:
        if isinstance(item, int):
            return self.data[item]
        index, h, w = item
        picture, label = self.data[index]
        if picture.shape[-2:] != (h, w):
            picture = F.interpolate(picture[None], size=(h, w), mode="bilinear", align_corners=False, antialias=True)[0]
        return picture, label
