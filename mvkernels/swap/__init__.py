"""Swapping the attention modules of an existing model for fused ones.

The public names are the functions ``mvkernels.swap`` and ``mvkernels.verify_swap``. In ``mvkernels``
the name ``swap`` is the function, which hides this package as an attribute: write
``from mvkernels.swap.engine import …`` and not ``import mvkernels.swap.engine as …``.
"""

from mvkernels.swap.engine import swap
from mvkernels.swap.report import SwapEntry, SwapReport
from mvkernels.swap.verification import SwapVerification, verify_swap

__all__ = ["SwapEntry", "SwapReport", "SwapVerification", "swap", "verify_swap"]
