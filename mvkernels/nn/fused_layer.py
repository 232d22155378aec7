"""When the modules of a transformer layer run as one op, :func:`mvkernels.patch_transformer_layer`.

The op computes what the modules would compute, but does not call them. So the modules must be plain ones without hooks.
The op is used on a device where ``python -m mvkernels tune`` found it faster than the fused attention with PyTorch's
norms and matrix products around it, and inside :func:`fused_layers` wherever it can run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.dispatch import checks
from mvkernels.dispatch.backend import reason_against, requested
from mvkernels.dispatch.exporting import exporting
from mvkernels.ops.patch_transformer_layer import OP, patch_transformer_layer

_KINDS = (nn.LayerNorm, nn.Linear, nn.SiLU, nn.Dropout, nn.Identity)
_WRITTEN = {kind: kind.forward for kind in _KINDS}
_DENSE = (Tensor, nn.Parameter)


class _Wanted(threading.local):
    # Not a ContextVar: torch.compile traces and guards this. Each thread starts from None.
    def __init__(self) -> None:
        self.value: bool | None = None


wanted = _Wanted()


@contextmanager
def fused_layers(fuse: bool = True) -> Iterator[None]:
    """Context manager: run the transformer layers of this thread as one fused op each, where the result is the same.

    It applies to MobileViT layers (:class:`PatchTransformer` and swapped models) on backends "triton", "cuda" and
    "cpp", on the last where no gradient is recorded. The fused op is :func:`mvkernels.patch_transformer_layer`, and on
    "cpp" it packs the weights in every call. A layer whose modules are not plain ones, or have hooks, is not fused.

    Args:
        fuse: True fuses the layers, False fuses none.

    Outside of this context the measured configuration of the device decides (see ``python -m mvkernels tune``). Where
    nothing was measured, and inside ``torch.compile``, layers are fused only inside this context. Contexts can be
    nested: the innermost one counts.
    """
    before = wanted.value
    wanted.value = bool(fuse)
    try:
        yield
    finally:
        wanted.value = before


def fused_layer(
    x: Tensor,
    norm1: nn.Module,
    qkv: nn.Linear | tuple[nn.Linear, nn.Linear, nn.Linear],
    proj: nn.Module,
    norm2: nn.Module,
    fc1: nn.Module,
    activation: Callable[[Tensor], Tensor],
    fc2: nn.Module,
    heads: int,
    patch_size: tuple[int, int],
    scale: float | None,
    dropouts: tuple[nn.Module | None, ...],
    backend: str | None,
) -> Tensor | None:
    """The result of the layer on x (B, H, W, C) by one op, or None if the modules have to be called."""
    if wanted.value is False or exporting() or (wanted.value is None and x.is_cpu):
        return None
    compiling = torch.compiler.is_compiling()
    if wanted.value is None and compiling:
        return None
    fused = called = requested(backend)
    if fused == "auto":
        # Of a GPU's backends the op takes the faster one: CUDA C++ runs no layer that Triton cannot run.
        fused, called = ("cpp", "cpp") if x.is_cpu else ("triton", "auto")
    if fused not in OP.why_not:
        return None
    if not compiling and type(x) not in _DENSE:
        return None
    parameters = _parameters(norm1, qkv, proj, norm2, fc1, activation, fc2, dropouts, x.shape[-1], heads)
    if parameters is None or any(p.dtype != x.dtype or p.device != x.device for p in parameters if p is not None):
        return None
    # Under autocast the modules keep the map in float32 between them.
    if checks.autocast_on(x.device.type):
        return None
    map_ = x.permute(0, 3, 1, 2)
    eps: Any = norm1.eps
    if reason_against(OP, fused, (map_, *parameters, heads, patch_size, eps, scale, "silu", None)):
        return None
    if wanted.value is None:
        from mvkernels.ops.patch_transformer_layer.triton.plan import measured_faster, problem_of

        grad = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, *parameters))
        if not measured_faster(problem_of(map_, parameters[8].shape[0], heads, patch_size), grad):
            return None
    settings: dict[str, Any] = {"heads": heads, "patch_size": patch_size, "eps": eps, "scale": scale}
    return patch_transformer_layer(map_, *parameters, **settings, backend=called).permute(0, 2, 3, 1)


def _parameters(
    norm1: Any, qkv: Any, proj: Any, norm2: Any, fc1: Any, activation: Any, fc2: Any,
    dropouts: tuple[nn.Module | None, ...], channels: int, heads: int,
) -> tuple[Any, ...] | None:  # fmt: skip
    """The op's tensor arguments after x, or None if the modules compute something that the op does not."""
    linears = (*(qkv if isinstance(qkv, tuple) else (qkv,)), proj, fc1, fc2)
    if nn.modules.module._has_any_global_hook() or not all(_plain(m, nn.Linear) for m in linears):
        return None
    for norm in (norm1, norm2):
        if not _plain(norm, nn.LayerNorm) or norm.normalized_shape != (channels,):
            return None
        if norm.weight is None or norm.bias is None:
            return None
    if norm1.eps != norm2.eps or not _is_silu(activation):
        return None
    if any(m is not None and not _idle(m) for m in dropouts):
        return None
    hidden = fc1.weight.shape[0]
    if proj.weight.shape != (channels, channels) or channels % heads:
        return None
    if fc1.weight.shape != (hidden, channels) or fc2.weight.shape != (channels, hidden):
        return None
    if proj.bias is None or fc1.bias is None or fc2.bias is None:
        return None
    if not torch.compiler.is_compiling() and any(type(m.weight) not in _DENSE for m in linears):
        return None
    if isinstance(qkv, tuple):
        biases = [m.bias for m in qkv if m.bias is not None]
        if len(biases) not in (0, len(qkv)):
            return None
        joined = (torch.cat([m.weight for m in qkv]), torch.cat(biases) if biases else None)
    else:
        joined = (qkv.weight, qkv.bias)
    if joined[0].shape != (3 * channels, channels):
        return None
    return (norm1.weight, norm1.bias, *joined, proj.weight, proj.bias, norm2.weight, norm2.bias, fc1.weight, fc1.bias,
            fc2.weight, fc2.bias)  # fmt: skip


def _is_silu(activation: Any) -> bool:
    kind = type(activation)
    if (kind.__module__, kind.__name__) == ("transformers.activations", "SiLUActivation"):
        return _alone(activation)
    return activation is F.silu or _plain(activation, nn.SiLU)


def _plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether the module has exactly this class, with the original forward and no hooks."""
    return type(module) is kind and kind.forward is _WRITTEN[kind] and _alone(module)


def _alone(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__


def _idle(module: Any) -> bool:
    """Whether the module is a dropout that is inactive now."""
    if type(module) is nn.Identity:
        return _plain(module, nn.Identity)
    return _plain(module, nn.Dropout) and (module.p == 0 or not module.training)
