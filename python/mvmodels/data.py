"""Pictures with labels: folders of them, and scikit-learn's digits. Files are read with pillow."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from mvkernels.report import UsageError
from mvmodels.sampler import Item

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# A crop for training covers this share of the picture, at this range of width over height.
_CROP_AREA, _CROP_RATIO = (0.35, 1.0), (3 / 4, 4 / 3)


class DataError(UsageError):
    """A picture or a folder that cannot be used; the message is one line and names it."""


class Pictures(Dataset[tuple[Tensor, int]]):
    """A labelled data set whose items are taken by an index or by the sampler's (index, height, width).

    Items are (picture (C, H, W) in float32 from -1 to 1, label). What chance does to one depends on ``seed``, ``epoch``
    and index alone: neither on the order nor on the process that reads it.
    """

    classes: list[str]
    labels: list[int]
    channels: int
    size: int
    """Side of a picture taken by its index alone."""
    epoch = 0

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, h: int, w: int) -> Tensor:
        """The picture as (channels, h, w)."""
        raise NotImplementedError

    def __getitem__(self, item: int | Item) -> tuple[Tensor, int]:
        index, h, w = (item, self.size, self.size) if isinstance(item, int) else item
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return self.load(index, h, w), self.labels[index]


class Digits(Pictures):
    """Scikit-learn's 1797 digits of 8 x 8 pixels, enlarged; a quarter is held out, as many of each digit.

    The draw is always the same. Without ``held_out`` the 1347 to train on, with it the other 450. Raises UsageError
    without scikit-learn.
    """

    channels = 1

    def __init__(self, held_out: bool, size: int = 32) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise UsageError("scikit-learn is not installed: pip install 'mvkernels[train]'") from None
        data = load_digits()
        chosen = train_test_split(range(len(data.target)), test_size=0.25, random_state=0, stratify=data.target)
        indices = chosen[1 if held_out else 0]
        self.pictures = torch.from_numpy(data.images[indices]).float()[:, None] / 8.0 - 1.0
        self.labels = [int(label) for label in data.target[indices]]
        self.classes = [str(digit) for digit in range(10)]
        self.size = size

    def load(self, index: int, h: int, w: int) -> Tensor:
        return F.interpolate(self.pictures[index : index + 1], size=(h, w), mode="bilinear", align_corners=False)[0]


class Folder(Pictures):
    """Pictures in a folder for each class.

    Args:
        files: (path, label) of each picture.
        classes: the labels' names.
        train: crop at random and mirror (``flip``), else the centre of the picture.
        size: side of a picture taken by its index alone.
        channels: 3 for colour, 1 for grey.
        crop: without ``train``, the share of the side that is kept.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        classes: Sequence[str],
        train: bool,
        size: int = 224,
        channels: int = 3,
        flip: bool = True,
        crop: float = 0.875,
        seed: int = 0,
    ) -> None:
        self.files = [path for path, _ in files]
        self.labels = [label for _, label in files]
        self.classes, self.train, self.size, self.channels = list(classes), train, size, channels
        self.flip, self.crop, self.seed = flip, crop, seed

    def load(self, index: int, h: int, w: int) -> Tensor:
        path = self.files[index]
        if not self.train:
            return read_picture(path, h, w, self.channels, self.crop)
        chance = random.Random(f"{self.seed} {self.epoch} {index}")
        picture = _open(path, self.channels)
        width, height = picture.size
        box = random_box(width, height, chance)
        out = _to_tensor(picture, box, h, w)
        return out.flip(-1) if self.flip and chance.random() < 0.5 else out


def read_picture(path: str | os.PathLike[str], h: int, w: int, channels: int = 3, crop: float = 0.875) -> Tensor:
    """The middle of a picture as (channels, h, w) in float32 from -1 to 1.

    ``crop`` is the share of the side that limits it; what is kept has the shape of h x w and is resized (bilinear,
    antialiased). Turned as its EXIF data say. Raises DataError, one line, for what cannot be read.
    """
    picture = _open(Path(path), channels)
    width, height = picture.size
    scale = crop * min(width / w, height / h)
    left, top = max(0.0, (width - w * scale) / 2), max(0.0, (height - h * scale) / 2)  # an ulp below 0 is refused
    return _to_tensor(picture, (left, top, min(width, left + w * scale), min(height, top + h * scale)), h, w)


