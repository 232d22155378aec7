"""Fused attention kernels for mobile vision models."""

from mvkernels.dispatch.backend import BackendUnavailable, can_run, use_backend
from mvkernels.ops.conv3x3 import conv3x3, pack_conv3x3
from mvkernels.ops.former_to_mobile import FormerToMobileFunction, former_to_mobile
from mvkernels.ops.inverted_residual import inverted_residual, pack_inverted_residual
from mvkernels.ops.mobile_to_former import MobileToFormerFunction, mobile_to_former
from mvkernels.ops.multiscale_linear_attention import MultiscaleLinearAttentionFunction, multiscale_linear_attention
from mvkernels.ops.patch_attention import PatchAttentionFunction, patch_attention
from mvkernels.ops.patch_transformer_layer import (
    PatchTransformerLayerFunction,
    pack_patch_transformer_layer,
    patch_transformer_layer,
)
from mvkernels.ops.pointwise import pack_pointwise, pointwise
from mvkernels.ops.relu_linear_attention import ReLULinearAttentionFunction, relu_linear_attention
from mvkernels.ops.window_attention import WindowAttentionFunction, window_attention
from mvkernels.swap import swap, verify_swap
from mvkernels.version import __version__

from mvkernels import nn, testing  # isort: skip  (they use what is above)

__all__ = [
    "BackendUnavailable",
    "FormerToMobileFunction",
    "MobileToFormerFunction",
    "MultiscaleLinearAttentionFunction",
    "PatchAttentionFunction",
    "PatchTransformerLayerFunction",
    "ReLULinearAttentionFunction",
    "WindowAttentionFunction",
    "__version__",
    "can_run",
    "conv3x3",
    "former_to_mobile",
    "inverted_residual",
    "mobile_to_former",
    "multiscale_linear_attention",
    "nn",
    "pack_conv3x3",
    "pack_inverted_residual",
    "pack_patch_transformer_layer",
    "pack_pointwise",
    "patch_attention",
    "patch_transformer_layer",
    "pointwise",
    "relu_linear_attention",
    "swap",
    "testing",
    "use_backend",
    "verify_swap",
    "window_attention",
]
