"""timm: MLPs, and blocks with an MLP in them, on packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from timm.layers import ConvMlp, DropPath, LayerScale, LayerScale2d, Mlp, SEModule
from timm.models import efficientformer, levit, maxxvit, metaformer, tiny_vit
from torch import Tensor, nn

from mvkernels.swap.eligibility import class_of, not_elementwise, not_plain
from mvkernels.swap.folding import elementwise
from mvkernels.swap.folding.timm import after
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.kinds import SAME, following, of_convolution, stride_of_pool
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.pooling import pools
from mvkernels.swap.packing.products import (
    Products,
    ScaledBlock,
    active,
    convolutions,
    not_products,
)
from mvkernels.swap.packing.squeezed import Squeeze, squeezed
from mvkernels.swap.swapped import Swapped


class PackingMlp(Products):
    """An ``Mlp`` of Linears or 1 x 1 convolutions."""

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """Empty if it has a norm."""
        if not_plain(module.norm, nn.Identity, "the norm"):
            return ()
        return (module.fc1, None, (module.act, module.drop1)), (module.fc2, None, (module.drop2,))


class PackingConvMlp(Products):
    """A ``ConvMlp``, perhaps with a batch norm."""

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """Empty if it has a norm of another kind."""
        norm = None if class_of(module.norm) is nn.Identity else module.norm
        if norm is None and not_plain(module.norm, nn.Identity, "the norm"):
            return ()
        if norm is not None and not isinstance(norm, nn.BatchNorm2d):
            return ()
        return (module.fc1, norm, (*after(norm), module.act, module.drop)), (module.fc2, None, ())


class PackingNormMlp(Products):
    """TinyViT's ``NormMlp``."""

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """The two layers of the MLP."""
        return (module.fc1, None, (module.act, module.drop1)), (module.fc2, None, (module.drop2,))

    @staticmethod
    def mvk_norm(module: Any) -> Any:
        """The LayerNorm that it begins with."""
        return module.norm


class PackingLevitMlp(Products):
    """A ``LevitMlp``, of tokens or of maps."""

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """Empty if a part is more than a product with a batch norm."""
        kinds = (levit.ConvNorm, levit.LinearNorm)
        for part in (module.ln1, module.ln2):
            if not_own(part, next((kind for kind in kinds if kind is class_of(part)), kinds[0])):
                return ()
        first, last = module.ln1, module.ln2
        return (first.linear, first.bn, (module.act, module.drop)), (last.linear, last.bn, ())

    @staticmethod
    def mvk_last(module: Any) -> Any:
        """The layer of its last product."""
        return module.ln2.linear


class PackingLinearNorm(Products):
    """LeViT's ``LinearNorm``."""

    mvk_axes = 3

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """The Linear with its batch norm."""
        return ((module.linear, module.bn, ()),)

    @staticmethod
    def mvk_last(module: Any) -> Any:
        """The layer of its last product."""
        return module.linear


class PackingMetaFormerBlock(ScaledBlock):
    """A block of PoolFormer, or another ``MetaFormerBlock`` with an activation known here."""

    mvk_calls = ("norm1", "token_mixer", "norm2")

    @staticmethod
    def mvk_pools(block: Any) -> bool:
        """PoolFormer's does."""
        return pools(block.token_mixer, metaformer.Pooling)

    @staticmethod
    def mvk_products(block: Any) -> Sequence[Part]:
        """Empty if its MLP has more in it, or the block scales its input."""
        plain = [block.res_scale1, block.res_scale2]
        if any(not_plain(part, nn.Identity, "it") for part in plain) or not_own(block.mlp, Mlp):
            return ()
        return PackingMlp.mvk_products(block.mlp)

    @staticmethod
    def mvk_scale(block: Any, i: int) -> Tensor | str | None:
        """None for an Identity."""
        scale = getattr(block, f"layer_scale{i}")
        if class_of(scale) is nn.Identity:
            return not_plain(scale, nn.Identity, "it") or None
        return not_own(scale, metaformer.Scale) or scale.scale

    @staticmethod
    def mvk_paths(block: Any) -> str:
        """Why one of its two drop paths is at work; empty if none is."""
        return active(block.drop_path1, DropPath) or active(block.drop_path2, DropPath)


