"""What the ops of softmax attention inside groups of pixels share: their torch operators, and their derivative."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor

from mvkernels.cuda import choice
from mvkernels.dispatch import checks, extension, flops, library
from mvkernels.dispatch.backend import prepare
from mvkernels.dispatch.exporting import exporting
from mvkernels.triton.problem import key_dtype, precision_of

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def _fake_forward(query, key, value, *_):  # type: ignore[no-untyped-def]
    return checks.empty_map(query, value.shape[2])


def _fake_backward(grad, query, key, value, *settings):  # type: ignore[no-untyped-def]
    maps = tuple(checks.empty_map(m, m.shape[2]) for m in (query, key, value))
    bias, _, need_bias = settings[-3:]
    return *maps, bias.new_empty(bias.shape) if need_bias else query.new_empty(0)


def operators(
    name: str, sizes: str, pairs: Callable[..., int], triton: Callable[[], Any], cuda: Callable[[], Any]
) -> dict[str, Pair]:
    """An op's forward and backward on each backend.

    ``sizes`` declares what says which pixels are a group, ``int patch_h, int patch_w``. ``pairs`` takes the sizes of
    the query and of the key map, and these numbers, and counts pairs. ``triton`` and ``cuda`` import the launchers.
    """
    maps, settings = "Tensor query, Tensor key, Tensor value", f"{sizes}, Tensor? bias, float scale"
    schemas = (
        f"({maps}, {settings}) -> Tensor",
        f"(Tensor grad, {maps}, {settings}, bool need_bias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    )
    given = sizes.count(",") + 1

    def count(query, key, value, *numbers):  # type: ignore[no-untyped-def]
        return flops.grouped_attention(query, value, pairs(query[3:], key[3:], *numbers[:given]))

    def count_backward(grad, *forward):  # type: ignore[no-untyped-def]
        return 2 * count(*forward)

    counts, fakes = (count, count_backward), (_fake_forward, _fake_backward)
    launchers = {"cpp": triton, "triton": triton, "cuda": cuda}
    return {
        backend: library.pair(backend, name, schemas, fakes, counts, launcher)
        for backend, launcher in launchers.items()
    }


def check(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    unequal: bool = False,
    why_equal: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The op's tensors, as autocast wants them; raises TypeError or ValueError. Sizes of the bias are the op's own.

    With ``unequal`` the key and value maps may have another H and W than the query map; ``why_equal`` is what to say
    where they have and may not.
    """
    query, key, value, bias = checks.autocast(query, key, value, bias)  # type: ignore[assignment]
    given = (query, key, value) if bias is None else (query, key, value, bias)
    if not checks.alike(*given):
        checks.tensors(op, **dict(zip(("query", "key", "value", "bias"), given)))
    shape = tuple(query.shape)  # slicing a torch.Size costs as much as all of the other checks
    # In an export a question whether two sizes are equal would become a condition that they are, or are not.
    open_sizes = unequal and exporting()
    if open_sizes or len(shape) != 5 or key.shape != shape or value.shape != shape or 0 in shape[1:]:
        for name, tensor, axes in (
            ("query", query, "(B, heads, head_dim, H, W)"),
            ("key", key, "(B, heads, head_dim, H, W)"),
            ("value", value, "(B, heads, value_dim, H, W)"),
        ):
            checks.rank(op, name, tensor, axes)
        checks.same(op, "key", key, "query", query, range(3))
        if why_equal and key.shape[3:] != query.shape[3:]:
            raise ValueError(f"{op}: key is {checks.shape(key)}, query is {checks.shape(query)}: {why_equal}")
        checks.same(op, "key", key, "query", query, () if unequal else (3, 4))
        checks.same(op, "value", value, "query", query, (0, 1) if unequal else (0, 1, 3, 4))
        checks.same(op, "value", value, "key", key, (3, 4))
        checks.not_empty(op, "query", query, heads=1, head_dim=2, H=3, W=4)
        checks.not_empty(op, "value", value, value_dim=2, H=3, W=4)
    if bias is not None:
        checks.rank(op, "bias", bias, "(heads, N, M)" if unequal else "(heads, N, N)")
    return query, key, value, bias


def why_not_cpp(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    """Why the C++ kernels cannot run an op's checked arguments, or None."""
    return extension.why_not(query, head_dim=query.shape[2], value_dim=value.shape[2])


def choice_key(query: Tensor, value: Tensor, bias: Tensor | None, tokens: int) -> dict[str, int | str]:
    """The key by which "auto" chooses between Triton and CUDA C++; ``tokens`` are those of the largest group."""
    return {
        "n": choice.tokens(tokens),
        "d": choice.channels(query.shape[2]),
        "dv": choice.channels(value.shape[2]),
        "bias": int(bias is not None),
        "dtype": key_dtype(query.dtype, precision_of(query.dtype, query.device.type)),
        "last": int(query.stride(2) == 1),
    }


class Derivative:
    """Forward and backward of an op's autograd Function. No scores are saved, only the op's tensors.

    Args:
        name: the op.
        reference: takes query, key, value, ``groups``, which are pairs that say which pixels are a group, bias, scale.
        kernels: :func:`operators` of the op.
    """

    def __init__(self, name: str, reference: Callable[..., Tensor], kernels: dict[str, Pair]) -> None:
        self.name, self.reference, self.kernels = name, reference, kernels

    def forward(
        self,
        ctx: Any,
        maps: tuple[Tensor, ...],
        groups: tuple[Any, ...],
        bias: Any,
        scale: Any,
        backend: Any,
        kernel: Any,
    ) -> Tensor:
        """Of checked arguments if the op passes the ``kernel`` that it has chosen, else of any."""
        if kernel is None:
            backend, arguments = prepare(self.name, backend, *maps, *groups, bias, scale)
            maps, groups, bias, scale = arguments[:3], arguments[3:-2], arguments[-2], arguments[-1]
        ctx.settings = groups, scale, backend
        ctx.save_for_backward(*maps, bias)
        if backend == "reference":
            return self.reference(*maps, *groups, bias, scale)
        out: Tensor = (kernel or self.kernels[backend][0])(*maps, *chain(*groups), bias, scale)
        return out

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """One gradient for each argument that the Function was applied to."""
        groups, scale, backend = ctx.settings
        saved = ctx.saved_tensors
        place = 3 + len(groups)  # of the bias
        needs = (*ctx.needs_input_grad, False, False)  # as long as the arguments that were passed
        wanted = (*needs[:3], needs[place])
        if backend == "reference":
            grads = library.differentiate(
                lambda q, k, v, bias: self.reference(q, k, v, *groups, bias, scale), grad, saved, wanted
            )
        else:
            *maps, bias = saved
            arguments = (grad, *maps, *chain(*groups), bias, scale, wanted[3])
            grads = library.gradients(self.name, self.kernels[backend][1], arguments, saved, wanted)
        return *grads[:3], *(None for _ in groups), grads[3], None, None, None
