"""Models of other packages for ``mvkernels swap`` and the demo, and a picture to run through them."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.report import UsageError

# transformers' MobileViT by the names of its checkpoints: widths of the transformers, widths of the stages.
_MOBILEVIT: dict[str, dict[str, Any]] = {
    "xx-small": {
        "hidden_sizes": [64, 80, 96],
        "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320],
        "expand_ratio": 2.0,
    },
    "x-small": {"hidden_sizes": [96, 120, 144], "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384]},
    "small": {"hidden_sizes": [144, 192, 240], "neck_hidden_sizes": [16, 32, 64, 96, 128, 160, 640]},
}
_SHORT = {"mobilevit_xxs": "xx-small", "mobilevit_xs": "x-small", "mobilevit_s": "small"}

# diffusers' DC-AE by the authors' names: channels of the latents, which the widths and depths go with.
_DC_AE = {
    f"dc-ae-f{32 << i}c{32 << 2 * i}-{kind}-1.0": (32 << 2 * i, (128, 256, 512, 512, 1024, 1024, 2048, 2048)[: 6 + i])
    for i in range(3)
    for kind in ("in", "mix")
}


def build(spec: str, pretrained: bool = False) -> nn.Module:
    """The model "family:name" in eval mode, with random weights unless ``pretrained``.

    Raises UsageError if the family or the model is unknown, or its package is missing or cannot be imported.
    """
    family, _, name = spec.partition(":")
    if family not in FAMILIES or not name:
        known = ", ".join(f"{known}:MODEL" for known in FAMILIES)
        raise UsageError(f"unknown model {spec!r}, want one of {known}, for example transformers:mobilevit_s")
    model = FAMILIES[family](name, pretrained)
    if not pretrained:
        randomise(model)
        if spec.startswith("timm:levit"):
            _weaken_attention(model)
    return model.eval()


def load(package: str) -> Any:
    """Import the package, even if the installed torchvision does not fit this torch. Raises UsageError if it fails."""
    _mend_broken_torchvision()
    if package == "transformers":
        _hide_broken_torchvision()
    return _import(package)


def _transformers(name: str, pretrained: bool) -> nn.Module:
    package = load("transformers")
    size = _SHORT.get(name) or name.removeprefix("apple/").removeprefix("mobilevit-")
    if size not in _MOBILEVIT and "/" not in name:
        raise UsageError(f"unknown model transformers:{name}, want {', '.join(_SHORT)} or owner/name on the hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the outcome is said below
    try:
        if size in _MOBILEVIT and not pretrained:
            config = package.MobileViTConfig(**_MOBILEVIT[size], num_labels=1000)
            return package.MobileViTForImageClassification(config)
        hub = f"apple/mobilevit-{size}" if size in _MOBILEVIT else name
        if pretrained:
            return package.AutoModelForImageClassification.from_pretrained(hub)
        return package.AutoModelForImageClassification.from_config(package.AutoConfig.from_pretrained(hub))
    except Exception as error:  # the hub answers with many kinds; each means that there is no such model here
        raise UsageError(f"transformers cannot load {name!r}: {_first_line(error)}") from None


def _timm(name: str, pretrained: bool) -> nn.Module:
    package = load("timm")
    try:
        return package.create_model(name, pretrained=pretrained)
    except Exception as error:
        raise UsageError(f"timm cannot make the model {name!r}: {_first_line(error)}") from None


def _mvmodels(name: str, pretrained: bool) -> nn.Module:
    package = _import("mvmodels")
    if pretrained:
        raise UsageError("mvmodels has no weights to download: leave --pretrained out, or see mvmodels.load_weights")
    try:
        return package.create_model(name)
    except ValueError as error:
        raise UsageError(_first_line(error)) from None


def _diffusers(name: str, pretrained: bool) -> nn.Module:
    package = load("diffusers")
    known = ("dc-ae-f32c32-sana-1.0", *_DC_AE)
    short = name.removeprefix("mit-han-lab/").removesuffix("-diffusers")
    if short not in known and "/" not in name:
        raise UsageError(f"unknown model diffusers:{name}, want {', '.join(known)} or owner/name on the hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if short in known and not pretrained:
            return package.AutoencoderDC(**_dc_ae(short))
        hub = f"mit-han-lab/{short}-diffusers" if short in known else name
        if pretrained:
            return package.AutoencoderDC.from_pretrained(hub)
        return package.AutoencoderDC.from_config(package.AutoencoderDC.load_config(hub))
    except Exception as error:
        raise UsageError(f"diffusers cannot load {name!r}: {_first_line(error)}") from None


def _dc_ae(name: str) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderDC for a name of the authors'."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 5
    if name == "dc-ae-f32c32-sana-1.0":  # with scales of 5, as AutoencoderDC has them by itself
        return {
            "encoder_block_types": blocks[:6],
            "decoder_block_types": blocks[:6],
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        }
    latent, widths = _DC_AE[name]
    attention = len(widths) - 3
    return {
        "latent_channels": latent,
        "encoder_block_types": blocks[: len(widths)],
        "decoder_block_types": blocks[: len(widths)],
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": (0, 4, 8) + (2,) * attention,
        "decoder_layers_per_block": (0, 5, 10) + (2,) * attention,
        "encoder_qkv_multiscales": ((),) * len(widths),
        "decoder_qkv_multiscales": ((),) * len(widths),
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * attention,
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * attention,
    }


FAMILIES: dict[str, Callable[[str, bool], nn.Module]] = {
    "transformers": _transformers,
    "timm": _timm,
    "diffusers": _diffusers,
    "mvmodels": _mvmodels,
}


def input_size(spec: str, model: nn.Module) -> int:
    """The side in pixels of the images that a model of :func:`build` was made for; 256 if it does not say."""
    return _made_for(spec, model) or 256


def _made_for(spec: str, model: nn.Module) -> int | None:
    # None too if they are not square.
    family, _, name = spec.partition(":")
    if family == "mvmodels":
        return _import("mvmodels").model_info(name).input_size
    if family == "timm":
        sizes = (getattr(model, "default_cfg", None) or {}).get("input_size")
    else:
        config = getattr(model, "config", None)
        sizes = getattr(getattr(config, "vision_config", config), "image_size", None)
    height, width = (sizes, sizes) if isinstance(sizes, int | None) else sizes[-2:]
    return height if height == width else None


def _import(package: str) -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what a package says of parts of others that it can do without
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise UsageError(f"{package} is not installed: pip install 'mvkernels[models]'") from None
        raise UsageError(f"{package} cannot be imported: {_first_line(error)}") from None
    except Exception as error:
        raise UsageError(f"{package} cannot be imported: {_first_line(error)}") from None
    finally:
        logging.disable(before)


def _hide_broken_torchvision() -> None:
    """A torchvision built for another torch fails to import, and takes transformers with it, which can do without."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except Exception:
        sys.modules["torchvision"] = None  # type: ignore[assignment]