def factors_of(scale: Any, kind: type[nn.Module]) -> Tensor | str:
    """The factors of a layer scale of this class, or why it is another or not plain."""
    return not_own(scale, kind) or ("it changes its input" if scale.inplace else scale.gamma)


class _EfficientFormerBlock(ScaledBlock):
    """What EfficientFormer's two blocks share."""

    @staticmethod
    def mvk_scale(block: Any, i: int) -> Tensor | str | None:
        """The factors of ``ls1`` or ``ls2``."""
        scale = getattr(block, f"ls{i}")
        return factors_of(scale, LayerScale if class_of(scale) is LayerScale else LayerScale2d)

    @staticmethod
    def mvk_paths(block: Any) -> str:
        """Why one of its two drop paths is at work; empty if none is."""
        return active(block.drop_path1, DropPath) or active(block.drop_path2, DropPath)


class PackingMetaBlock2d(_EfficientFormerBlock):
    """EfficientFormer's ``MetaBlock2d``."""

    @staticmethod
    def mvk_pools(block: Any) -> bool:
        """Whether its token mixer is the pooling of 3 x 3 neighbours."""
        return pools(block.token_mixer, efficientformer.Pooling)

    @staticmethod
    def mvk_products(block: Any) -> Sequence[Part]:
        """Empty if a norm is none that a convolution can do the work of."""
        mlp = block.mlp
        if not_own(mlp, efficientformer.ConvMlpWithNorm):
            return ()
        if not (isinstance(mlp.norm1, nn.BatchNorm2d) and isinstance(mlp.norm2, nn.BatchNorm2d)):
            return ()
        first = (mlp.fc1, mlp.norm1, (*after(mlp.norm1), mlp.act, mlp.drop))
        return first, (mlp.fc2, mlp.norm2, (*after(mlp.norm2), mlp.drop))


class PackingMetaBlock1d(_EfficientFormerBlock):
    """EfficientFormer's ``MetaBlock1d``."""

    mvk_axes = 3
    mvk_calls = ("norm1", "token_mixer", "norm2")

    @staticmethod
    def mvk_products(block: Any) -> Sequence[Part]:
        """Empty if its MLP has more in it."""
        return () if not_own(block.mlp, Mlp) else PackingMlp.mvk_products(block.mlp)


class PackingMbConvBlock(Swapped):
    """A ``MbConvBlock`` of CoAtNet and MaxViT in two kernels, or with norm, activation and the sum in its 1 x 1
    convolutions."""

    mvk_calls = ("shortcut", "pre_norm", "down", "conv2_kxk", "se_early", "norm2", "se")

    @staticmethod
    def mvk_why_not(block: Any) -> str:
        """Why such a block has no two products; empty if it has."""
        return not_products(_of_mbconv(block))

    def mvk_sizes(self: Any) -> tuple[int, int] | None:
        """Where nothing but a pool and a depthwise convolution of odd width makes the map smaller."""
        conv, down = self.conv2_kxk, self.down
        depthwise = class_of(conv) is nn.Conv2d and layers.of_convolution(conv) == "depthwise"
        pooled = 1 if class_of(down) is nn.Identity else stride_of_pool(down.pool)
        stride = None if pooled is None or not depthwise else following(pooled, conv.stride[0])
        return None if stride is None else (self.conv3_1x1.out_channels, stride)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """Where not all of it is known, the depthwise convolution and what stands around it as modules."""
        whole = _whole_mbconv(self, keep)
        if whole is not None:
            return whole
        first, last = _of_mbconv(self)
        widen, narrow = layers.multiplication(first[0], keep, first[2], None, first[1]), None
        if not active(self.drop_path, DropPath):
            narrow = layers.multiplication(last[0], keep)
        if widen is None or narrow is None:
            return None
        shortcut = self.shortcut
        before, between = (self.pre_norm, self.down), (self.conv2_kxk, self.se_early, self.norm2, self.se)

        def run(x: Tensor) -> Tensor:
            residual = shortcut(x)
            for module in before:
                x = module(x)
            x = widen(x)
            for module in between:
                x = x if module is None else module(x)
            return narrow(x, residual)

        return run


