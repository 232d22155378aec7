"""Folders of pictures and digits: what is read, what is held out, what bad files get."""

from __future__ import annotations

import importlib
import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

pytest.importorskip("PIL")
from PIL import Image

from mvkernels.commands.command import one_line
from mvmodels.data import DataError, Digits, folder_data, random_box, read_picture
from mvmodels.sampler import MultiScaleBatchSampler
from tests.models import pictures


def test_held_out_digits_are_not_trained_on():
    pytest.importorskip("sklearn")
    train, test = Digits(False, 8), Digits(True, 8)
    assert len(train) == 1347 and len(test) == 450
    assert train[0][0].shape == (1, 8, 8) and train[0, 16, 24][0].shape == (1, 16, 24)
    assert train.pictures.min() == -1 and train.pictures.max() == 1
    assert (torch.tensor(test.labels).bincount() - 45).abs().max() <= 2  # as many of each digit
    # Together they are the data set, each picture once.
    rows = [(*tuple(x.flatten().tolist()), y) for part in (train, test) for x, y in part]
    data = importlib.import_module("sklearn.datasets").load_digits()
    expected = (torch.from_numpy(data.data).float() / 8 - 1).tolist()
    assert sorted(rows) == sorted((*row, int(y)) for row, y in zip(expected, data.target))


class TestFolder:
    def test_some_of_each_class_are_held_out(self, tmp_path):
        train, test = folder_data(pictures.folder(tmp_path), held_out=0.3, seed=1)
        assert train.classes == test.classes == ["blue", "green", "red"]
        assert [test.labels.count(i) for i in range(3)] == [2, 2, 2] and len(train) == 12
        assert not {*train.files} & {*test.files}
        again, _ = folder_data(tmp_path, held_out=0.3, seed=1)
        other, _ = folder_data(tmp_path, held_out=0.3, seed=2)
        assert again.files == train.files != other.files
        assert all(path.parent.name == train.classes[label] for path, label in zip(train.files, train.labels))

    def test_at_least_one_and_not_all(self, tmp_path):
        pictures.folder(tmp_path, 2)
        for share in (0.0, 0.99):
            train, test = folder_data(tmp_path, held_out=share)
            assert len(train) == len(test) == 3

    def test_train_and_val(self, tmp_path):
        pictures.folder(tmp_path / "train", 3)
        pictures.folder(tmp_path / "val", 1)
        train, test = folder_data(tmp_path)
        assert len(train) == 9 and len(test) == 3
        assert all(path.is_relative_to(tmp_path / "val") for path in test.files)

    def test_items(self, tmp_path):
        train, test = folder_data(pictures.folder(tmp_path), size=16)
        assert test[0][0].shape == (3, 16, 16) and train[0, 8, 12][0].shape == (3, 8, 12)
        for x, label in test:
            means = x.mean((1, 2))
            assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
            assert means.argmax() == {"red": 0, "green": 1, "blue": 2}[test.classes[label]]

    def test_chance_is_of_seed_epoch_and_index(self, tmp_path):
        train, test = folder_data(pictures.folder(tmp_path), size=8)
        first, held = train[0][0], test[0][0]
        train[3]
        assert torch.equal(train[0][0], first)
        train.epoch = test.epoch = 1
        assert not torch.equal(train[0][0], first) and torch.equal(test[0][0], held)

    def test_workers_read_the_same(self, tmp_path):
        train, _ = folder_data(pictures.folder(tmp_path), size=16)
        sampler = MultiScaleBatchSampler(train, 4, base=16, minimum=8, maximum=24, divisor=8)
        alone, helped = (list(DataLoader(train, batch_sampler=sampler, num_workers=n)) for n in (0, 2))
        assert all(torch.equal(a, b) for x, y in zip(alone, helped) for a, b in zip(x, y))

    @pytest.mark.parametrize("flip", [True, False])
    def test_mirrors(self, tmp_path, flip):
        ramp = Image.new("RGB", (32, 32))
        ramp.putdata([(8 * x, 8 * x, 8 * x) for _ in range(32) for x in range(32)])
        for i in range(12):
            (tmp_path / "ramp").mkdir(exist_ok=True)
            ramp.save(tmp_path / "ramp" / f"{i}.png")
        train, _ = folder_data(tmp_path, size=16, flip=flip)
        rising = {bool(x[0, 8, -1] > x[0, 8, 0]) for x, _ in train}
        assert rising == ({True, False} if flip else {True})


@settings(max_examples=50, deadline=None)
@given(width=st.integers(1, 500), height=st.integers(1, 500), seed=st.integers(0, 1000))
def test_crops_lie_inside(width, height, seed):
    left, top, right, bottom = random_box(width, height, random.Random(seed))
    assert 0 <= left < right <= width + 1e-6 and 0 <= top < bottom <= height + 1e-6


