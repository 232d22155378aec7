"""GPUs that tests and benchmarks pretend to have."""

from __future__ import annotations

from mvkernels.triton.configs import Device

PRETENDED = {
    "sm_90": Device("NVIDIA H100 80GB HBM3", "sm_90", 132),
    "sm_80": Device("NVIDIA A100-SXM4-80GB", "sm_80", 108),
}
"""By architecture, as their drivers name them."""
