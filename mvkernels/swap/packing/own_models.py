"""The modules of mvmodels on packed weights. That package is not imported: its classes are known by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mvkernels.nn import DropPath
from mvkernels.swap.eligibility import class_name, class_of, name_of
from mvkernels.swap.folding import elementwise
from mvkernels.swap.packing import layers, mobilevit
from mvkernels.swap.packing.blocks import InvertedResidual, not_own
from mvkernels.swap.packing.kinds import SAME
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.own import PackingConvNormAct, layers_of, not_known, part_of
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.products import Products, ScaledBlock, active, not_norm
from mvkernels.swap.packing.torch import PackingConv2dAnyLayout
from mvkernels.swap.swapped import Swapped

_SILU = nn.SiLU()
"""For what a block calls as a function."""


def _not_model(part: Any, file: str, name: str) -> str:
    """The part must be of this class of mvmodels, and have its forward and no hooks."""
    kind = class_of(part)
    return not_own(part, kind) if name_of(kind) == (f"mvmodels.{file}", name) else f"it is a {class_name(kind)}"


def _parts(*modules: Any) -> list[Part]:
    """What these ``ConvNorm`` modules are made of; empty if one is more than that now."""
    if any(_not_model(module, "layers", "ConvNorm") for module in modules):
        return []
    return [part_of(module, "activation") for module in modules]


class PackingConvNorm(PackingConvNormAct):
    """A ``ConvNorm``."""

    mvk_calls = ("activation",)


class PackingToChannels(PackingConv2dAnyLayout):
    """``ToChannelsLast`` and ``ToChannelsFirst``, which both give channels-last maps here."""


class PackingInvertedResidual(InvertedResidual):
    """MobileViT's ``InvertedResidual`` in one kernel."""

    @staticmethod
    def mvk_parts(block: Any) -> list[Part]:
        """Empty if a part is more than a convolution with a norm and an activation."""
        return _parts(block.expand, block.depthwise, block.project)

    @staticmethod
    def mvk_adds(block: Any) -> bool:
        """Where the shapes match."""
        adds: bool = block.residual
        return adds

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module is no inverted residual; empty if it is."""
        return not_known(cls.mvk_parts(module)) or super().mvk_why_not(module)

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Of the last two convolutions."""
        return self.project.conv.out_channels, self.depthwise.conv.stride[0]


class PackingMobileViTBlock(Swapped):
    """A whole ``MobileViTBlock``: the concatenation before its last convolution is not made."""

    mvk_calls = ("local",)

    @staticmethod
    def mvk_why_not(block: Any) -> str:
        """Why there is more in the block; empty if there is not."""
        return "" if layers_of(block.transformer) and _parts(block.fusion) else "it has something else in it"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The map keeps its shape."""
        return self.fusion.conv.out_channels, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """As for the MobileViT of other packages."""
        transformer, each = self.transformer, layers_of(self.transformer)
        if not each or not_norm(transformer.norm, each[0]["qkv"]) or layers.resting(self.conv_in, None, ()) is None:
            return None
        fused = next(iter(_parts(self.fusion)), None)
        projection: Part = (self.conv_out, self.norm_out, (_SILU,))
        around = (self.local, self.conv_in, each, transformer.norm, projection, self.fusion, fused)
        return mobilevit.plan(self, keep, *around, transformer.patch_size)


class PackingMlp(Products):
    """An ``Mlp`` of tokens."""

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """The two layers of the MLP."""
        return (module.fc1, None, (module.activation, module.dropout)), (module.fc2, None, (module.dropout,))


class PackingConvMlp(PackingMlp):
    """EfficientFormer's ``ConvMlp``."""

    mvk_axes = 4

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """The two layers with their batch norms."""
        first, last = PackingMlp.mvk_products(module)
        return (first[0], module.norm1, first[2]), (last[0], module.norm2, last[2])


