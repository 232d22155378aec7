"""Checks of whether a fused block computes the same as the module in question.

A check returns the reason against it as a string, or an empty string, so checks can be chained with ``or``. Hooks,
adapters and training mode can change at any time, so the checks run before every call of a swapped block. They are
attribute reads and comparisons only, which torch.compile can trace.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

_log = logging.getLogger("mvkernels")
_logged: set[tuple[str, str]] = set()

ELEMENTWISE = frozenset(
    {
        nn.CELU,
        nn.ELU,
        nn.GELU,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Identity,
        nn.LeakyReLU,
        nn.Mish,
        nn.ReLU,
        nn.ReLU6,
        nn.SELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Tanh,
    }
)
_ELEMENTWISE_FILES = ("transformers.activations", "timm.layers.activations")
_DENSE = (Tensor, nn.Parameter)


def class_name(kind: type) -> str:
    """The name of a class with its module: ``torch.nn.Linear``, ``peft.tuners.lora.layer.Linear``."""
    if kind.__module__ == "builtins":
        return kind.__qualname__
    for package, said in ((nn, "torch.nn"), (torch, "torch")):  # where users know it from
        if kind.__module__.partition(".")[0] == "torch" and getattr(package, kind.__name__, None) is kind:
            return f"{said}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def class_of(module: Any) -> type:
    """The class of the module, of a swapped one its original: that computes the same.

    A class that other code has derived from a swapped one (a parametrization, ``fully_shard``) is a class of its own.
    """
    kind = type(module)
    return kind.mvk_original if getattr(kind, "mvk_class", None) is kind else kind


def name_of(kind: type) -> tuple[str, str]:
    """The module of a class and its name there, by which classes are known whose package must not be imported."""
    return kind.__module__, kind.__qualname__


def not_plain(module: Any, kind: type[nn.Module], what: str) -> str:
    """``module`` must be exactly a ``kind``, with its class's own forward and no hooks.

    Subclasses, parametrizations, adapters and quantized layers have another type; the old weight_norm
    and pruning work through hooks.
    """
    if class_of(module) is not kind:
        return f"{what} is a {class_name(type(module))}, want a plain {class_name(kind)}"
    return replaced(kind, "forward") or not_hooked(module, what)


def not_plain_parts(module: Any, parts: Mapping[str, type[nn.Module]]) -> str:
    """Each of these parts, named as in ``attn.qkv``, must be a plain one of its class: see :func:`not_plain`."""
    for name, kind in parts.items():
        part = module
        for step in name.split("."):
            part = getattr(part, step)
        reason = not_plain(part, kind, name)
        if reason:
            return reason
    return ""


def not_exactly(module: nn.Module, original: type[nn.Module]) -> str:
    """``module`` must be exactly an ``original``: not of a subclass, and not parametrized."""
    kind = type(module)
    if kind is original:
        return ""
    if parametrize.is_parametrized(module) and kind.__mro__[1] is original:
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"its {names} is parametrized (torch.nn.utils.parametrize): swap the model first, then parametrize it"
    return f"its class {class_name(kind)} is a subclass of {class_name(original)} and may compute something different"


def sharded(module: nn.Module) -> str:
    """A swap must come before fully_shard, which changes the classes of the module and of its parameters."""
    bases = type(module).__mro__
    if any(base.__name__ == "FSDPModule" and base.__module__.startswith("torch.distributed") for base in bases):
        return "fully_shard has sharded it: swap the model first, then shard it"
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        return "its parameters are sharded (DTensor): swap the model first, then shard it"
    return ""


class _Written:
    """The original methods of classes, as attributes and not in a dictionary.

    A compiled model guards the attributes that it reads, but it would guard the length of a dictionary, and would be
    compiled again for each class that is added.
    """


_written = _Written()


def replaced(kind: type, *methods: str) -> str:
    """The methods of the class must be the original ones."""
    for name in methods:
        method = getattr(kind, name)
        key = f"{name}_{id(kind)}"
        if not hasattr(_written, key):
            if torch.compiler.is_compiling():  # a model unpickled and compiled at once
                continue
            if method is not _as_written(kind, name):
                return f"{class_name(kind)} has a replaced {name}"
            setattr(_written, key, method)
            setattr(_written, f"class_{id(kind)}", kind)  # kept, so that no other has its number
        if method is not getattr(_written, key):
            return f"{class_name(kind)} has a replaced {name}"
    return ""


def _as_written(kind: type, name: str) -> Any:
    """The method of the class, or None if its name or its file shows that it is not the original one."""
    owner = next(base for base in kind.__mro__ if name in base.__dict__)
    method = owner.__dict__[name]
    package = owner.__module__.partition(".")[0]
    if package == "torch":  # some of its forwards come from functions elsewhere in it
        return method
    names = (getattr(method, "__module__", None), getattr(method, "__qualname__", None))
    if names != (owner.__module__, f"{owner.__qualname__}.{name}"):
        return None
    # functools.wraps copies the names, not the code.
    home, code = getattr(sys.modules.get(package), "__file__", None), getattr(method, "__code__", None)
    if home is not None and code is not None and not code.co_filename.startswith(os.path.dirname(home)):
        return None
    return method


def not_hooked(module: nn.Module, what: str) -> str:
    """The module must have no hooks and no replaced forward, because the fused block does not call its forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{what} has a hook"
    if "forward" in module.__dict__:
        return f"{what} has a replaced forward"
    return ""


