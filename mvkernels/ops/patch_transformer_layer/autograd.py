"""The transformer layer as torch operators and as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.dispatch import checks, flops, library
from mvkernels.dispatch.backend import prepare
from mvkernels.ops.common.groups import patch_pairs
from mvkernels.ops.patch_transformer_layer.reference import patch_transformer_layer as reference

_NAME = "patch_transformer_layer"
TENSORS = 13
"""x and the parameters, which come first among the arguments."""

_INPUTS = "Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight,"
_INPUTS += " Tensor proj_bias, Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor fc1_bias,"
_INPUTS += " Tensor fc2_weight, Tensor fc2_bias"
_SETTINGS = "int heads, int patch_h, int patch_w, float eps, float scale"
_FORWARD = f"({_INPUTS}, {_SETTINGS}, bool save)"
_FORWARD += " -> (Tensor out, Tensor qkv, Tensor attention, Tensor middle)"
_BACKWARD = f"(Tensor grad, Tensor qkv, Tensor attention, Tensor middle, {_INPUTS}, {_SETTINGS})"
_BACKWARD += " -> (" + ", ".join(["Tensor"] * TENSORS) + ")"


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    b, c, height, width = x.shape
    out = checks.empty_map(x, c)
    if not rest[-1]:  # save
        return out, *(x.new_empty(0) for _ in range(3))
    return out, *(x.new_empty((b, height, width, channels)) for channels in (3 * c, c, c))


def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x, *parameters = rest[3 : 3 + TENSORS]
    return checks.empty_map(x, x.shape[1]), *(x.new_empty(0 if p is None else p.shape) for p in parameters)


def _count(x: flops.Shape, *rest: Any) -> int:
    b, channels, height, width = x
    hidden = rest[8][0]  # of fc1_weight
    heads, patch_h, patch_w = rest[TENSORS - 1 : TENSORS + 2]
    maps = (b, heads, channels // heads, height, width)
    products = 2 * b * height * width * channels * (4 * channels + 2 * hidden)
    pairs = patch_pairs((height, width), (height, width), (patch_h, patch_w))
    return products + flops.grouped_attention(maps, maps, pairs)


def _count_backward(grad: flops.Shape, qkv: Any, attention: Any, middle: Any, *inputs: Any) -> int:
    return 2 * _count(*inputs)


def launcher() -> Any:
    """The module that launches the Triton kernels, imported only here."""
    from mvkernels.ops.patch_transformer_layer.triton import launcher

    return launcher


def cuda_launcher() -> Any:
    """The module that launches Triton's kernels with the attention in CUDA C++, imported only here."""
    from mvkernels.ops.patch_transformer_layer.cuda import launcher

    return launcher


KERNELS = {
    backend: library.pair(
        backend, _NAME, (_FORWARD, _BACKWARD), (_fake_forward, _fake_backward), (_count, _count_backward), each
    )
    for backend, each in (("triton", launcher), ("cuda", cuda_launcher))
}


class PatchTransformerLayerFunction(torch.autograd.Function):
    """Autograd function of :func:`mvkernels.patch_transformer_layer`, with a backward of its own.

    Call ``apply(x, ..., fc2_bias, heads, patch_size, eps, scale, activation, packed, backend)``. Shapes, dtypes, result
    and errors are those of the op, but that no kernel without a backward is taken; the arguments after ``heads`` may be
    left out. A further argument, ``checked``, is for internal use: the op sets it when it has checked the arguments and
    chosen the backend. For the backward, x, the parameters, the packed qkv, the output of attention and the map between
    the two halves of the layer are saved, but neither the outputs of the norms nor the hidden activations. A second
    derivative raises RuntimeError unless the backend is "reference".
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # type: ignore[override]
        given = (*arguments, *(None, (2, 2), 1e-5, None, "silu", None, None, False)[len(arguments) - TENSORS :])
        values, (backend, checked) = given[:-2], given[-2:]
        if not checked:
            backend, values = prepare(_NAME, backend, *values)
        tensors, settings = values[:TENSORS], values[TENSORS:-1]
        heads, (ph, pw), eps, scale, _ = settings
        ctx.settings, ctx.backend, ctx.count = settings, backend, len(arguments)
        if backend == "reference":
            ctx.save_for_backward(*tensors)
            return reference(*tensors, *settings)
        out, *saved = KERNELS[backend][0](*tensors, heads, ph, pw, eps, scale, True)
        ctx.save_for_backward(*tensors, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.saved_tensors  # once: under torch.utils.checkpoint a second reading is an error
        inputs, saved = kept[:TENSORS], kept[TENSORS:]
        wanted = ctx.needs_input_grad[:TENSORS]
        if ctx.backend == "reference":
            grads = library.differentiate(lambda *t: reference(*t, *ctx.settings), grad, inputs, wanted)
        else:
            heads, (ph, pw), eps, scale, _ = ctx.settings
            arguments = (grad, *saved, *inputs, heads, ph, pw, eps, scale)
            grads = library.gradients(_NAME, KERNELS[ctx.backend][1], arguments, inputs, wanted)
        return (*grads, *[None] * (ctx.count - TENSORS))
