"""The registry of models: create models by name and load their weights."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model. The accuracy is the one that the authors published; it was not measured here."""

    name: str
    build: Callable[..., nn.Module]
    """``build(num_classes=, in_chans=, drop_rate=, features_only=, …)`` returns the model with random weights."""
    paper: str
    params: int
    """Number of parameters with ``num_classes`` classes and 3 input channels."""
    macs: float
    """Multiply-adds for one image of ``input_size``, in millions, counted by :func:`mvmodels.count_macs`."""
    published_params: str
    """Number of parameters as the authors print it; empty if they do not."""
    published_flops: str
    """Multiply-adds as the authors print them, often as "FLOPs"; empty if they do not."""
    published_top1: float | None
    """ImageNet-1k top-1 accuracy of the authors' checkpoint in percent; None if there is none."""
    input_size: int = 224
    """Side of the images in pixels."""
    num_classes: int = 1000
    """Number of classes for ``params`` and ``macs``. The default of :func:`create_model` is 1000 for every model."""
    note: str = ""
    """A remark on the figures."""


@dataclass(frozen=True)
class WeightSource:
    """How the tensors of a model are named in the code of a source, such as the authors' or timm's.

    A model that can load weights of other code has ``weight_sources``: a dict of these by the name of the source.
    """

    name_of: Callable[[str], str | tuple[str, ...]]
    """Function from a name in the model to the name in the source. Several names mean that these tensors are joined
    along the first axis, such as q, k and v to a packed qkv."""
    passed_over: str = ""
    """Regular expression for the start of names in a checkpoint that the model does not use."""
    loaded: Callable[[Any], None] | None = None
    """Called with the model after its weights are loaded."""


def renaming(pairs: Sequence[tuple[str, str]]) -> Callable[[str], str]:
    """A ``name_of`` that applies pairs (regular expression, replacement) one after the other."""

    def name_of(name: str) -> str:
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        return name

    return name_of


MODELS: dict[str, ModelInfo] = {}


def register(info: ModelInfo) -> None:
    if info.name in MODELS:
        raise ValueError(f"model {info.name} is registered already")
    MODELS[info.name] = info


def list_models(pattern: str = "*") -> list[str]:
    """The names of the models that match a shell pattern such as "mobile_former_*", in the order of registration."""
    return [name for name in MODELS if fnmatch.fnmatchcase(name, pattern)]


