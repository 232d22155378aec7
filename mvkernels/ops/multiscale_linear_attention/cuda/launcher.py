"""multiscale_linear_attention with its convolutions in CUDA C++; the attention is relu_linear_attention's, on Triton.

Forward: ``aggregate`` makes a scale's qkv, both convolutions in one pass; the attention reads the heads of each scale
where they lie in it and writes them where they belong in the output. Nothing is concatenated.
Backward: a scale's qkv is made again; the attention's gradient takes its place; ``weight_sums`` makes the gradients of
the weights of it and of qkv, in two stages; ``map_gradient`` brings it to qkv, and adds it to what is there.
The kernels read 16 bytes at once of a pixel's channels. A map that is not so is copied before, and the gradient of one
with channels first after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mvkernels.cuda.launch import Launch
from mvkernels.dispatch.checks import channels_last, empty_map
from mvkernels.ops.multiscale_linear_attention.cuda.plan import (
    HEAD_DIMS,
    KERNELS,
    NAMES,
    aggregate_launches,
    map_launches,
    most_shared_bytes,
    weight_launches,
)
from mvkernels.ops.multiscale_linear_attention.triton.launcher import why_not as why_not_triton
from mvkernels.ops.multiscale_linear_attention.triton.plan import ScaleProblem
from mvkernels.ops.relu_linear_attention import backward_into, forward_into
from mvkernels.triton import configs
from mvkernels.triton.maps import INT32, needed
from mvkernels.triton.problem import sums_dtype

_BYTES = 16
"""Of a load, and so the alignment of what is read so."""

Biases = Sequence[Tensor | None]


def why_not(qkv: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], head_dim: int, *more: object
            ) -> str | None:  # fmt: skip
    """Why these kernels cannot run a call, or None. Takes the op's checked arguments; never raises."""
    if qkv.device.type != "cuda" or torch.version.hip:
        return f"device type {'hip' if torch.version.hip else qkv.device.type}: want an NVIDIA GPU"
    if qkv.dtype not in NAMES:
        return f"dtype {str(qkv.dtype).removeprefix('torch.')}: want bfloat16, float16, float32"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}: want {' or '.join(map(str, HEAD_DIMS))}"
    sides = {w.shape[-1] for w in depthwise}
    if not sides <= set(KERNELS):
        return f"a depthwise kernel of {max(sides - set(KERNELS))}: want {', '.join(map(str, KERNELS))}"
    if reason := why_not_triton(qkv, depthwise, pointwise, head_dim, *more):
        return reason
    if max(qkv.shape[0] * qkv.shape[1] * qkv.shape[2] * qkv.shape[3] // 64, *qkv.shape[1:]) >= INT32:
        return "more than 2**31 tiles"
    device = configs.device_of(qkv.device.type, qkv.device.index)
    most = max((most_shared_bytes(qkv.dtype, head_dim, side) for side in sides), default=0)
    if most > configs.shared_memory_of(device.arch):
        return f"{most} bytes of shared memory: a block of this GPU has {configs.shared_memory_of(device.arch)}"
    return None


def _run(launches: Sequence[Launch], tensors: Mapping[str, Tensor]) -> None:
    device = next(iter(tensors.values())).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            for each in launches:
                each(tensors, {})
    else:
        for each in launches:
            each(tensors, {})


def _heads(map_: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    # q, k and v of a map (B, 3C, H, W): views (B, heads, head_dim, H, W).
    query, key, value = map_.unflatten(1, (-1, 3, head_dim)).unbind(2)
    return query, key, value


def _aligned(map_: Tensor) -> bool:
    # Whether the kernels may read a map (B, C, H, W) where it is.
    if not channels_last(map_) or map_.data_ptr() % _BYTES:
        return False
    strides = needed(map_.unsqueeze(1).stride(), map_.unsqueeze(1).shape)
    return all(stride * map_.element_size() % _BYTES == 0 for stride in (strides[0], *strides[3:]))


def _empty(like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return like.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _readable(map_: Tensor) -> Tensor:
    return map_ if _aligned(map_) else _empty(map_).copy_(map_)


def _weights(source: Tensor, wide: Tensor, mixing: Tensor, biases: Biases) -> dict[str, Tensor]:
    # What the kernels read of a scale's weights. The pointer of a bias that is not there is not read.
    mixing = mixing.contiguous()
    if mixing.data_ptr() % _BYTES:
        mixing = mixing.clone()
    first, second = (source if b is None else b.contiguous() for b in biases)
    return {"wide": wide.contiguous(), "m": mixing, "wb": first, "mb": second}


def _problem(maps: Mapping[str, Tensor], head_dim: int, kernel: int, biases: Biases) -> ScaleProblem:
    named = [(name, each.unflatten(1, (-1, head_dim))) for name, each in maps.items()]
    given = (biases[0] is not None, biases[1] is not None)
    return ScaleProblem.of(named[0][1], named, False, kernel=kernel, biases=given)


def _aggregate(x: Tensor, head_dim: int, weights: Mapping[str, Tensor], kernel: int, biases: Biases) -> Tensor:
    """A scale of the map x: a map of its size, channels last."""
    maps = {"x": x, "o": _empty(x)}
    _run(aggregate_launches(_problem(maps, head_dim, kernel, biases)), maps | dict(weights))
    return maps["o"]


def forward(
    qkv: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Biases,
    pointwise_bias: Biases,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """qkv (B, 3C, H, W), any strides -> (out (B, (1 + S) C, H, W), dense in qkv's order; sums, contiguous).

    sums (1 + S, B, heads, D + 1, D) are relu_linear_attention's of each scale.
    """
    batch, channels = qkv.shape[0], qkv.shape[1] // 3
    scales, heads = 1 + len(depthwise), channels // head_dim
    out = empty_map(qkv, scales * channels)
    sums = qkv.new_empty((scales, batch, heads, head_dim + 1, head_dim), dtype=sums_dtype(qkv.dtype))
    x = _readable(qkv) if depthwise else qkv
    for scale, part in enumerate(out.unflatten(1, (scales, heads, head_dim)).unbind(1)):
        source = qkv
        if scale:
            i = scale - 1
            wide, biases = depthwise[i], (depthwise_bias[i], pointwise_bias[i])
            source = _aggregate(x, head_dim, _weights(x, wide, pointwise[i], biases), wide.shape[-1], biases)
        forward_into(part, sums[scale], *_heads(source, head_dim), eps)
    return out, sums


def backward(
    grad: Tensor,
    qkv: Tensor,
    sums: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    head_dim: int,
    depthwise_bias: Biases,
    pointwise_bias: Biases,
    eps: float,
    weights: bool,
) -> list[Tensor]:
    """[dqkv, dense in qkv's order; then the gradients of the weights, list by list].

    Empty tensors for what is not there, and for all weights without ``weights``. No atomics: the same bits each time.
    """
    grads = grad.unflatten(1, (1 + len(depthwise), -1, head_dim)).unbind(1)
    in_place = not depthwise or channels_last(qkv)
    dqkv = empty_map(qkv, qkv.shape[1]) if in_place else _empty(qkv)
    backward_into(_heads(dqkv, head_dim), grads[0], *_heads(qkv, head_dim), sums[0], eps)
    x = _readable(qkv) if depthwise else qkv
    found = []
    for i, (wide, mixing) in enumerate(zip(depthwise, pointwise)):
        biases, kernel = (depthwise_bias[i], pointwise_bias[i]), wide.shape[-1]
        held = _weights(x, wide, mixing, biases)
        scale = _aggregate(x, head_dim, held, kernel, biases)
        heads = _heads(scale, head_dim)
        backward_into(heads, grads[1 + i], *heads, sums[1 + i], eps)
        if weights:
            found.append(_weight_gradients(scale, x, head_dim, held, wide, mixing, biases))
        else:
            found.append(tuple(qkv.new_empty(0) for _ in range(4)))
        maps = {"g": scale, "o": dqkv}
        _run(map_launches(_problem(maps, head_dim, kernel, biases)), maps | held)
    if not in_place:
        dqkv = empty_map(qkv, qkv.shape[1]).copy_(dqkv)
    return [dqkv, *(each for kind in zip(*found) for each in kind)]


def _weight_gradients(
    grad: Tensor,
    x: Tensor,
    head_dim: int,
    held: Mapping[str, Tensor],
    wide: Tensor,
    mixing: Tensor,
    biases: Biases,
) -> tuple[Tensor, ...]:
    """The gradients of a scale's four weights, given that of its map; empty for a bias that is not there."""
    maps = {"g": grad, "x": x}
    launches, shape = weight_launches(_problem(maps, head_dim, wide.shape[-1], biases))
    found = [t.new_empty(t.shape) for t in (wide, mixing)]
    found += [x.new_empty(0) if bias is None else bias.new_empty(bias.shape) for bias in biases]
    parts = x.new_empty(shape, dtype=torch.float32)
    _run(launches, maps | dict(held) | {"parts": parts} | dict(zip(("dw", "dm", "dwb", "dmb"), found)))
    return tuple(found)
