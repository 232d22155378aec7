"""Fused attention kernels for mobile vision models."""

from mvkernels.backend import BackendUnavailable, can_run, use_backend
from mvkernels.ops.patch_attention import PatchAttentionFunction, patch_attention
from mvkernels.version import __version__



__all__ = [
    "BackendUnavailable",
    "PatchAttentionFunction",
    "__version__",
    "can_run",
    "patch_attention",
    "use_backend",
]
