"""Modules that hold parameters, built on the fused ops."""

from mvkernels.nn.mobile_former import (
    DownsampleMobile,
    DropPath,
    DynamicReLU,
    Former,
    FormerToMobile,
    HeadwiseLinear,
    Mobile,
    MobileToFormer,
)
from mvkernels.nn.patch_transformer import PatchTransformer, patch_transformer_layer
from mvkernels.nn.pointwise import pointwise_to_channels_first, pointwise_to_channels_last

__all__ = [
    "DownsampleMobile",
    "DropPath",
    "DynamicReLU",
    "Former",
    "FormerToMobile",
    "HeadwiseLinear",
    "Mobile",
    "MobileToFormer",
    "PatchTransformer",
    "patch_transformer_layer",
    "pointwise_to_channels_first",
    "pointwise_to_channels_last",
]
