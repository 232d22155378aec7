"""transformers: PoolFormer's layers on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.models.poolformer.modeling_poolformer import (
    PoolFormerDropPath,
    PoolFormerLayer,
    PoolFormerOutput,
    PoolFormerPooling,
)

from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.pooling import pools
from mvkernels.swap.packing.products import Products, ScaledBlock, active


class PackingPoolFormerOutput(Products):
    """A ``PoolFormerOutput``, the MLP of a layer."""

    mvk_axes = 4

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """The two convolutions."""
        return (module.conv1, None, (module.act_fn,)), (module.conv2, None, ())

    @staticmethod
    def mvk_last(module: Any) -> Any:
        """The layer of its last product."""
        return module.conv2

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """Where nothing is dropped."""
        return None if active(self.drop, PoolFormerDropPath) else super().mvk_plan(keep)


class PackingPoolFormerLayer(ScaledBlock):
    """A ``PoolFormerLayer``, which gives a tuple of the map."""

    mvk_axes = 4
    mvk_mixer = "pooling"
    mvk_norms = ("before_norm", "after_norm")
    mvk_in_tuple = True
    mvk_calls = ("before_norm", "pooling", "after_norm")

    @staticmethod
    def mvk_pools(block: Any) -> bool:
        """Unless its windows are of another size than 3 x 3."""
        return pools(block.pooling, PoolFormerPooling)

    @staticmethod
    def mvk_products(block: Any) -> Sequence[Part]:
        """Empty if its MLP has more in it."""
        return () if not_own(block.output, PoolFormerOutput) else PackingPoolFormerOutput.mvk_products(block.output)

    @staticmethod
    def mvk_scale(block: Any, i: int) -> Tensor | str | None:
        """None where the configuration has none."""
        return getattr(block, f"layer_scale_{i}") if block.use_layer_scale else None

    @staticmethod
    def mvk_paths(block: Any) -> str:
        """Why its drop path, or the one in its MLP, is at work; empty if none is."""
        return active(block.drop_path, PoolFormerDropPath) or active(block.output.drop, PoolFormerDropPath)

    @staticmethod
    def mvk_last(block: Any) -> Any:
        """The layer of its last product."""
        return block.output.conv2

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The two sums, in the tuple that the encoder takes them from."""
        run = super().mvk_plan(keep)
        return None if run is None else lambda x: (run(x),)


FORMS = {PoolFormerOutput: PackingPoolFormerOutput, PoolFormerLayer: PackingPoolFormerLayer}
"""The packing form of each class."""
