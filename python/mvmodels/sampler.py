"""Multi-scale training of MobileViT (arXiv 2110.02178, section 3.2): image size and batch size change per batch."""

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
"""What the sampler yields for an image: its index, and the height and width of the batch."""


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
    """The list of (height, width, batch) that multi-scale training draws from, smallest first.

    The sides are the ``base`` side and ``scales`` sides evenly spaced from ``minimum`` to ``maximum``, each rounded to
    a multiple of ``divisor``. The i-th height is paired with the i-th width.

    Args:
        batch_size: number of images of the base size in a batch.
        base, minimum, maximum: side in pixels, or (height, width).
        scales: number of evenly spaced sides.
        divisor: the sides are multiples of this number.
        variable: whether a batch has about as many pixels as ``batch_size`` images of the base size, so more images if
            they are small. Otherwise a batch always has ``batch_size`` images.

    As in the published code, the base size is in the list only if it is a multiple of ``divisor``. If the base is one
    of the evenly spaced sides for only one of height and width, the largest side of the longer list is left out.

    Raises:
        ValueError: a number is less than 1, or a minimum is larger than its maximum.
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
    """A batch sampler that draws an image size, and with it the number of images, for every batch.

    It yields lists of ``(index, height, width)`` with one size per batch. The dataset must take such triples as
    indices; :class:`Resized` wraps any other dataset. Use it as ``DataLoader(dataset, batch_sampler=sampler)``.

    All ranks of a process group draw the same size at each step, because the draws depend on ``seed`` and epoch only.
    The images are distributed to the ranks in turn: every rank gets the same number of images and of steps. The last
    batch is filled up from the beginning of the rank's images.

    Args:
        data: the dataset, or the number of images.
        batch_size: number of images of the ``base`` size in a batch of one rank.
        sizes: list of (height, width, batch) to draw from; by default ``multi_scale_sizes(batch_size, **scales)``.
        shuffle: whether each epoch has a new random order of the images; else the order of the dataset.
        ranks, rank: by default those of the process group; without one, 1 and 0.
        seed: seed of the order and the sizes.
        scales: base, minimum, maximum, scales, divisor and variable of :func:`multi_scale_sizes`.

    Call :meth:`set_epoch` before each epoch, as with torch's DistributedSampler. ``len()`` is the number of batches in
    that epoch; it differs between epochs.

    Raises:
        ValueError: the dataset is empty, a size is less than 1, or the rank is out of range.
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
            raise ValueError(f"MultiScaleBatchSampler: rank is {self.rank}, want 0 <= rank < ranks = {self.ranks}")
        self.shuffle, self.seed = shuffle, seed
        self.epoch = self.start = self._handed_out = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the next epoch, and how many of its batches were already used before an interruption."""
        self.epoch, self.start, self._handed_out = epoch, start, start

    def state_dict(self, done: int | None = None) -> dict[str, int]:
        """The state for :meth:`load_state_dict`, to continue after ``done`` batches of this epoch.

        By default it continues after the batches that the sampler has yielded. A DataLoader with workers draws ahead:
        then pass the number of batches that were used.
        """
        return {"epoch": self.epoch, "start": self._handed_out if done is None else done, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state of :meth:`state_dict`. Raises ValueError if it has another seed."""
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
    """Wraps a dataset of (image (C, H, W), label) so that it takes the triples of :class:`MultiScaleBatchSampler`.

    ``resized[index, height, width]`` is the image, resized to this size (bilinear, antialiased), and its label.
    ``resized[index]`` is the unchanged item.
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
