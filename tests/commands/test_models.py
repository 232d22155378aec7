"""Models of other packages by name: the size of their pictures, their random weights, and what they give out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mvkernels import third_party
from mvkernels.commands import cli


def run(line: str, *more: str) -> int:
    return cli.main([*line.split(), *more])


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("timm:swin_tiny_patch4_window7_224", 224),
        ("timm:swinv2_tiny_window8_256", 256),
        ("timm:maxvit_tiny_tf_384", 384),
        ("mvmodels:mobile_former_26m", 224),
        ("diffusers:dc-ae-f32c32-in-1.0", 256),
        ("transformers:mobilevit_s", 256),
        ("transformers:microsoft/swin-tiny", 224),
    ],
)
def test_the_size_that_a_model_is_made_for(spec: str, size: int) -> None:
    family, _, name = spec.partition(":")
    model: Any = nn.Identity()
    if family == "timm":
        model.default_cfg = pytest.importorskip("timm").get_pretrained_cfg(name).to_dict()
    elif family == "transformers":
        package = pytest.importorskip("transformers")
        model.config = (package.SwinConfig if "swin" in name else package.MobileViTConfig)()
    assert third_party.input_size(spec, model) == size


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
    """Without statistics of what they norm, scores of 300 made gradients of rounding alone."""
    pytest.importorskip("timm")
    assert run("swap timm:levit_128s --rounds 1 --json --allocator default") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["swapped"] == 11 and found["verified"] and found["input"] == [1, 3, 224, 224]


def test_norms_have_statistics_of_what_they_get() -> None:
    pytest.importorskip("timm")
    model = third_party.build("timm:levit_128s")
    assert not any(getattr(module, "attention_bias_cache", None) for module in model.modules())  # of other weights
    spread: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_hook(lambda norm, given, out: spread.append(out.std()))
    with torch.no_grad():
        model(third_party.picture(None, 224)[0])
    assert min(spread[:-2]) > 0.5 and max(spread[:-2]) < 2  # the last two have a picture's mean alone


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
