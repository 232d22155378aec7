"""The modules of :mod:`mvkernels.nn` on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.dispatch import checks
from mvkernels.nn import ConvNormAct, LiteMLA, MBConv, PatchTransformer, Residual, patch_transformer
from mvkernels.nn.efficientvit import aggregate_and_attend
from mvkernels.swap.eligibility import class_of, not_plain
from mvkernels.swap.folding import elementwise
from mvkernels.swap.folding.forms import Folding, both
from mvkernels.swap.packing import layers, mobilevit
from mvkernels.swap.packing.blocks import InvertedResidual, not_own
from mvkernels.swap.packing.kinds import SAME
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.products import not_norm, not_products, products
from mvkernels.swap.swapped import Swapped


class PackingConvNormAct(Folding):
    """A ``ConvNormAct``, perhaps without a norm."""

    mvk_pairs = (("conv", "norm"),)
    mvk_calls = ("act",)

    @classmethod
    def mvk_why_not(cls, module: Any) -> str:
        """Why such a module has nothing to fold or pack; empty if it has."""
        if class_of(module.norm) is nn.Identity:
            return "" if layers.of_convolution(module.conv) in ("pointwise", "conv3x3") else "there is no op for it"
        return super().mvk_why_not(module)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """An activation that the ops do not know is called after them."""
        if class_of(self.norm) is nn.Identity and _not_idle(self.norm):
            return None
        conv, norm, after = part_of(self, *self.mvk_calls)
        run = layers.convolution((conv, norm, after), keep)
        if run is not None:
            return run
        run, (act,) = layers.convolution((conv, norm, ()), keep), after
        return None if run is None else lambda x: act(run(x))

    def forward(self: Any, x: Tensor) -> Tensor:
        """As the original's."""
        conv, norm, after = part_of(self, *self.mvk_calls)
        out = both(self, conv, norm, x, *after)
        return self.mvk_original.forward(self, x) if out is None else out


def part_of(module: Any, act: str = "act") -> Part:
    """What a convolution with a norm and an activation is made of."""
    norm = module.norm
    return module.conv, None if class_of(norm) is nn.Identity else norm, (getattr(module, act),)


def parts_of(*modules: Any) -> list[Part]:
    """What these ``ConvNormAct`` modules are made of; empty if one is more than that now."""
    hooked = any(not_own(m, ConvNormAct) or (class_of(m.norm) is nn.Identity and _not_idle(m.norm)) for m in modules)
    return [] if hooked else [part_of(m) for m in modules]


def _not_idle(module: Any) -> str:
    return not_plain(module, nn.Identity, "it")


def not_known(parts: Sequence[Part]) -> str:
    """Why an activation after these convolutions is none of the ops'; empty if all are."""
    unknown = any(elementwise.activation_of(after) is None for _, _, after in parts)
    return "its activation is not known" if unknown else ""


