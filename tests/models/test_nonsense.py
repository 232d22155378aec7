"""Checkpoints and trainings that are not what they should be."""

# ruff: noqa: F811  (fixtures are imported, and are arguments)

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("PIL")

from mvmodels import checkpoint, predict, registry
from tests.models.test_commands import folder, one_line_on_stderr, run, tiny, trained  # noqa: F401


def test_a_model_that_is_no_classifier(folder, trained, tmp_path, capsys):
    name = "mobilevit_xxs_deeplabv3"
    assert run(folder, tmp_path / "dense", "--model", name, "--size", "64", "--epochs", "1") == 2
    assert f"{name} is not an image classifier" in one_line_on_stderr(capsys, "train")
    torch.save(registry.create_model(name, num_classes=3).state_dict(), tmp_path / "dense.pt")
    named = ["--model", name, "--checkpoint", str(tmp_path / "dense.pt"), "--size", "64", "--set", "num_classes=3"]
    assert predict.main([str(folder / "red" / "0.png"), *named]) == 2
    assert f"{name} is not an image classifier" in one_line_on_stderr(capsys, "predict")


NONSENSE = [
    *(-3, 0, 10**12, 2**70, math.nan, math.inf, "x", b"x", None, True, 1.5, [], {}, [1, None], ["a", 1], {1: 2}),
    *({"x": {"y": [1]}}, {"in_chans": -1}, {"in_chans": "x"}, {"image_size": 2}, {"num_classes": 3}, torch.zeros(0)),
    *({"drop_rate": math.nan}, {"patch_size": 0}, [["a"], ["b"], ["c"]], torch.tensor([math.nan, 1.0])),
]


@pytest.mark.core
@pytest.mark.parametrize("name", ["format", "model", "settings", "classes", "size", "channels", "state_dict", "ema"])
def test_a_checkpoint_whose_values_are_nonsense(folder, trained, capsys, name):
    """Whatever a field holds: one line and status 2."""
    state = checkpoint.read_training(trained / "last.pt")
    right = {"settings": [{}], "ema": [None]}.get(name, [])
    common = [str(folder / "red" / "0.png"), "--checkpoint", str(trained / "bad.pt")]
    common += ["--no-ema"] if name == "state_dict" else []
    for value in NONSENSE:
        torch.save({**state, name: value}, trained / "bad.pt")
        if not any(type(value) is type(one) and value == one for one in right):
            assert predict.main(common) == 2, value
            one_line_on_stderr(capsys, "predict")


@pytest.mark.parametrize(
    "name",
    [
        *("epoch", "in_epoch", "step", "history", "best", "seconds", "total", "optimizer"),
        *("model", "settings", "classes", "size", "channels", "options", "pictures", "ranks"),
    ],
)
def test_a_training_whose_values_are_nonsense_is_not_gone_on_with(folder, trained, capsys, name):
    state = checkpoint.read_training(trained / "last.pt")
    first = {**state["optimizer"]["state"][0], "exp_avg": torch.zeros(1)}
    options, image = state["options"], torch.zeros(3, 30)
    worse = {
        "best": [-1.0, 0.0, 1.0, state["best"] + 1e-3],
        "seconds": [0, state["seconds"] + 1.0, state["seconds"] - 1.0],
        "model": ["mobilevit_xs", "vit", ""],
        "settings": [{**state["settings"], "num_heads": 3}, {**state["settings"], "x": image}],
        "options": [{}, {**options, "lr": 1.0}, {**options, "lr": image}, {**options, "model": "mobilevit_xs"}],
        "pictures": [[image, image], [0, 0]],
        "optimizer": [{"state": {0: first}}, {"state": {0: {}}}, {"state": {"x": {}}}, {"state": {10**6: first}}],
        "history": [state["history"][:-1], [*state["history"][:-1], {"epoch": 4}]],
    }
    for value in [*NONSENSE[:16:2], *NONSENSE[-1:], *worse.get(name, [])]:
        near = {"best": 1e-9, "seconds": 0.02, "in_epoch": 0}.get(name)
        if near is not None and type(value) is type(state[name]) and abs(value - state[name]) <= near:
            continue  # it is right
        checkpoint.save({**state, name: value}, trained / "last.pt")
        assert run(folder, trained, "--resume") == 2, value
        assert str(trained / "last.pt") in one_line_on_stderr(capsys, "train")