def _of_mbconv(block: Any) -> Sequence[Part]:
    return (block.conv1_1x1, block.norm1, after(block.norm1)), (block.conv3_1x1, None, ())


def _whole_mbconv(block: Any, keep: Keep) -> Run | None:
    """A block in two kernels, with its shortcut as a module; None if there is more in it."""
    squeeze = None if block.se is None else _of_squeeze(block.se)
    if (
        block.se_early is not None
        or (block.se is not None and squeeze is None)
        or not_plain(block.down, nn.Identity, "it")
        or elementwise.activation_of(after(block.pre_norm)) != 0
        or active(block.drop_path, DropPath)
    ):
        return None
    first, last = _of_mbconv(block)
    middle = (block.conv2_kxk, block.norm2, after(block.norm2))
    branch, shortcut = squeezed(first, middle, squeeze, last, keep, block.pre_norm), block.shortcut
    return None if branch is None else lambda x: branch(x, shortcut(x))


def _of_squeeze(se: Any) -> Squeeze | None:
    """A plain squeeze and excitation; None if it is another gate."""
    if not_own(se, SEModule) or se.add_maxpool or not_plain(se.bn, nn.Identity, "it"):
        return None
    if not_elementwise(se.act, "it") or not_elementwise(se.gate, "it"):
        return None
    return se.fc1, se.act, se.fc2, se.gate


class PackingStem(Swapped):
    """A sequence of convolutions, norms and activations, each three of them one op."""

    @staticmethod
    def mvk_why_not(module: Any) -> str:
        """Why such a module is not that; empty if it is."""
        parts = _of_sequence(module)
        known = parts and all(of_convolution(conv) in ("pointwise", "conv3x3") for conv, _, _ in parts)
        return "" if known else "it is no sequence of convolutions"

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The last convolution's channels, and the product of the strides."""
        outputs, stride = SAME, 1
        for module in self:
            conv = getattr(module, "linear", module)
            if isinstance(conv, nn.Conv2d):
                outputs, stride = conv.out_channels, stride * conv.stride[0]
        return outputs, stride

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """One op after the other."""
        return convolutions(_of_sequence(self), keep)


def _of_sequence(modules: Iterable[nn.Module]) -> list[Part]:
    """The convolutions with what is called after them; empty if there is something else before the first."""
    parts: list[Part] = []
    for module in modules:
        if class_of(module) is nn.Conv2d:
            parts.append((module, None, ()))
        elif not not_own(module, levit.ConvNorm):
            parts.append((module.linear, module.bn, ()))
        elif not parts:
            return []
        else:
            conv, norm, then = parts[-1]
            first = norm is None and not then and isinstance(module, nn.BatchNorm2d)
            parts[-1] = (conv, module, after(module)) if first else (conv, norm, (*then, module))
    return parts


FORMS = {
    Mlp: PackingMlp,
    ConvMlp: PackingConvMlp,
    tiny_vit.NormMlp: PackingNormMlp,
    levit.LevitMlp: PackingLevitMlp,
    levit.LinearNorm: PackingLinearNorm,
    levit.Stem8: PackingStem,
    levit.Stem16: PackingStem,
    efficientformer.Stem4: PackingStem,
    efficientformer.MetaBlock1d: PackingMetaBlock1d,
    efficientformer.MetaBlock2d: PackingMetaBlock2d,
    metaformer.MetaFormerBlock: PackingMetaFormerBlock,
    maxxvit.MbConvBlock: PackingMbConvBlock,
}
"""The packing form of each class."""