def model_info(name: str) -> ModelInfo:
    """Facts about the model called ``name``: see :class:`ModelInfo`. Raises ValueError if the name is unknown."""
    if not isinstance(name, str) or name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=3, cutoff=0.3) or list(MODELS)[:3]
        raise ValueError(f"unknown model {name!r}, did you mean {', '.join(near)}? list_models() lists all names")
    return MODELS[name]


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    features_only: bool = False,
    **settings: Any,
) -> nn.Module:
    """Create a model with random weights, in training mode.

    The model takes images (B, in_chans, H, W) and returns logits (B, num_classes).

    Args:
        name: name of the model, see :func:`list_models`.
        num_classes: number of classes.
        in_chans: channels of the images.
        drop_rate: dropout probability before the last layer.
        features_only: whether the model returns the list of each stage's last map, finest first, instead of logits.
        settings: further arguments of the class of the model.

    Raises:
        ValueError: the name is unknown, or a setting is out of range.
        TypeError: a setting is unknown or has the wrong type.
    """
    build = model_info(name).build
    for what, count in (("num_classes", num_classes), ("in_chans", in_chans)):
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise TypeError(f"create_model: {what} is {count!r}, want an integer")
    # A dropout may have probability 1. A drop path may not, because it divides by the share that is kept.
    rates = {"drop_rate": (drop_rate, "<=")}
    limits = {"dropout": "<=", "drop_path_rate": "<"}
    rates |= {what: (settings[what], limits[what]) for what in limits if what in settings}
    for what, (rate, below) in rates.items():
        if not isinstance(rate, Real):
            raise TypeError(f"create_model: {what} is {rate!r}, want a number")
        if not 0.0 <= float(rate) <= 1.0 or (rate == 1.0 and below == "<"):
            raise ValueError(f"create_model: {what} is {rate}, want 0 <= {what} {below} 1")
    return build(
        num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate, features_only=features_only, **settings
    )


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], source: str = "authors") -> None:
    """Load the weights of a checkpoint into ``model``. If anything does not fit, the model is not changed.

    Args:
        model: a model made by :func:`create_model`.
        state_dict: tensors by name, or a checkpoint that has them under "state_dict" or "model". A prefix "module." in
            the names is removed.
        source: the code that the names come from: "authors", "timm", "transformers", or "mvmodels" for the names of
            this package. A model's ``weight_sources`` lists the sources that it supports. The weights of the head are
            ignored if the model has no head (``features_only``).

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``state_dict`` is not a dict.
        ValueError: the source is unknown, or weights do not fit. The message has a line for each problem: a tensor is
            missing, is not in the model, is given twice (with and without "module."), has another shape, has no values
            (meta device), is not dense, or is complex or integer where the model has floats.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_weights: model is a {type(model).__name__}, want a torch.nn.Module")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_weights: state_dict is a {type(state_dict).__name__}, want a dict of tensors by name")
    names_of = _source(model, source)
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    given: dict[str, Any] = {}
    problems = []
    for key, value in state_dict.items():
        if not isinstance(key, str):
            problems.append(f"the key {key!r} is of type {type(key).__name__}, want a name")
            continue
        name = key.removeprefix("module.")
        if name in given:
            problems.append(f"{name} is given twice, with and without 'module.'")
        given[name] = value

    own = model.state_dict()
    names: dict[str, tuple[str, ...]] = {}
    for name in own:
        theirs = names_of.name_of(name)
        names[name] = (theirs,) if isinstance(theirs, str) else theirs
    known = {theirs for group in names.values() for theirs in group}
    passed = re.compile(names_of.passed_over) if names_of.passed_over else None
    left_over = [name for name in given if name not in known and not (passed and passed.match(name))]
    # BatchNorm counts batches for a momentum that is not used here; old checkpoints leave it out.
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    wanted = [theirs for name, group in names.items() if name not in optional for theirs in group]
    problems += [f"{theirs} is missing" for theirs in wanted if theirs not in given]
    problems += [f"{name} has no counterpart in the model" for name in left_over]
    loaded: dict[str, Tensor] = {}
    for name, group in names.items():
        values = [given[theirs] for theirs in group if theirs in given]
        strange = [
            f"{theirs} is {reason}"
            for theirs in group
            if theirs in given and (reason := _unfit(given[theirs], own[name]))
        ]
        problems += strange
        if strange or len(values) < len(group):
            loaded[name] = own[name]
            continue
        value, want = _joined(values), tuple(own[name].shape)
        if value is not None and tuple(value.shape) == (*want, 1, 1):  # a 1×1 convolution is a Linear
            value = value.flatten(1)
        if value is None or tuple(value.shape) != want:
            found = ", ".join(str(tuple(v.shape)) for v in values)
            joined = " together" if len(group) > 1 else ""
            problems.append(f"{', '.join(group)} {'are' if joined else 'is'} {found}, want {want}{joined}")
        else:
            loaded[name] = value
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError("load_weights: the weights do not fit:\n  " + "\n  ".join(shown))
    model.load_state_dict(loaded)
    if names_of.loaded is not None:
        names_of.loaded(model)


def _source(model: Any, source: str) -> WeightSource:
    """The :class:`WeightSource` of the model for a source. Raises ValueError if the model does not support it."""
    known: dict[str, WeightSource] = {"mvmodels": WeightSource(lambda name: name)}
    known |= getattr(model, "weight_sources", {})
    if source in known:
        return known[source]
    if source == "authors":
        raise ValueError(
            f"load_weights: source is 'authors', but {type(model).__name__} does not know the authors' names, "
            f"want source={_either(sorted(known))}"
        )
    raise ValueError(f"load_weights: source is {source!r}, want {_either(sorted(known), str)}")


def _either(names: Sequence[str], form: Callable[[str], str] = repr) -> str:
    return " or ".join(filter(None, (", ".join(map(form, names[:-1])), form(names[-1]))))


def _unfit(value: Any, own: Tensor) -> str:
    """Why ``value`` cannot be copied into ``own``, or not without loss, apart from its shape; empty if it can.

    torch reports the former only after it has overwritten other tensors, and the latter not at all.
    """
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, want a tensor"
    if value.is_meta and not own.is_meta:
        return "on the meta device, without values"
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        return f"{kind}, want a dense tensor"
    if _number(value) != _number(own):
        return f"{value.dtype}, want {own.dtype}"
    return ""


def _number(t: Tensor) -> str:
    """The kind of a tensor's numbers. A copy to another dtype of the same kind rounds at most."""
    if t.is_floating_point():
        return "float"
    return "complex" if t.is_complex() else "bool" if t.dtype == torch.bool else "integer"


def _joined(values: Sequence[Tensor]) -> Tensor | None:
    """The tensors concatenated along the first axis, or None if their shapes do not fit."""
    if len(values) == 1:
        return values[0]
    if any(v.dim() == 0 or v.shape[1:] != values[0].shape[1:] for v in values):
        return None
    return torch.cat([*values])