class TestReadPicture:
    def test_the_middle(self, tmp_path):
        """A wide picture loses its sides, and ``crop`` a border."""
        picture = Image.new("RGB", (40, 20), (255, 0, 0))
        picture.paste((0, 0, 255), (10, 0, 30, 20))
        picture.save(tmp_path / "wide.png")
        x = read_picture(tmp_path / "wide.png", 20, 20, crop=1.0)
        assert torch.equal(x[2], torch.ones(20, 20)) and torch.equal(x[0], -torch.ones(20, 20))
        wide = read_picture(tmp_path / "wide.png", 10, 20, crop=1.0)
        assert torch.equal(wide[0, :, 0], torch.ones(10)) and torch.equal(wide[2, :, 10], torch.ones(10))
        cropped = read_picture(tmp_path / "wide.png", 10, 20, crop=0.5)
        assert torch.equal(cropped[2], torch.ones(10, 20))

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
    def test_any_mode(self, tmp_path, mode):
        path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
        Image.new(mode, (9, 7)).save(path)
        assert read_picture(path, 8, 8).shape == (3, 8, 8)
        assert read_picture(path, 8, 8, channels=1).shape == (1, 8, 8)

    @pytest.mark.parametrize("form", ["png", "tif"])
    def test_sixteen_bits(self, tmp_path, form):
        """A ramp stays one, from black to white."""
        ramp = Image.fromarray(numpy.linspace(0, 65535, 64).repeat(8).reshape(64, 8).astype("uint16"))
        ramp.save(tmp_path / f"deep.{form}")
        for channels in (1, 3):
            x = read_picture(tmp_path / f"deep.{form}", 64, 8, channels, crop=1.0)
            assert (x[0, :, 0] - torch.linspace(-1, 1, 64)).abs().max() < 0.02

    @pytest.mark.parametrize("kind", ["int32", "float32"])
    def test_no_known_white(self, tmp_path, kind):
        Image.fromarray(numpy.ones((8, 8), kind)).save(tmp_path / "deep.tif")
        with pytest.raises(DataError, match=r"its pixels are of mode [IF], whose white is not known"):
            read_picture(tmp_path / "deep.tif", 8, 8)

    def test_turned_as_the_camera_says(self, tmp_path):
        picture = Image.new("RGB", (8, 16))
        picture.paste((255, 255, 255), (0, 0, 8, 8))
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        picture.save(tmp_path / "turned.png", exif=exif)
        x = read_picture(tmp_path / "turned.png", 16, 8, crop=1.0)
        assert x[0, 2].max() < -0.9 and x[0, -2].min() > 0.9

    @pytest.mark.parametrize("what", ["missing", "text", "empty", "cut", "folder"])
    def test_unreadable(self, tmp_path, what):
        path = tmp_path / "picture.png"
        if what == "folder":
            path.mkdir()
        elif what != "missing":
            Image.effect_noise((64, 64), 50).save(path)
            path.write_bytes({"text": b"no picture", "empty": b"", "cut": path.read_bytes()[:600]}[what])
        with pytest.raises(DataError) as caught:
            read_picture(path, 8, 8)
        assert str(caught.value).startswith(f"{path} cannot be read: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda root: None, "has no classes"),
        (lambda root: root.rmdir(), "is not a folder"),
        (lambda root: (root / "cats").mkdir(), "cats has no pictures in it"),
        (lambda root: pictures.folder(root, 1), "blue has a single picture"),
        (lambda root: (pictures.folder(root / "train"), (root / "val" / "red").mkdir(parents=True)), "has no pictures"),
        (
            lambda root: (
                pictures.folder(root / "train"),
                pictures.write(root / "val" / "red" / "1.png", (9, 9, 9), 0),
            ),
            "blue is a class in only one of train and val",
        ),
    ],
    ids=["empty", "missing", "empty class", "one picture", "empty val", "other classes"],
)
def test_bad_folders(tmp_path, make, match):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=match) as caught:
        folder_data(root)
    assert "\n" not in str(caught.value)


def test_a_worker_tells_of_a_bad_picture_in_one_line(tmp_path):
    train, _ = folder_data(pictures.folder(tmp_path), size=8)
    train.files[0].write_text("no picture")
    with pytest.raises(DataError) as caught:
        list(DataLoader(train, 4, num_workers=1))
    assert one_line(caught.value) == f"{train.files[0]} cannot be read: no picture that pillow knows"


@pytest.mark.parametrize(("width", "height"), [(7, 7), (225, 232), (239, 1)])
def test_a_crop_of_all_of_a_picture(tmp_path, width, height):
    """Sides whose halves of nothing are an ulp below 0."""
    Image.new("RGB", (width, height)).save(tmp_path / "one.png")
    for side in (100, 224):
        assert read_picture(tmp_path / "one.png", side, side, crop=1).shape == (3, side, side)
