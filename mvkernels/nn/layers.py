"""Small layers of Mobile-Former and other models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropPath(nn.Module):
    """Drop path (stochastic depth): in training, sets whole samples of a residual branch to zero at random.

    Args:
        p: probability of dropping a sample, 0 <= p < 1. The samples that are kept are divided by ``1 - p``.

    Raises:
        ValueError: ``p`` is out of range.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"DropPath: p is {p}, want 0 <= p < 1")
        self.p = p

    @property
    def active(self) -> bool:
        return self.training and self.p > 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) -> the same shape."""
        if not self.active:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1.0 - self.p)
        return x * (keep / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class HeadwiseLinear(nn.Module):
    """A separate Linear for each head, from the head's slice of the input to the head's slice of the output.

    The equations of Mobile-Former (arXiv 2108.05895, section 3.1) project the tokens this way; the authors' code has a
    full Linear instead.

    Args:
        in_features, out_features: widths of the input and the output, multiples of ``heads``.
        heads: number of heads.

    The parameters are weight (out_features, in_features / heads) and bias (out_features,).

    Raises:
        ValueError: ``heads`` does not divide a width.
    """

    def __init__(self, in_features: int, out_features: int, heads: int) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value % heads:
                raise ValueError(f"HeadwiseLinear: {name} is {value}, want a multiple of heads = {heads}")
        self.in_features, self.out_features, self.heads = in_features, out_features, heads
        self.weight = nn.Parameter(torch.empty(out_features, in_features // heads))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        weight = self.weight.unflatten(0, (self.heads, -1))
        out = torch.einsum("...hi,hoi->...ho", x.unflatten(-1, (self.heads, -1)), weight)
        return out.flatten(-2) + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, heads={self.heads}"


class DynamicReLU(nn.Module):
    """Dynamic ReLU (DY-ReLU, arXiv 2003.10027) whose slopes are computed from a token.

    It has two linear pieces without offsets. theta = hsig(fc2(relu(fc1(token)))) has 2C entries in [0, 1], where
    hsig(u) = clamp(u + 3, 0, 6) / 6. Its first half theta₁ gives the slopes a1, its second half theta₂ the slopes a2::

        y = max(a1 x, a2 x),    a1 = 2 theta₁ in [0, 2],    a2 = 2 theta₂ - 1 in [-1, 1]

    With all entries of theta 1/2 this is ReLU.

    Args:
        channels: channels C of the map.
        token_dim: width of the token.
        reduction: ``token_dim`` divided by the hidden width of the two Linears.
    """

    def __init__(self, channels: int, token_dim: int, reduction: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(token_dim, token_dim // reduction)
        self.fc2 = nn.Linear(token_dim // reduction, 2 * channels)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """x (B, C, H, W), token (B, token_dim) -> (B, C, H, W)."""
        theta = F.hardsigmoid(self.fc2(F.relu(self.fc1(token))))
        a1, a2 = (2.0 * theta)[..., None, None].chunk(2, dim=1)
        return torch.maximum(x * a1, x * (a2 - 1.0))