def not_its_own(module: Any, *methods: str) -> str:
    """The module must not have methods of its own, in place of those of its class."""
    for name in methods:
        if name in module.__dict__:
            return f"it has a replaced {name}"
    return ""


def not_number(value: Any, what: str) -> str:
    """The value must be a plain number: a tensor may have a gradient, or a different value for each head."""
    return "" if type(value) in (float, int) else f"{what} is a {class_name(type(value))}, want a number"


def not_linear(module: Any, like: Tensor | None, what: str) -> str:
    """A plain Linear, of dense parameters with the dtype and device of ``like``."""
    reason = not_plain(module, nn.Linear, what)
    if reason or like is None:
        return reason
    weight, bias = module.weight, module.bias
    if weight.dtype != like.dtype or weight.device != like.device:
        return f"the weight of {what} has another dtype or device than the rest of the module"
    if bias is not None and (bias.dtype != like.dtype or bias.device != like.device):
        return f"the bias of {what} has another dtype or device than the rest of the module"
    return not_dense(weight, what)


def not_dense(weight: Tensor, what: str) -> str:
    """The weight must be a plain tensor. Quantized weights, for example, have another class."""
    if type(weight) not in _DENSE and not torch.compiler.is_compiling():
        return f"the weight of {what} is a {class_name(type(weight))}, want a plain tensor"
    return ""


def not_pointwise_conv(module: Any, what: str) -> str:
    """A plain 1×1 convolution with stride 1, no padding and one group."""
    reason = not_plain(module, nn.Conv2d, what)
    if reason:
        return reason
    if (
        module.kernel_size != (1, 1)
        or module.stride != (1, 1)
        or module.padding not in ((0, 0), 0, "valid", "same")
        or module.groups != 1
    ):
        return f"{what} is not a 1x1 convolution with stride 1, no padding and one group"
    return ""


def not_layer_norm(module: Any, dim: int, what: str) -> str:
    """A plain LayerNorm over the last axis."""
    reason = not_plain(module, nn.LayerNorm, what)
    if not reason and module.normalized_shape != (dim,):
        return f"{what} normalizes over {module.normalized_shape}, want ({dim},)"
    return reason


def not_elementwise(module: Any, what: str) -> str:
    """The activation must be one that is known to be element-wise."""
    kind = type(module)
    if kind not in ELEMENTWISE and (kind.__module__ not in _ELEMENTWISE_FILES or kind.__name__ == "PReLU"):
        return f"{what} is a {class_name(kind)}, not known to be element-wise"
    return not_hooked(module, what)


def drops_attention(attention: Any, dropout: Any) -> str:
    """Dropout on the attention probabilities must be inactive: the fused kernel does not form these probabilities.

    ``dropout`` is a module, or a number if the attention drops them by itself. If the original calls
    scaled_dot_product_attention, the training mode of the attention counts, else that of the dropout. Like
    :func:`drops_path`, this is checked in each call and not by ``swap``, whose result does not depend on the mode.
    """
    number = isinstance(dropout, (float, int))
    p = dropout if number else dropout.p
    if p > 0 and (attention.training or (not number and dropout.training)):
        return f"dropout on the attention probabilities (p={p}) is active in training mode"
    return ""


def drops_path(module: Any, rate: str = "drop_prob") -> str:
    """Drop path must be inactive: it drops whole samples inside the block, which the fused form does not do."""
    probability = getattr(module, rate, None)
    if module.training and probability:
        return f"drop path (p={probability}) is active in training mode"
    return ""


def unusual_call(x: Any, axes: int = 4) -> str:
    """Why a call needs the original forward: an unusual input, or a transform that the fused kernels do not support."""
    if not isinstance(x, Tensor) or x.dim() != axes:
        return symbolic(x) or f"the input is not a {axes}-D tensor"
    if torch.compiler.is_compiling():
        return ""
    if nn.modules.module._has_any_global_hook():
        return "global module hooks are registered"
    if type(x) not in _DENSE and type(x).__name__ != "FakeTensor":
        return f"the input is a {class_name(type(x))}, want a plain torch.Tensor"
    if torch.jit.is_tracing():
        return "torch.jit.trace is running"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return ""


def symbolic(*given: Any) -> str:
    """Under torch.fx.symbolic_trace, proxies without known sizes stand for the tensors."""
    return "torch.fx is tracing it" if any(isinstance(x, torch.fx.Proxy) for x in given) else ""


def asked(why_not: Callable[[Any], str], module: Any) -> str:
    """``why_not(module)``. If it raises AttributeError because a part is missing, this is the reason."""
    try:
        return why_not(module)
    except AttributeError as error:
        return f"a part that the fused form needs is missing: {error}"


def log_once(module: object, reason: str) -> None:
    """Log once for each class and reason that a swapped module (or its processor) runs its original forward."""
    if torch.compiler.is_compiling():
        return
    key = (type(module).__name__, reason)
    if key not in _logged:
        _logged.add(key)
        _log.warning("%s runs its original forward: %s", *key)