def random_box(width: int, height: int, chance: random.Random) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a part of a picture, of random area, shape and place."""
    for _ in range(10):
        area = width * height * chance.uniform(*_CROP_AREA)
        ratio = math.exp(chance.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = chance.uniform(0, width - w), chance.uniform(0, height - h)
            return left, top, left + w, top + h
    # A picture too narrow for any of them: its middle.
    w, h = min(width, height * _CROP_RATIO[1]), min(height, width / _CROP_RATIO[0])
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _open(path: Path, channels: int) -> Any:
    """A pillow picture, decoded whole."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UsageError("pillow is not installed: pip install 'mvkernels[train]'") from None
    try:
        with Image.open(path) as picture:
            return _eight_bits(ImageOps.exif_transpose(picture), picture.format).convert(
                "L" if channels == 1 else "RGB"
            )
    # Damaged files surface as any of these, by format.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        why = "no picture that pillow knows" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        if isinstance(error, FileNotFoundError):
            why = "there is no such file"
        raise DataError(f"{path} cannot be read: {' '.join(why.split())}") from None


def _eight_bits(picture: Any, form: str | None) -> Any:
    """The picture, 16 bits made 8: pillow's convert() would cut them off at 255, and leave a white picture."""
    # Older versions of pillow open a PNG of 16 bits as one of 32.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and form == "PNG"):
        return picture.convert("I").point(lambda value: value / 256).convert("L")
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {picture.mode}, whose white is not known; want 8 or 16 bits")
    return picture


def _to_tensor(picture: Any, box: tuple[float, float, float, float], h: int, w: int) -> Tensor:
    from PIL import Image

    resized = picture.resize((w, h), Image.Resampling.BILINEAR, box=box)
    data = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return data.reshape(h, w, -1).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def _scan(root: Path) -> tuple[list[str], list[list[Path]]]:
    """Classes by name and the pictures of each, in order. Raises DataError for a class without any, or no class."""
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror}") from None
    if not folders:
        raise DataError(f"{root} has no classes: want a folder of images for each class in it")
    pictures = []
    for folder in folders:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
        if not files:
            raise DataError(f"{folder} has no pictures in it ({', '.join(sorted(EXTENSIONS))})")
        pictures.append(files)
    return [folder.name for folder in folders], pictures


def folder_data(
    root: str | os.PathLike[str],
    size: int = 224,
    channels: int = 3,
    flip: bool = True,
    held_out: float = 0.1,
    crop: float = 0.875,
    seed: int = 0,
) -> tuple[Folder, Folder]:
    """Data sets to train on and to test on.

    ``root`` has a folder for each class, of which ``held_out`` of the pictures (at least one) is kept for the test, the
    same ones for a seed; or it has ``train`` and ``val`` (or ``test``), each with a folder for each class.

    Raises DataError, one line, for a missing or empty folder, classes that differ, or a class of a single picture
    where some have to be held out.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    settings: dict[str, Any] = {"size": size, "channels": channels, "flip": flip, "crop": crop, "seed": seed}
    other = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    parts: tuple[list[tuple[Path, int]], list[tuple[Path, int]]] = ([], [])
    if (root / "train").is_dir() and other is not None:
        classes, pictures = _scan(root / "train")
        names, held = _scan(other)
        if names != classes:
            odd = sorted({*names} ^ {*classes})
            raise DataError(f"{root}: {odd[0]} is a class in only one of train and {other.name}")
        for label, (first, second) in enumerate(zip(pictures, held)):
            parts[0].extend((path, label) for path in first)
            parts[1].extend((path, label) for path in second)
    else:
        classes, pictures = _scan(root)
        for label, files in enumerate(pictures):
            if len(files) < 2:
                raise DataError(f"{root / classes[label]} has a single picture: none can be held out")
            order = list(files)
            random.Random(f"{seed} {classes[label]}").shuffle(order)
            kept = min(max(1, round(held_out * len(order))), len(order) - 1)
            parts[1].extend((path, label) for path in sorted(order[:kept]))
            parts[0].extend((path, label) for path in sorted(order[kept:]))
    return Folder(parts[0], classes, True, **settings), Folder(parts[1], classes, False, **settings)
