"""Models of other packages by name: the size of their pictures, their random weights, and what they give out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels import third_party
from mvkernels.commands import cli
from mvkernels.report import UsageError


def run(line: str, *more: str) -> int:
    return cli.main([*line.split(), *more])


class Says(nn.Identity):
    """A model that says something of its size."""

    def __init__(self, **says: Any) -> None:
        super().__init__()
        self.__dict__.update(says)


@pytest.mark.parametrize(
    ("spec", "says", "size"),
    [
        ("mvmodels:mobile_former_26m", {}, 224),
        ("timm:m", {"default_cfg": {"input_size": (3, 384, 384)}}, 384),
        ("timm:m", {"default_cfg": {"input_size": (3, 192, 256)}}, 256),
        ("timm:m", {"default_cfg": None}, 256),
        ("timm:m", {}, 256),
        ("transformers:m", {"config": SimpleNamespace(image_size=224)}, 224),
        ("transformers:m", {"config": SimpleNamespace(image_size=(96, 96))}, 96),
        ("transformers:m", {"config": SimpleNamespace(vision_config=SimpleNamespace(image_size=336))}, 336),
        ("diffusers:m", {"config": SimpleNamespace(in_channels=3)}, 256),
    ],
)
def test_the_size_that_a_model_is_made_for(spec: str, says: dict[str, Any], size: int) -> None:
    assert third_party.input_size(spec, Says(**says)) == size


def test_sizes_of_real_models() -> None:
    timm = pytest.importorskip("timm")
    for name, size in (("swin_tiny_patch4_window7_224", 224), ("mobilevit_s", 256)):
        assert third_party.input_size(f"timm:{name}", timm.create_model(name)) == size


def test_only_a_size_is_said_to_be_the_wrong_one() -> None:
    class Breaks(Says):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("boom")

    model = Breaks(default_cfg={"input_size": (3, 8, 8)})
    third_party.check_size("timm:m", model, torch.ones(1, 3, 8, 8))  # whatever is wrong, it is not the size
    with pytest.raises(UsageError, match=r"images of 4 x 6: boom .it is made for 8 x 8"):
        third_party.check_size("timm:m", model, torch.ones(1, 3, 4, 6))
    third_party.check_size("timm:m", Breaks(), torch.ones(1, 3, 4, 4))  # nothing is known of its size


@pytest.mark.parametrize("command", ["swap", "export --to torch --output {}"])
def test_a_size_that_a_model_cannot_take_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    name, *more = command.format(tmp_path / "model.pt2").split()
    more += ["--allocator", "default"] if name == "swap" else []
    assert run(f"{name} timm:levit_128s --size 256", *more) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"mvkernels {name}: timm:levit_128s cannot run on images of 256 x 256: ")
    assert said.endswith("(it is made for 224 x 224)")


def test_levit_with_random_weights_can_be_verified(capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of 300 made gradients of rounding alone."""
    pytest.importorskip("timm")
    assert run("swap timm:levit_128s --rounds 1 --json --allocator default") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["swapped"] == 11 and found["verified"] and found["input"] == [1, 3, 224, 224]


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_b0", "mobilevit_xxs"])
def test_random_weights_are_well_conditioned(name: str) -> None:
    """Limits follow the model's own error: one that amplifies rounding can be swapped for anything."""
    pytest.importorskip("timm")
    model = third_party.build(f"timm:{name}")
    image, _ = third_party.picture(None, 224)
    with torch.no_grad():
        found, exact = model(image), copy.deepcopy(model).double()(image.double())
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_an_autoencoder_is_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose output has a sample, and no logits. With the structure of the real one, and a hundredth of its width."""
    pytest.importorskip("diffusers")
    real = third_party._dc_ae("dc-ae-f32c32-in-1.0")
    small = {f"{side}_block_out_channels": (4, 4, 8, 32, 32, 32) for side in ("encoder", "decoder")}
    monkeypatch.setattr(third_party, "_dc_ae", lambda name: {**real, **small, "latent_channels": 8})
    line = "export diffusers:dc-ae-f32c32-in-1.0 --size 64 --to torch --json --output"
    assert run(line, str(tmp_path / "model.pt2")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["swapped"] == 12
