"""Small pictures in folders, a colour for each class."""

from __future__ import annotations

from pathlib import Path

import numpy
from PIL import Image

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 30), "red": (220, 30, 40)}


def write(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (24, 20)) -> None:
    """A noisy picture of one colour; ``size`` is (width, height)."""
    noise = numpy.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((numpy.array(colour) + noise).clip(0, 255).astype("uint8")).save(path)


def folder(root: Path, count: int = 6) -> Path:
    """``count`` pictures of each colour under ``root``."""
    for label, (name, colour) in enumerate(COLOURS.items()):
        for i in range(count):
            write(root / name / f"{i}.png", colour, 100 * label + i)
    return root
