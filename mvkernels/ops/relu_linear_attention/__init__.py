"""ReLU linear attention (EfficientViT, DC-AE, Sana). Its cost grows linearly with the number of pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, extension, library
from mvkernels.dispatch.backend import REFUSED, choose, direct
from mvkernels.dispatch.registry import Op, register
from mvkernels.ops.relu_linear_attention import suite
from mvkernels.ops.relu_linear_attention.autograd import INFERENCE, KERNELS, ReLULinearAttentionFunction, launcher
from mvkernels.ops.relu_linear_attention.reference import relu_linear_attention as reference
from mvkernels.ops.relu_linear_attention.third_party import THIRD_PARTY

__all__ = [
    "OP",
    "ReLULinearAttentionFunction",
    "backward_into",
    "forward_into",
    "relu_linear_attention",
    "why_not_triton",
]

_NAME = "relu_linear_attention"


def relu_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float = 1e-15,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """ReLU linear attention over all pixels of a feature map.

    Pixel j has the weight relu(q_i) . relu(k_j) for pixel i, and the weights are divided by their sum::

        out_i = sum_j (relu(q_i) . relu(k_j)) v_j / (sum_j relu(q_i) . relu(k_j) + eps)

    There is no softmax and no scale. The sums over j are the same for all i and are computed once, so the cost grows
    linearly with the number of pixels. EfficientViT (the one from MIT, arXiv 2205.14756, section 3.1), the DC-AE
    autoencoders and Sana use this attention.

    Args:
        query, key, value: feature maps (B, heads, head_dim, H, W) of one dtype, on one device, with any strides.
        eps: added to the divisor. Models differ: timm uses 1e-5, the other implementations use 1e-15.
        process_group: a ``torch.distributed.ProcessGroup`` whose ranks share the pixels of one map. Each rank passes
            its own part of the map and gets the same part of the result. H and W may differ between ranks; B, heads
            and head_dim may not. The forward and the backward each run one all-reduce of
            (B, heads, head_dim + 1, head_dim) numbers. The all-reduce of the backward waits for all ranks, so either
            every rank or no rank must ask for the gradient of its key or value.
        backend: "reference", "cpp", "triton" or "cuda". None takes the fastest one that can run this call (see
            :mod:`mvkernels.dispatch.backend`). Only "reference" supports a process_group.

    Returns:
        Feature map (B, heads, head_dim, H, W) in the dtype of the inputs (float32, float16, bfloat16 or float64). The
        result is dense: channels-last if the stride of the query over head_dim is 1, else channels-first. Sums and
        division are computed in float32 or higher, so float16 does not overflow. A pixel whose query has no positive
        entry gets 0.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, eps is not a number, or process_group is not a
            process group.
        ValueError: shapes do not match, dtypes or devices differ, or heads, head_dim, H or W is 0.
        BackendUnavailable: the backend that was asked for cannot run this call.
    """
    recording = direct(backend, query, key, value) if process_group is None else None
    if recording is not None and type(eps) is float:
        try:
            if recording:
                return _record(query, key, value, eps, "cpp", _keep)
            return _infer(query, key, value, eps)
        except REFUSED:  # the checks say why
            pass
    arguments = _check(query, key, value, eps)
    if process_group is not None:
        from mvkernels.ops.relu_linear_attention import sequence_parallel

        query, key, value, eps = arguments
        return sequence_parallel.attention(query, key, value, eps, process_group, backend)
    chosen = choose(OP, backend, arguments)
    if chosen == "reference":
        return reference(*arguments)
    query, key, value, eps = arguments
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return ReLULinearAttentionFunction.apply(query, key, value, eps, chosen, KERNELS[chosen][0])
    return INFERENCE[chosen](query, key, value, eps)


_infer, _keep = library.at_once(INFERENCE["cpp"]), library.at_once(KERNELS["cpp"][0])
_record = library.recorder(ReLULinearAttentionFunction)


def _check(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> tuple[Any, ...]:
    query, key, value = checks.autocast(query, key, value)  # type: ignore[assignment]
    if not checks.alike(query, key, value):
        checks.tensors(_NAME, query=query, key=key, value=value)
    shape = query.shape
    if len(shape) != 5 or key.shape != shape or value.shape != shape or 0 in shape[1:]:
        _check_shapes(query, key, value)
    return query, key, value, checks.number(_NAME, "eps", eps, 1e-15)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.rank(_NAME, name, tensor, "(B, heads, head_dim, H, W)")
    checks.same(_NAME, "key", key, "query", query, range(5))
    checks.same(_NAME, "value", value, "query", query, range(5))
    checks.not_empty(_NAME, "query", query, heads=1, head_dim=2, H=3, W=4)


def _why_not_cpp(query: Tensor, *_: Any) -> str | None:
    return extension.why_not(query, head_dim=query.shape[2])


def forward_into(*arguments: Any) -> None:
    """The Triton forward for other ops: see the launcher's ``forward_into``."""
    launcher().forward_into(*arguments)


def backward_into(*arguments: Any) -> None:
    """The Triton backward for other ops: see the launcher's ``backward_into``."""
    launcher().backward_into(*arguments)


why_not_triton = library.why_not(launcher)

OP = register(
    Op(
        name=_NAME,
        function=relu_linear_attention,
        reference=reference,
        check=_check,
        maps=("query", "key", "value"),
        why_not={"cpp": _why_not_cpp, "triton": why_not_triton},
        suite=suite.cases,
        peers=suite.PEERS,
        cost=suite.cost,
        third_party=THIRD_PARTY,
    )
)
