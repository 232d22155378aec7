"""The inverted residual by PyTorch's own convolutions, in the dtype of the map: what runs where they are faster."""

from __future__ import annotations

from torch import Tensor

from mvkernels.dispatch.checks import lay_as, without_autocast
from mvkernels.ops.inverted_residual.reference import Weights
from mvkernels.ops.inverted_residual.suite import eager


def composed(
    x: Tensor,
    expand: Weights | None,
    depthwise: Weights,
    project: Weights,
    stride: int = 1,
    activation: str | None = "silu",
    residual: bool = False,
    packed: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """As :func:`mvkernels.inverted_residual`, with half types between the convolutions where x is of one."""
    with without_autocast(x.device.type):
        return lay_as(eager(x, expand, depthwise, project, stride, activation, residual), x)
