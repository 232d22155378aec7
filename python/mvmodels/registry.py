"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before it is built. The accuracy is the authors' figure, not one measured here."""

    name: str
    build: Callable[..., nn.Module]
    """``build(num_classes=, in_chans=, drop_rate=, features_only=, …)`` -> the model with random weights."""
    paper: str
    params: int
    """Parameters with 1000 classes and 3 input channels."""
    macs: float
    """Multiply-adds of one picture of ``input_size`` as :func:`mvmodels.count_macs` counts them, in millions."""
    published_params: str
    published_flops: str
    """As the authors print it; they count multiply-adds."""
    published_top1: float
    """ImageNet-1k top-1 accuracy in percent of the authors' checkpoint."""
    input_size: int = 224


MODELS: dict[str, ModelInfo] = {}


def register(info: ModelInfo) -> None:
    if info.name in MODELS:
        raise ValueError(f"model {info.name} is registered already")
    MODELS[info.name] = info


def list_models(pattern: str = "*") -> list[str]:
    """The names that fit a shell pattern ("mobile_former_*"), in the order of their registration."""
    return [name for name in MODELS if fnmatch.fnmatchcase(name, pattern)]


def model_info(name: str) -> ModelInfo:
    """What is known of a model. Raises ValueError for an unknown name."""
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=3, cutoff=0.3) or list(MODELS)[:3]
        raise ValueError(f"unknown model {name!r}, did you mean {', '.join(near)}? list_models() has all")
    return MODELS[name]


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    features_only: bool = False,
    **settings: Any,
) -> nn.Module:
    """A model with random weights, in training mode.

    Args:
        name: one of :func:`list_models`.
        num_classes: width of the last layer.
        in_chans: channels of a picture.
        drop_rate: dropout before the last layer.
        features_only: instead of logits return the list of each stage's last map, finest first.
        settings: further arguments of the model's class.

    Raises ValueError for an unknown name or a setting out of range, and TypeError for an unknown setting.
    """
    build = model_info(name).build
    return build(
        num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, features_only=features_only, **settings
    )


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], source: str = "authors") -> None:
    """Load a checkpoint into ``model``, whole or not at all.

    Args:
        model: one of :func:`create_model`.
        state_dict: tensors by name, or a checkpoint that holds them under "state_dict" or "model"; a prefix
            "module." is dropped.
        source: whose names they are: "authors" for those of the authors' code, "mvmodels" for the model's own. The
            weights of a head that a ``features_only`` model lacks are passed over.

    Raises TypeError for a model or state_dict that is none, and ValueError for an unknown source or with a line
    for everything that does not fit: missing, left over, of another shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights: model is a {type(model).__name__}, want a torch.nn.Module")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_weights: state_dict is a {type(state_dict).__name__}, want a dict of tensors by name")
    if source not in ("authors", "mvmodels"):
        raise ValueError(f"load_weights: source is {source!r}, want authors or mvmodels")
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    given = {name.removeprefix("module."): value for name, value in state_dict.items()}

    own = model.state_dict()
    names = {name: name for name in own}
    if source == "authors":
        authors_name: Any = getattr(model, "authors_name", None)
        if authors_name is None:
            raise ValueError(f"load_weights: a {type(model).__name__} has no authors' names, want source='mvmodels'")
        names = {name: authors_name(name) for name in own}
    unused: Any = getattr(model, "unused_prefixes", {})
    known = set(names.values())
    left_over = [name for name in given if name not in known and not name.startswith(unused.get(source, ()))]
    # BatchNorm counts batches for a momentum that is not used here; old checkpoints leave it out.
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    wanted = [theirs for name, theirs in names.items() if name not in optional]
    problems = [f"{theirs} is missing" for theirs in wanted if theirs not in given]
    problems += [f"{name} is left over" for name in left_over]
    for name, theirs in names.items():
        value = given.get(theirs)
        if value is not None and not isinstance(value, Tensor):
            problems.append(f"{theirs} is a {type(value).__name__}, want a tensor")
        elif value is not None and value.shape != own[name].shape:
            problems.append(f"{theirs} is {tuple(value.shape)}, want {tuple(own[name].shape)}")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError("load_weights: the weights do not fit:\n  " + "\n  ".join(shown))
    model.load_state_dict({name: given.get(theirs, own[name]) for name, theirs in names.items()})