class PackingPoolMixer(Swapped):
    """A ``PoolMixer`` in one pass."""

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """There is nothing in it that could be otherwise."""
        return ""

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The map keeps its shape."""
        return SAME, 1

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """Of dense maps; it has no weights."""

        def run(x: Tensor) -> Tensor:
            if not elementwise.not_fit(x):
                return elementwise.pooled_difference(x)  # type: ignore[no-any-return]
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x

        return run


class _Block(ScaledBlock):
    """What the blocks of two sums share: factors of the channels, perhaps, and one drop path."""

    mvk_mixer = "mixer"
    mvk_calls = ("norm1", "mixer", "norm2")
    mvk_mlp = ("Mlp", PackingMlp)

    @classmethod
    def mvk_products(cls, block: Any) -> Sequence[Part]:
        """Empty if its MLP has more in it."""
        name, form = cls.mvk_mlp
        file = "efficientformer" if name == "ConvMlp" else "layers"
        return () if _not_model(block.mlp, file, name) else form.mvk_products(block.mlp)

    @classmethod
    def mvk_scale(cls, block: Any, i: int) -> Tensor | str | None:
        """None for a block that never has factors."""
        scale = getattr(block, f"scale{i}", None)
        if scale is None:
            return None
        reason = _not_model(scale, "layers", "LayerScale")
        channels = 1 if cls.mvk_axes == 4 else -1
        return reason or ("it is not over the channels" if scale.axis != channels else scale.gamma)

    @staticmethod
    def mvk_paths(block: Any) -> str:
        """Why its drop path is at work; empty if it is not."""
        return active(block.drop_path, DropPath)

    @classmethod
    def mvk_pools(cls, block: Any) -> bool:
        """PoolFormer's and EfficientFormer's do."""
        return not _not_model(getattr(block, cls.mvk_mixer), "layers", "PoolMixer")


class PackingMB3D(_Block):
    """EfficientFormer's ``MB3D``."""


class PackingMB4D(_Block):
    """EfficientFormer's ``MB4D``."""

    mvk_axes = 4
    mvk_mlp = ("ConvMlp", PackingConvMlp)


class PackingPoolFormerBlock(_Block):
    """A ``PoolFormerBlock``, whose products are its own."""

    mvk_axes = 4

    @classmethod
    def mvk_products(cls, block: Any) -> Sequence[Part]:
        """The two layers of the MLP."""
        return PackingMlp.mvk_products(block)

    @staticmethod
    def mvk_last(block: Any) -> Any:
        """The layer of its last product."""
        return block.fc2


class PackingEncoderBlock(_Block):
    """An ``EncoderBlock`` of ViT."""

    mvk_mixer = "attn"
    mvk_calls = ("norm1", "attn", "norm2")


class PackingTransformerBlock(_Block):
    """CoAtNet's ``TransformerBlock`` that does not halve the map."""

    mvk_mixer = "attention"
    mvk_calls = ("norm1", "attention", "norm2")

    @classmethod
    def mvk_why_not(cls, module: Any) -> str:
        """Why such a block is more than two sums; empty if it is not."""
        return "it halves the map" if module.shortcut is not None else super().mvk_why_not(module)

    @staticmethod
    def mvk_paths(block: Any) -> str:
        """That one, and the dropout after the attention."""
        drops = "it may drop" if elementwise.activation_of((block.dropout,)) != 0 else ""
        return drops or _Block.mvk_paths(block)


FORMS = {
    ("mvmodels.layers", "ConvNorm"): PackingConvNorm,
    ("mvmodels.layers", "Mlp"): PackingMlp,
    ("mvmodels.layers", "PoolMixer"): PackingPoolMixer,
    ("mvmodels.layers", "ToChannelsFirst"): PackingToChannels,
    ("mvmodels.layers", "ToChannelsLast"): PackingToChannels,
    ("mvmodels.mobilevit", "InvertedResidual"): PackingInvertedResidual,
    ("mvmodels.mobilevit", "MobileViTBlock"): PackingMobileViTBlock,
    ("mvmodels.efficientformer", "ConvMlp"): PackingConvMlp,
    ("mvmodels.efficientformer", "MB3D"): PackingMB3D,
    ("mvmodels.efficientformer", "MB4D"): PackingMB4D,
    ("mvmodels.poolformer", "PoolFormerBlock"): PackingPoolFormerBlock,
    ("mvmodels.coatnet", "TransformerBlock"): PackingTransformerBlock,
    ("mvmodels.encoder", "EncoderBlock"): PackingEncoderBlock,
}
"""The packing form of each class, by its name."""
