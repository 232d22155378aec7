"""Models by name."""

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
    """What is known of a model before it is built. The accuracy is the authors' figure, not one measured here."""

    name: str
    build: Callable[..., nn.Module]
    """``build(num_classes=, in_chans=, drop_rate=, features_only=, …)`` -> the model with random weights."""
    paper: str
    params: int
    """Parameters with ``num_classes`` classes and 3 input channels."""
    macs: float
    """Multiply-adds of one picture of ``input_size`` as :func:`mvmodels.count_macs` counts them, in millions."""
    published_params: str
    """As the authors print it; empty where they do not."""
    published_flops: str
    """As the authors print it; they count multiply-adds. Empty where they do not."""
    published_top1: float | None
    """ImageNet-1k top-1 accuracy in percent of the authors' checkpoint, or None: no classifier, or none published."""
    input_size: int = 224
    num_classes: int = 1000
    """What was counted has so many; the default of :func:`create_model` is 1000 for every model."""
    note: str = ""
    """What else a reader of the figures has to know."""


@dataclass(frozen=True)
class WeightSource:
    """How another code names the tensors of one of our models.

    A model that takes the weights of others has a ``weight_sources``: a dict of these by the source's name.
    """

    name_of: Callable[[str], str | tuple[str, ...]]
    """Our name -> theirs. Several tensors of theirs are joined along the first axis: q, k and v of a packed qkv."""
    passed_over: str = ""
    """A regular expression for names that a checkpoint holds and the model has no use for; matched from the start."""
    loaded: Callable[[Any], None] | None = None
    """Called with the model once the weights are in it."""


def renaming(pairs: Sequence[tuple[str, str]]) -> Callable[[str], str]:
    """A ``name_of`` that applies regular expressions and their replacements, one after the other."""

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
    """The names that fit a shell pattern ("mobile_former_*"), in the order of their registration."""
    return [name for name in MODELS if fnmatch.fnmatchcase(name, pattern)]


def model_info(name: str) -> ModelInfo:
    """What is known of a model. Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in MODELS:
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

    Raises ValueError for an unknown name or a setting out of range, and TypeError for an unknown setting or one of
    another type.
    """
    build = model_info(name).build
    for what, count in (("num_classes", num_classes), ("in_chans", in_chans)):
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise TypeError(f"create_model: {what} is {count!r}, want an integer")
    # Dropping all is something to a dropout, and nothing to a drop path, which divides by what is kept.
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
    """Load a checkpoint into ``model``, whole or not at all.

    Args:
        model: one of :func:`create_model`.
        state_dict: tensors by name, or a checkpoint that holds them under "state_dict" or "model"; a prefix
            "module." is dropped.
        source: whose names they are: "authors" for those of the authors' code, "timm", "transformers", or "mvmodels"
            for the model's own; which of them a model knows is in its ``weight_sources``. The weights of a head
            that a ``features_only`` model lacks are passed over.

    Raises TypeError for a model or state_dict that is none, and ValueError for a source that the model does not know
    or with a line for everything that does not fit: missing, left over, given twice (with "module." and without), of
    another shape, without values (on the meta device), not dense, or complex or integer where the model has floats.
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
    problems += [f"{name} is left over" for name in left_over]
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
    """The model's answer to whose names those are."""
    known: dict[str, WeightSource] = {"mvmodels": WeightSource(lambda name: name)}
    known |= getattr(model, "weight_sources", {})
    if source in known:
        return known[source]
    if source == "authors":
        raise ValueError(
            f"load_weights: a {type(model).__name__} has no authors' names, want source={_either(sorted(known))}"
        )
    raise ValueError(f"load_weights: source is {source!r}, want {_either(sorted(known), str)}")


def _either(names: Sequence[str], form: Callable[[str], str] = repr) -> str:
    return " or ".join(filter(None, (", ".join(map(form, names[:-1])), form(names[-1]))))


def _unfit(value: Any, own: Tensor) -> str:
    """What of ``value``, beside its shape, is such that it cannot be copied into ``own``, or not without a loss.

    torch finds the one only after other tensors have been overwritten, and the other not at all.
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
    """The kind of number that a tensor is of; within a kind, copying rounds at most."""
    if t.is_floating_point():
        return "float"
    return "complex" if t.is_complex() else "bool" if t.dtype == torch.bool else "integer"


def _joined(values: Sequence[Tensor]) -> Tensor | None:
    """The tensors one under the other, or None if they do not fit together."""
    if len(values) == 1:
        return values[0]
    if any(v.dim() == 0 or v.shape[1:] != values[0].shape[1:] for v in values):
        return None
    return torch.cat([*values])
