"""What the audit compiles for."""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget

from mvkernels.triton.configs import Device

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device("audit", "sm_80", 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device("audit", "sm_90", 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Device("audit", "sm_100", 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("audit", "gfx942", 304)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32,
          "fp64": torch.float64}  # fmt: skip
"""tf32: float32 maps whose products the user has allowed to round."""
