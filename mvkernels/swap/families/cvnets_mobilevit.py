"""The whole ``MobileViTBlock`` of Apple's MobileViT (ml-cvnets), recognised by structure.

See :mod:`mvkernels.swap.by_structure`. The LayerNorm of ml-cvnets differs from that of other packages: it looks for an
axis of the size of the features on axis 1 first, and then on the last axis. With as many patches as features it
normalizes over the patches, so such calls run the original forward. In the fused form the norm is called on rows
(pixels, features), where the axis is unambiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.swap import by_structure
from mvkernels.swap.eligibility import (
    ELEMENTWISE,
    asked,
    class_name,
    class_of,
    drops_attention,
    drops_path,
    log_once,
    not_dense,
    not_hooked,
)
from mvkernels.swap.mobilevit import layers_for_call, transform
from mvkernels.swap.packing import layers
from mvkernels.swap.packing import mobilevit as packed
from mvkernels.swap.packing.blocks import as_plain, not_own
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.swapped import Swapped

_WATCHED = ("local_rep", "global_rep", "conv_proj")
_CHILDREN = ("local_rep", "global_rep", "conv_proj", "fusion")
_LAYER = ("pre_norm_mha", "pre_norm_ffn", "drop_path")
_ATTENTION = ("qkv_proj", "attn_dropout", "out_proj", "softmax")
_METHODS = ("unfolding", "folding", "forward_spatial")


def why_not(block: Any, model: nn.Module) -> str:
    """Why the fused block cannot replace this ``MobileViTBlock``; empty if it can."""
    reason = by_structure.holds_something_else(block, _CHILDREN) or _why_not_now(block)
    for layer in list(block.global_rep)[:-1] if not reason else ():
        reason = reason or by_structure.holds_something_else(layer, _LAYER, "a layer of the transformer")
        reason = reason or by_structure.holds_something_else(layer.pre_norm_mha[1], _ATTENTION, "its attention")
    if reason:
        return reason
    generator = torch.Generator().manual_seed(0)
    channels, dim = block.local_rep.conv_1x1.block.conv.in_channels, _dim(block)
    # Once with whole patches and once with resizing, with another number of patches than features.
    sizes = [(3 * block.patch_h, 2 * block.patch_w), (3 * block.patch_h, 2 * block.patch_w - 1)]
    if dim == 6:
        sizes = [(h + 2 * block.patch_h, w) for h, w in sizes]
    maps = [torch.randn(2, channels, *size, generator=generator, dtype=torch.float64, device="cpu") for size in sizes]
    return by_structure.computes_something_else(block, SwappedMobileViTBlock, maps, _fused_example, quiet=_quiet)


def _quiet(block: Any) -> None:
    """Switch off the dropouts and drop paths, which the fused form calls or leaves to the original."""
    for layer in list(block.global_rep)[:-1]:
        attention, (_, _, _, drop1, _, drop2) = layer.pre_norm_mha[1], layer.pre_norm_ffn
        for part in (layer.pre_norm_mha[2], attention.attn_dropout, drop1, drop2, layer.drop_path):
            part.p = 0.0


def form(block: nn.Module) -> type:
    """The fused form of such a block."""
    return SwappedMobileViTBlock


def _dim(block: Any) -> int:
    """The number of features of the transformer."""
    return block.local_rep.conv_1x1.block.conv.out_channels


def _why_not_now(block: Any) -> str:
    """Why the fused form cannot run now. This can change after a swap."""
    if any(name in block.__dict__ for name in _METHODS):
        return f"it has a replaced method, one of {', '.join(_METHODS)}"
    into, out = block.local_rep.conv_1x1, block.conv_proj
    reason = not_hooked(block.local_rep, "local_rep") or not_hooked(block.global_rep, "global_rep")
    for module, what in ((into, "local_rep.conv_1x1"), (out, "conv_proj")):
        reason = reason or _not_conv_layer(module, what)
    if reason:
        return reason
    if [*into.block._modules] != ["conv"]:
        return "local_rep.conv_1x1 has a norm or an activation, want a convolution only"
    *layers, norm = block.global_rep
    dim = _dim(block)
    like = into.block.conv.weight
    reason = _not_layer_norm(norm, dim, "the last norm")
    for layer in layers:
        reason = reason or _why_not_layer(layer, like, dim)
    return reason


def _not_conv_layer(module: Any, what: str) -> str:
    """The module must begin with a 1×1 convolution; a norm and an activation may follow."""
    conv = module.block.conv
    reason = not_hooked(module, what) or not_hooked(module.block, what) or not_hooked(conv, f"{what}'s convolution")
    if reason:
        return reason
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
        return f"{what} has a {class_name(type(conv))}, want a plain convolution"
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)
    if not plain or next(iter(module.block._modules)) != "conv":
        return f"{what} does not begin with a 1x1 convolution with stride 1, no padding and one group"
    return not_dense(conv.weight, what)


def _why_not_layer(layer: Any, like: Tensor, dim: int) -> str:
    attention, (norm2, fc1, activation, drop1, fc2, drop2) = layer.pre_norm_mha[1], layer.pre_norm_ffn
    norm1, drop = layer.pre_norm_mha[0], layer.pre_norm_mha[2]
    for module in (layer, layer.pre_norm_mha, attention, layer.pre_norm_ffn, layer.drop_path):
        reason = not_hooked(module, f"a {type(module).__name__} of the transformer")
        if reason:
            return reason
    reason = (
        _not_layer_norm(norm1, dim, "pre_norm_mha.0")
        or _not_layer_norm(norm2, dim, "pre_norm_ffn.0")
        or _not_linear(attention.qkv_proj, like, (3 * dim, dim), "qkv_proj")
        or _not_linear(attention.out_proj, like, (dim, dim), "out_proj")
        or _not_linear(fc1, like, (None, dim), "pre_norm_ffn.1")
        or _not_linear(fc2, like, (dim, None), "pre_norm_ffn.4")
        or not_hooked(activation, "pre_norm_ffn.2")
    )
    for module in (drop, drop1, drop2, attention.attn_dropout):
        reason = reason or not_hooked(module, "a dropout")
        if not reason and not isinstance(module, nn.Dropout):
            reason = f"a dropout is a {class_name(type(module))}, want a torch.nn.Dropout"
    if reason:
        return reason
    if getattr(attention, "coreml_compatible", False):
        return "its attention uses the layout for CoreML (coreml_compatible is True)"
    if not any(kind in ELEMENTWISE for kind in type(activation).__mro__):
        return f"pre_norm_ffn.2 is a {class_name(type(activation))}, not known to be element-wise"
    return ""


def _drops(block: Any) -> str:
    """Why the fused form cannot run in the current mode."""
    reason = ""
    for layer in list(block.global_rep)[:-1]:
        attention = layer.pre_norm_mha[1]
        reason = reason or drops_attention(attention, attention.attn_dropout) or drops_path(layer.drop_path, "p")
    return reason


def _not_layer_norm(module: Any, dim: int, what: str) -> str:
    if not isinstance(module, nn.LayerNorm) or module.normalized_shape != (dim,):
        return f"{what} is a {class_name(type(module))}, want a LayerNorm over {dim} features"
    return not_hooked(module, what)


def _not_linear(module: Any, like: Tensor, shape: tuple[int | None, int | None], what: str) -> str:
    """The module must be a Linear of torch or ml-cvnets with this shape, and the dtype and device of the rest."""
    if type(module) is not nn.Linear and type(module).__name__ != "LinearLayer":
        return f"{what} is a {class_name(type(module))}, want a plain torch.nn.Linear"
    if getattr(module, "channel_first", False):
        return f"{what} takes channels first (channel_first is True)"
    weight = module.weight
    if weight.dim() != 2 or any(want not in (None, found) for want, found in zip(shape, weight.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        return f"{what} has a weight of shape {tuple(weight.shape)}, want ({wanted})"
    if weight.dtype != like.dtype or weight.device != like.device:
        return f"the weight of {what} has another dtype or device than the rest of the module"
    return not_hooked(module, what) or not_dense(weight, what)


def _part(layer: Any) -> Part | None:
    """The convolution, norm and activation of such a layer, as torch's own; None if it holds something else."""
    if [*layer._modules] != ["block"] or not_own(layer.block, nn.Sequential):
        return None
    conv, *after = layer.block
    norm = after.pop(0) if after and isinstance(after[0], nn.BatchNorm2d) else None
    norm = None if norm is None else as_plain(norm, nn.BatchNorm2d)
    return as_plain(conv, nn.Conv2d, "_conv_forward"), norm, tuple(as_plain(m, nn.SiLU) for m in after)


