"""Linear attention as timm and diffusers have it: their own code, on maps whose heads are apart already."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from mvkernels.ops.common.peers import in_float32, package


@cache
def _timm(head_dim: int, eps: float) -> Any:
    return package("timm", "models.efficientvit_mit").LiteMLA(head_dim, head_dim, dim=head_dim, eps=eps)


@cache
def _diffusers(head_dim: int, eps: float) -> Any:
    kind = package("diffusers", "models.attention_processor").SanaMultiscaleLinearAttention
    return kind(head_dim, head_dim, attention_head_dim=head_dim, eps=eps)


def timm(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """The attention of timm's ``LiteMLA``."""
    in_float32("timm", query)
    module = _timm(query.shape[2], eps)
    q, k, v = (m.flatten(3).transpose(-1, -2) for m in (query, key, value))
    out = module._attn(module.kernel_func(q), module.kernel_func(k), pad(v, (0, 1), value=1.0))
    return out.transpose(-1, -2).unflatten(3, query.shape[3:])


def diffusers(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """The attention of diffusers' ``SanaMultiscaleLinearAttention`` (DC-AE), in float32 as its processor has it."""
    in_float32("diffusers", query)
    module = _diffusers(query.shape[2], eps)
    q, k, v = (m.flatten(3).float() for m in (query, key, value))
    out = module.apply_linear_attention(module.nonlinearity(q), module.nonlinearity(k), v)
    return out.to(query.dtype).unflatten(3, query.shape[3:])


THIRD_PARTY = {"timm": timm, "diffusers": diffusers}