_operators: list[torch.library.Library] = []


def _mend_broken_torchvision() -> None:
    """Let a torchvision built for another torch import for timm, which wants its transforms and none of its operators.

    It fails at two operators that its compiled part would define; with their signatures known it imports.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        try:
            library = torch.library.Library("torchvision", "FRAGMENT")
            _operators.append(library)  # the definitions go when it is collected
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # they are known, so that it fails at something else
            pass


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random weights that make a comparison mean something.

    Default initialisations hide errors: norms that do nothing, biases of zero, attention that is uniform. And
    small ones (MobileViT's 0.02) let activations shrink from layer to layer until they are denormal, on which a
    processor is twenty times slower: no time of such a model means anything. Weights here keep the size of
    what they act on; norms get weights, biases and running statistics of their own.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(value: Tensor, mean: float, deviation: float) -> None:
        value.copy_(torch.randn(value.shape, generator=generator) * deviation + mean)

    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if value.dim() > 1:
                normal(value, 0.0, math.sqrt(1.5 / value[0].numel()))
            else:
                norm = name == "weight"
                normal(value, float(norm), 0.2 if norm else 0.1)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                normal(buffer, 0.0, 0.1)
            elif name == "running_var":
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def check_size(spec: str, model: nn.Module, image: Tensor) -> None:
    """Raises UsageError if a model of :func:`build` cannot run on images of another size than it is made for."""
    made = _made_for(spec, model)
    if made is None or image.shape[-2:] == (made, made):
        return
    try:
        with torch.no_grad():
            model(image)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        height, width = image.shape[-2:]
        raise UsageError(
            f"{spec} cannot run on images of {height} x {width}: {_first_line(error)} (it is made for {made} x {made})"
        ) from error


@torch.no_grad()
def _weaken_attention(model: nn.Module) -> None:
    """Make the random queries, keys and values of timm's LeViT small.

    It has no norm before its attention, and adds the result of each block to its input. So activations grow from block
    to block, until attention picks a single key: then its gradient is rounding and nothing else.
    """
    for name, module in model.named_modules():
        if name.endswith((".qkv.bn", ".kv.bn", ".q.ln.bn")):
            for value in module.parameters(recurse=False):
                value.mul_(0.3)


def picture(path: str | None, size: int, batch: int = 1) -> tuple[Tensor, str]:
    """A batch (batch, 3, size, size) in [0, 1] of a picture, each shifted further, and where it comes from.

    Without a path: a photograph that scikit-learn ships, or noise where scikit-learn or pillow is missing.
    Raises UsageError for a file that cannot be read.
    """
    pixels, source = _photograph(path, size)
    return torch.stack([pixels.roll(i * size // batch, dims=2) for i in range(batch)]), source


def _photograph(path: str | None, size: int) -> tuple[Tensor, str]:
    try:
        import numpy
        from PIL import Image
    except ImportError:
        if path is not None:
            raise UsageError("--image needs pillow: pip install 'mvkernels[models]'") from None
        return torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)), "noise (pillow is not installed)"
    if path is not None:
        try:
            image, source = Image.open(path).convert("RGB"), Path(path).name
        except OSError as error:
            raise UsageError(f"the picture {path} cannot be read: {_first_line(error)}") from None
    else:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError:
            noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
            return noise, "noise (scikit-learn, whose photograph this would be, is not installed)"
        image, source = Image.fromarray(load_sample_image("china.jpg")), "scikit-learn's photograph china.jpg"
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1).float() / 255, source
