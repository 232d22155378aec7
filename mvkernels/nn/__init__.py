"""PyTorch modules (layers with parameters) that call the fused ops."""

from mvkernels.nn.efficientvit import ConvNormAct, EfficientViTBlock, LiteMLA, MBConv, Residual
from mvkernels.nn.fused_layer import fused_layers
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
    "ConvNormAct",
    "DownsampleMobile",
    "DropPath",
    "DynamicReLU",
    "EfficientViTBlock",
    "Former",
    "FormerToMobile",
    "HeadwiseLinear",
    "LiteMLA",
    "MBConv",
    "Mobile",
    "MobileToFormer",
    "PatchTransformer",
    "Residual",
    "fused_layers",
    "patch_transformer_layer",
    "pointwise_to_channels_first",
    "pointwise_to_channels_last",
]
