"""Modules that hold parameters, built on the fused ops."""

from mvkernels.nn.patch_transformer import PatchTransformer, patch_transformer_layer
from mvkernels.nn.pointwise import pointwise_to_channels_first, pointwise_to_channels_last

__all__ = [
    "PatchTransformer",
    "patch_transformer_layer",
    "pointwise_to_channels_first",
    "pointwise_to_channels_last",
]
