"""The training loop: its schedule, its average, and that an interrupted run ends as if it had not been."""

from __future__ import annotations

import dataclasses
import functools
import math
import os

import pytest
import torch
from torch import nn

pytest.importorskip("PIL")

from mvkernels.report import UsageError
from mvmodels import checkpoint, registry, vit
from mvmodels.data import folder_data
from mvmodels.engine import Average, Options, Trainer, learning_rate, parameter_groups
from mvmodels.irregular_vit import IrregularViT, Size
from mvmodels.vit import VisionTransformer
from tests.models import pictures


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model with BatchNorm, and chance inside: drop path and dropout."""
    build = functools.partial(IrregularViT, Size(12, 2, 2), trunk=(8, 8, 8, 8))
    info = registry.ModelInfo("tiny", build, "", 0, 0.0, "", "", None)
    monkeypatch.setitem(registry.MODELS, "tiny", info)
    # Without BatchNorm, whose statistics need more steps than a test has.
    build = functools.partial(VisionTransformer, vit.Size(16, 1, 2, 2, ()), False, image_size=32)
    monkeypatch.setitem(registry.MODELS, "tiny_vit", dataclasses.replace(info, name="tiny_vit", build=build))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = pictures.folder(tmp_path_factory.mktemp("pictures"), 8)
    return lambda: folder_data(root, size=32, held_out=0.25)


def options(**changed) -> Options:
    given = {"epochs": 2, "batch_size": 4, "size": 32, "settings": {"drop_rate": 0.2, "drop_path_rate": 0.3}, **changed}
    return Options("tiny", **given)


class TestLearningRate:
    def test_shape(self):
        rates = [learning_rate(step, 100, 10, 1.0, 0.1) for step in range(100)]
        assert rates[0] == pytest.approx(0.1 + 0.09) and rates[9] == rates[10] == pytest.approx(1.0)
        assert rates[99] == pytest.approx(0.1)
        assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
        middle = 0.1 + 0.45 * (1 + math.cos(math.pi * 44 / 89))
        assert rates[54] == pytest.approx(middle)

    @pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (5, 5), (2, 1)])
    def test_short_runs(self, steps, warmup):
        rates = [learning_rate(step, steps, warmup, 1.0, 0.1) for step in range(steps)]
        assert all(0.1 <= rate <= 1.0 for rate in rates)
        assert max(rates) == pytest.approx(1.0)


def test_average():
    """Weights and BatchNorm's statistics follow by the share; counters are copied."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = Average(model, 0.25)
    before = {name: value.clone() for name, value in average.model.state_dict().items()}
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
        model[1].running_mean.add_(2.0)
        model[1].num_batches_tracked.add_(7)
    average.update(model, step=1000)
    after = average.model.state_dict()
    for name in ("0.weight", "1.bias"):
        torch.testing.assert_close(after[name], before[name] + 0.25)
    torch.testing.assert_close(after["1.running_mean"], before["1.running_mean"] + 0.5)
    assert int(after["1.num_batches_tracked"]) == 7
    average.update(model, step=8)  # early on it follows faster: a half
    torch.testing.assert_close(average.model.state_dict()["0.weight"], before["0.weight"] + 0.625)
    assert not any(p.requires_grad for p in average.model.parameters()) and not average.model.training


