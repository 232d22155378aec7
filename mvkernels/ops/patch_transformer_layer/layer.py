"""A call of the layer on a GPU: Triton's kernels on rows, PyTorch's products, and between them patch_attention's
kernels, on Triton or in CUDA C++ as the backend says.

| | forward | backward |
| --- | --- | --- |
| norm + qkv | ``linear_rows`` | a plain product, ``norm_backward`` |
| attention | patch_attention's | the same, into a packed dqkv |
| projection + residual | ``linear_rows`` | a plain product |
| norm + feed-forward + residual | ``norm_ffn`` | ``ffn_backward``, a plain product, ``norm_backward`` |

Plain matrix products, those of the weights' gradients among them, are PyTorch's own. What follows from shapes and dtype
is planned once and cached (triton/plan.py); the static audit compiles the very same launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mvkernels.dispatch.checks import empty_map
from mvkernels.dispatch.launches import run
from mvkernels.ops.patch_attention import KERNELS as ATTENTION
from mvkernels.ops.patch_attention import backward_into
from mvkernels.ops.patch_transformer_layer.triton.plan import backward_launches, forward_launches, problem_of

_NAMES = ("x", "norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "norm2_weight",
          "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")  # fmt: skip


Tensors = Sequence[torch.Tensor | None]


def _tensors(given: Tensors) -> dict[str, torch.Tensor]:
    # Contiguous, by name; x as rows (B, H, W, C). For a bias that is not there any tensor will do: it is not read.
    x, *parameters = given
    assert x is not None
    rows = x.permute(0, 2, 3, 1).contiguous()
    found = {"x": rows}
    for name, value in zip(_NAMES[1:], parameters):
        found[name] = rows if value is None else value.contiguous()
    return found


def _maps(packed: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, H, W, 3C) -> query, key and value, (B, heads, D, H, W), views."""
    query, key, value = (part.unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2) for part in packed.chunk(3, dim=-1))
    return query, key, value


def _with_bias(grad: torch.Tensor, normed: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of a weight and its bias, from that of their output, and rows that have a 1 after the channels."""
    both = grad.t().mm(normed)
    return both[:, :channels].contiguous(), both[:, channels].clone()


def _vectors(sums: torch.Tensor, dtype: torch.dtype, channels: int) -> list[torch.Tensor]:
    """Totals of programs' sums, so many channels each. Memory is its own for each: operators return no views."""
    return [each.to(dtype, copy=True) for each in sums.sum(0).split(channels)]


def forward(backend: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """(out, qkv, attention, middle); the last three are empty unless the last argument is True.

    Takes the backend of the attention, the op's 13 tensors, then heads, patch_h, patch_w, eps, scale, save. out lies as
    x does; qkv (B, H, W, 3C), attention and middle (B, H, W, C) are contiguous: what each kernel gives the next, kept
    for :func:`backward`.
    """
    given, (heads, ph, pw, eps, scale, save) = arguments[:13], arguments[13:]
    x = given[0]
    b, c, height, width = x.shape
    tensors = _tensors(given)
    rows = tensors["x"]
    problem = problem_of(x, tensors["fc1_weight"].shape[0], heads, (ph, pw), given[4] is not None)
    to_qkv, project, ffn = forward_launches(problem)
    tensors["qkv"] = rows.new_empty((b, height, width, 3 * c))
    floats = {"eps": eps}
    run([to_qkv], tensors, floats)
    maps = _maps(tensors["qkv"], heads)
    attention = ATTENTION[backend][0](*maps, ph, pw, None, scale)
    tensors["attention"] = attention.permute(0, 3, 4, 1, 2).flatten(-2)
    if not save:
        del tensors["qkv"], maps
    tensors["middle"], tensors["out"] = rows.new_empty(rows.shape), rows.new_empty(rows.shape)
    run([project, ffn], tensors, floats)
    out = tensors["out"].permute(0, 3, 1, 2)
    if x.stride(1) != 1:
        out = empty_map(x, c).copy_(out)
    if not save:
        return out, *(x.new_empty(0) for _ in range(3))
    return out, tensors["qkv"], tensors["attention"], tensors["middle"]


def backward(backend: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """The gradients of the 13 tensors, each dense in the order of its own; an empty one for a bias that is not there.

    Takes the backend of the attention, grad (B, C, H, W) of any strides, forward's three, the op's 13 tensors, then
    heads, patch_h, patch_w, eps, scale. No atomics: the same bits in every run.
    """
    grad, qkv, attention, middle = arguments[:4]
    given, (heads, ph, pw, eps, scale) = arguments[4:17], arguments[17:]
    x = given[0]
    b, c, height, width = x.shape
    tensors = _tensors(given)
    rows = tensors["x"]
    hidden = tensors["fc1_weight"].shape[0]
    problem = problem_of(x, hidden, heads, (ph, pw), given[4] is not None)
    ffn, second, first, programs = backward_launches(problem)
    count = b * height * width
    floats = {"eps": eps}

    def empty(channels: int) -> torch.Tensor:
        return rows.new_empty((count, channels))

    def sums(parts: int) -> torch.Tensor:
        return rows.new_empty((programs, parts * c), dtype=torch.float32)

    tensors |= {"grad": grad.permute(0, 2, 3, 1).contiguous(), "middle": middle}
    tensors |= {"hidden": empty(hidden), "dhidden": empty(hidden)}
    run([ffn], tensors, floats)
    dfc2 = tensors["grad"].view(count, c).t().mm(tensors.pop("hidden"))
    dhidden = tensors.pop("dhidden")
    tensors |= {"dnormed2": dhidden.mm(tensors["fc1_weight"]), "normed2": empty(c + problem.ones)}
    tensors |= {"dmiddle": empty(c), "sums2": sums(4)}
    run([second], tensors, floats)
    dfc1, dfc1_bias = _with_bias(dhidden, tensors.pop("normed2"), c)
    dgamma2, dbeta2, dfc2_bias, dproj_bias = _vectors(tensors.pop("sums2"), x.dtype, c)
    dmiddle = tensors["dmiddle"]
    del dhidden, tensors["grad"], tensors["dnormed2"]

    dproj = dmiddle.t().mm(attention.view(count, c))
    dattention = dmiddle.mm(tensors["proj_weight"]).view(b, height, width, heads, -1).permute(0, 3, 4, 1, 2)
    dqkv = empty(3 * c)
    maps = _maps(qkv, heads)
    dmaps = _maps(dqkv.view(b, height, width, -1), heads)
    backward_into(backend, dmaps, dattention, *maps, ph, pw, None, scale, False, packed=3)
    del dattention
    tensors |= {"dnormed1": dqkv.mm(tensors["qkv_weight"]), "normed1": empty(c + problem.ones)}
    tensors |= {"dx": rows.new_empty(rows.shape), "sums1": sums(2)}
    run([first], tensors, floats)
    dqkv_weight, dqkv_bias = _with_bias(dqkv, tensors["normed1"], c)
    dgamma1, dbeta1 = _vectors(tensors["sums1"], x.dtype, c)
    dx = tensors["dx"].permute(0, 3, 1, 2)
    if x.stride(1) != 1:
        dx = empty_map(x, c).copy_(dx)
    if given[4] is None:
        dqkv_bias = x.new_empty(0)
    return (dx, dgamma1, dbeta1, dqkv_weight, dqkv_bias, dproj, dproj_bias, dgamma2, dbeta2, dfc1, dfc1_bias, dfc2,
            dfc2_bias)  # fmt: skip