class PackingMBConv(InvertedResidual):
    """An ``MBConv`` in one kernel, or in two where it has no depthwise convolution."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if a part is more than a convolution with a norm and an activation."""
        modules = (block.inverted_conv, block.depth_conv, block.point_conv)
        return parts_of(*(m for m in modules if m is not None))

    @classmethod
    def mvk_why_not(cls, module: Any) -> str:
        """Why such a block is neither; empty if it is one of them."""
        parts = cls.mvk_parts(module)
        return not_known(parts) or (not_products(parts) if module.depth_conv is None else super().mvk_why_not(module))

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Two 1 x 1 convolutions keep the sides."""
        return self.point_conv.conv.out_channels, 1 if self.depth_conv is None else self.depth_conv.conv.stride[0]

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """By the kernels that there are for its parts."""
        return products(self.mvk_parts(self), keep) if self.depth_conv is None else super().mvk_plan(keep)


class PackingResidual(InvertedResidual):
    """A ``Residual`` around an inverted residual, or around a depthwise and a 1 x 1 convolution, in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if there is something else in it."""
        main = block.main
        if not not_own(main, MBConv):
            return PackingMBConv.mvk_parts(main)
        return parts_of(*main) if not not_own(main, nn.Sequential) and len(main) else []

    @staticmethod
    def mvk_adds(block: Any) -> bool:
        """Always: it is made of a shortcut and a block."""
        return True

    @classmethod
    def mvk_why_not(cls, module: Any) -> str:
        """Why there is no inverted residual in it; empty if there is."""
        parts = cls.mvk_parts(module)
        if not parts or not layers.inverted(parts):
            return "it is no inverted residual"
        first, last = parts[0][0], parts[-1][0]
        same = first.in_channels == last.out_channels and parts[-2][0].stride == (1, 1)
        return not_known(parts) or ("" if same else "what it adds has another shape")

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """It adds its input."""
        return SAME, 1


class PackingLiteMLA(Swapped):
    """A ``LiteMLA`` whose projections run on packed weights."""

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why the projections cannot; empty if they can."""
        return not_products(parts_of(module.qkv, module.proj))

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The projection's channels."""
        return self.proj.conv.out_channels, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The attention as it is, between them."""
        found = [layers.convolution(part, keep) for part in parts_of(self.qkv, self.proj)]
        if not found or not all(found):
            return None
        into: Any = found[0]
        out: Any = found[1]
        channels, settings = self.in_channels, (self.aggreg, self.head_dim, self.eps, self.backend)

        def run(x: Tensor) -> Tensor:
            checks.map_of("LiteMLA", x, channels)
            return out(aggregate_and_attend(into(x), *settings))  # type: ignore[no-any-return]

        return run


class PackingPatchTransformer(Swapped):
    """A ``PatchTransformer`` whose linear layers, with the norms before them, run on packed weights."""

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why they cannot; empty if they can."""
        return "" if layers_of(module) else "a layer has something else in it"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The map keeps its shape."""
        return self.dim, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """Layer after layer, on a channels-last map."""
        found = [mobilevit.layer_of(layer, self.patch_size, None, keep) for layer in layers_of(self)]
        if not found or not all(found):
            return None
        each: list[Any] = found
        norm, dim = self.norm, self.dim

        def run(x: Tensor) -> Tensor:
            checks.map_of("PatchTransformer", x, dim)
            channels_last = x.stride(1) == 1
            x = x.contiguous(memory_format=torch.channels_last)
            for layer in each:
                x = layer(x)
            x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return x if channels_last else x.contiguous()

        return run


def layers_of(transformer: Any) -> list[dict[str, Any]]:
    """The arguments of :func:`mvkernels.nn.patch_transformer_layer` for each layer of a ``PatchTransformer``.

    Empty if a layer has more in it, or is not at rest.
    """
    if not_own(transformer, PatchTransformer) or not_plain(transformer.layers, nn.ModuleList, "it"):
        return []
    found = [*map(_layer, transformer.layers)]
    return [layer for layer in found if layer is not None] if None not in found else []


def _layer(layer: Any) -> dict[str, Any] | None:
    if not_own(layer, patch_transformer._Layer):
        return None
    for norm, linears in ((layer.norm1, (layer.qkv, layer.proj)), (layer.norm2, (layer.fc1, layer.fc2))):
        if any(layers.not_linear(linear) for linear in linears) or not_norm(norm, linears[0]):
            return None
    names: Sequence[str] = ("norm1", "qkv", "proj", "norm2", "fc1", "activation", "fc2", "heads", "backend")
    return {
        **{name: getattr(layer, name) for name in names},
        **dict.fromkeys(("proj_dropout", "hidden_dropout", "out_dropout"), layer.dropout),
    }


FORMS = {
    ConvNormAct: PackingConvNormAct,
    MBConv: PackingMBConv,
    Residual: PackingResidual,
    LiteMLA: PackingLiteMLA,
    PatchTransformer: PackingPatchTransformer,
}
"""The packing form of each class."""