def test_vectors_do_not_decay():
    model = registry.create_model("tiny")
    matrices, vectors = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() > 1 for p in matrices["params"]) and all(p.dim() <= 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


class Stop(Exception):
    pass


def stopping(trainer: Trainer, step: int) -> Trainer:
    """The process dies in the middle of that step."""
    original = trainer._step

    def dies(*arguments):
        if trainer.step == step:
            raise Stop
        return original(*arguments)

    trainer._step = dies  # type: ignore[method-assign]
    return trainer


def without_times(result: dict) -> dict:
    history = [{k: v for k, v in row.items() if "seconds" not in k} for row in result["history"]]
    return {k: history if k == "history" else v for k, v in result.items() if "seconds" not in k}


@pytest.mark.core
@pytest.mark.parametrize(
    "settings, at",
    [
        ({}, 3),
        ({"multi_scale": "variable", "scales": (32, 64), "batch_size": 8, "ema": 0.0}, 2),
        ({"multi_scale": "fixed", "scales": (32, 64)}, 7),
    ],
    ids=["one size", "variable", "fixed"],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(data, tmp_path, settings, at):
    whole = Trainer(options(**settings), *data())
    expected = whole.run()
    assert expected["steps"] == whole.steps == whole.step

    broken = stopping(Trainer(options(**settings, output=tmp_path, save_every=2), *data()), at)
    with pytest.raises(Stop):
        broken.run()
    resumed = Trainer(options(**settings, output=tmp_path), *data())
    resumed.restore(checkpoint.read_training(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert resumed.step == at // 2 * 2
    found = resumed.run()
    assert without_times(found) == without_times(expected)
    same = zip(resumed.model.state_dict().values(), whole.model.state_dict().values())
    assert all(torch.equal(ours, theirs) for ours, theirs in same)
    # So does the file say.
    state = checkpoint.read_training(tmp_path / "last.pt")
    assert all(torch.equal(state["state_dict"][k], v) for k, v in whole.model.state_dict().items())
    assert (state["ema"] is None) == (settings.get("ema") == 0.0)
    # What is over is not begun again.
    again = Trainer(options(**settings, output=tmp_path), *data())
    again.restore(state, tmp_path / "last.pt")
    assert without_times(again.run()) == without_times(expected)


def test_it_learns_colours(data, tmp_path):
    trainer = Trainer(Options("tiny_vit", epochs=6, lr=1e-2, batch_size=6, size=32, output=tmp_path), *data())
    result = trainer.run()
    assert result["history"][-1]["loss"] < result["history"][0]["loss"]
    assert result["best_accuracy"] == 1.0 and result["pictures"] == 18 and result["held_out"] == 6
    best = checkpoint.read_training(tmp_path / "best.pt")
    assert best["accuracy"] == 1.0
    model = checkpoint.build(best, "best.pt")
    _, test = data()
    with torch.no_grad():
        right = [int(model(x[None]).argmax()) == label for x, label in (test[i] for i in range(len(test)))]
    assert all(right) and not model.training


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"lr": 0.1}, "with lr 0.002, but here lr is 0.1"),
        ({"seed": 1}, "of a run with seed 0"),
        ({"epochs": 4}, "of a run with epochs 2"),
    ],
    ids=str,
)
def test_another_run_is_not_resumed(data, tmp_path, changed, match):
    trainer = stopping(Trainer(options(output=tmp_path, save_every=1), *data()), 2)
    with pytest.raises(Stop):
        trainer.run()
    other = Trainer(options(**changed), *data())
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(UsageError, match=match):
        other.restore(checkpoint.read_training(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items()) and other.step == 0


def test_a_lost_loss_is_told_and_not_saved(data, tmp_path):
    trainer = Trainer(options(output=tmp_path, save_every=1), *data())
    with torch.no_grad():
        trainer.model.head.bias.fill_(math.nan)
    with pytest.raises(UsageError, match="the loss is nan at step 1"):
        trainer.run()
    assert not (tmp_path / "last.pt").exists()


def test_a_batch_too_small_for_batchnorm(data):
    with pytest.raises(UsageError, match="BatchNorm has one value only, of a batch of 1 x 3 x 32 x 32"):
        Trainer(options(batch_size=1), *data()).run()


def test_no_classifier(data, monkeypatch):
    build = functools.partial(IrregularViT, Size(12, 1, 2), trunk=(8, 8, 8, 8))
    features = lambda features_only, **others: build(features_only=True, **others)  # noqa: E731
    monkeypatch.setitem(registry.MODELS, "tiny", registry.ModelInfo("tiny", features, "", 0, 0.0, "", "", None))
    with pytest.raises(UsageError, match="tiny is not an image classifier"):
        Trainer(options(settings={}), *data()).run()


class TestCheckpoint:
    def test_a_kill_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "last.pt"
        checkpoint.save({"step": 1}, path)

        def dies(state, file):
            file.write(b"half of it")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save({"step": 2}, path)
        monkeypatch.undo()
        assert checkpoint.read(path)["step"] == 1
        checkpoint.save({"step": 3}, path)  # what was left lying does no harm
        assert checkpoint.read(path)["step"] == 3 and os.listdir(tmp_path) == ["last.pt"]

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 no zip"], ids=["empty", "text", "zip"])
    def test_unreadable(self, tmp_path, content):
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        with pytest.raises(UsageError, match="is not a checkpoint") as caught:
            checkpoint.read(path)
        assert "\n" not in str(caught.value)

    def test_others(self, tmp_path):
        with pytest.raises(UsageError, match="cannot be read: No such file"):
            checkpoint.read(tmp_path / "missing.pt")
        torch.save(torch.zeros(2), tmp_path / "tensor.pt")
        with pytest.raises(UsageError, match="contains a Tensor"):
            checkpoint.read(tmp_path / "tensor.pt")
        torch.save({"state_dict": {}}, tmp_path / "other.pt")
        with pytest.raises(UsageError, match=r"was not written by mvmodels\.train"):
            checkpoint.read_training(tmp_path / "other.pt")

    def test_what_does_not_fit_is_one_line(self):
        model = nn.Linear(2, 2)
        with pytest.raises(UsageError) as caught:
            checkpoint.fit(model, {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, "a.pt")
        assert str(caught.value) == "a.pt: the weights do not fit: weight is (3, 2), want (2, 2); and 1 more"
        many = {f"layer{i}": torch.zeros(1) for i in range(40)}
        with pytest.raises(UsageError, match="weight is missing; and 41 more"):
            checkpoint.fit(model, many, "a.pt")