def _plain_norm(norm: Any) -> Any:
    """An equal LayerNorm of torch's class; None if on rows (pixels, features) it computes something else.

    Small numbers show where eps is added, and large ones whether it is.
    """
    if norm.weight is None or norm.bias is None or norm.weight.dtype != torch.float32:
        return None
    plain = nn.LayerNorm.__new__(nn.LayerNorm)
    plain.__dict__ = norm.__dict__
    features = norm.normalized_shape[0]
    rows = torch.linspace(-1.0, 2.0, 2 * features).sin().view(2, features)
    same = all(torch.allclose(norm(rows * size), plain(rows * size), 1e-4, 1e-4) for size in (1e-3, 1.0, 1e3))
    return plain if same else None


class SwappedMobileViTBlock(Swapped):
    """A ``MobileViTBlock`` whose transformer runs on the map with the fused attention, without unfold and fold."""

    mvk_keeps_layout = True
    mvk_methods = ("_conv_forward", *_METHODS)

    def mvk_sizes(self: Any) -> tuple[int, int] | None:
        """The last convolution's channels, if the first one keeps the sides."""
        last = self.conv_proj if self.fusion is None else self.fusion
        return (last.block.conv.out_channels, 1) if self.local_rep.conv_3x3.block.conv.stride == (1, 1) else None

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """On packed weights. The map comes out laid out as it went in, because the code around is not known."""
        reason, found = _examine(self)
        norms = [] if reason else [*map(_plain_norm, _norms(self))]
        if reason or not all(norms):
            return None
        last, *inside = norms
        each = [
            {**layer, "norm1": norm1, "norm2": norm2, "activation": as_plain(layer["activation"], nn.SiLU)}
            for layer, norm1, norm2 in zip(found, inside[::2], inside[1::2])
        ]
        local, fusion, projection = self.local_rep.conv_3x3, self.fusion, _part(self.conv_proj)
        # What the class of these layers does is known of the projection, which is part of what was compared.
        alike = [m is None or class_of(m) is class_of(self.conv_proj) for m in (local, fusion)]
        into = as_plain(self.local_rep.conv_1x1.block.conv, nn.Conv2d, "_conv_forward")
        if projection is None or layers.resting(into, None, ()) is None:
            return None
        first = None if not alike[0] or not_own(local, class_of(local)) else _part(local)
        convolve = None if first is None else layers.convolution(first, keep)
        plain = fusion is not None and alike[1] and not not_own(fusion, class_of(fusion))
        around = (convolve or local, into, each, last, projection, fusion)
        patch, dim, rows = (self.patch_h, self.patch_w), _dim(self), _on_rows_only(self)
        whole = packed.plan(self, keep, *around, _part(fusion) if plain else None, patch)
        if whole is None:
            return None

        def run(x: Tensor) -> Tensor:
            reason = _ambiguous(x, patch, dim) if rows else ""
            if reason:
                raise RuntimeError(reason)
            out: Tensor = whole(x)
            return out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous()

        return run

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x (B, C, H, W) -> the same shape. For a tuple (video) the original forward runs."""
        layers = layers_for_call(self, x, bool(args or kwargs), _WATCHED, _examine)
        if layers is not None:
            reason = _axis_is_ambiguous(self, x)
            if reason:
                log_once(self, reason)
                layers = None
        if layers is None:
            return self.mvk_original.forward(self, x, *args, **kwargs)
        return _fused(self, x, layers)


def _axis_is_ambiguous(block: Any, x: Tensor) -> str:
    return _ambiguous(x, (block.patch_h, block.patch_w), _dim(block)) if _on_rows_only(block) else ""


def _on_rows_only(block: Any) -> bool:
    """Whether a norm may take another axis than the last."""
    return any(type(m) is not nn.LayerNorm for m in _norms(block))


def _ambiguous(x: Tensor, patch: tuple[int, int], dim: int) -> str:
    patches = -(-x.shape[2] // patch[0]) * -(-x.shape[3] // patch[1])
    if patches == dim:
        return f"with as many patches as features ({patches}) its LayerNorm normalizes over the patches"
    return ""


def _norms(block: Any) -> list[Any]:
    *layers, last = block.global_rep
    return [last, *(norm for layer in layers for norm in (layer.pre_norm_mha[0], layer.pre_norm_ffn[0]))]


def _fused_example(block: Any, x: Tensor) -> Tensor:
    return _fused(block, x, [_layer(layer) for layer in list(block.global_rep)[:-1]])


def _fused(block: Any, x: Tensor, layers: list[dict[str, Any]]) -> Tensor:
    into, out = block.local_rep.conv_1x1.block, block.conv_proj.block
    *_, norm = block.global_rep
    patch = (block.patch_h, block.patch_w)
    y = transform(block.local_rep.conv_3x3(x), into.conv, layers, _Rows(norm), out.conv, patch, block.mvk_backend)  # type: ignore[arg-type]
    for name, part in out._modules.items():
        if name != "conv":
            y = part(y)
    if block.fusion is not None:
        y = block.fusion(torch.cat((x, y), dim=1))
    return y


class _Rows:
    """Calls a norm on rows (pixels, features), whatever the shape of the input."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view(x.shape)


def _examine(block: Any) -> tuple[str, list[dict[str, Any]]]:
    reason = asked(_why_not_now, block) or _drops(block)
    return reason, [] if reason else [_layer(layer) for layer in list(block.global_rep)[:-1]]


def _layer(layer: Any) -> dict[str, Any]:
    norm1, attention, drop = layer.pre_norm_mha
    norm2, fc1, activation, drop1, fc2, drop2 = layer.pre_norm_ffn
    return {
        "norm1": _Rows(norm1),
        "qkv": attention.qkv_proj,
        "proj": attention.out_proj,
        "norm2": _Rows(norm2),
        "fc1": fc1,
        "activation": activation,
        "fc2": fc2,
        "heads": getattr(attention, "num_heads", 1),
        "scale": attention.scaling,
        "proj_dropout": drop,
        "hidden_dropout": drop1,
        "out_dropout": drop2,
    }
