"""Faults that kernels have had, planted one at a time into the sums and additions of an op's reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvkernels import testing
from mvkernels.dispatch.registry import Op

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default)
_CONVOLUTIONS = (_aten.convolution.default, _aten.convolution_backward.default)
_REDUCTIONS = (_aten.sum.dim_IntList, _aten.mean.dim)
_SUMS = (*_PRODUCTS, *_CONVOLUTIONS, *_REDUCTIONS, _aten._softmax.default)


def _last(x: Tensor) -> tuple[slice, ...]:
    return (slice(-1, None),) * x.dim()


def _without_last(x: Tensor) -> Tensor:
    """``x`` with a zero in its last place."""
    x = x.clone()
    x[_last(x)] = 0
    return x


def _term(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The last term of a sum is left out: in every element of a product, in one of another sum."""
    args_ = list(args)
    if func in _PRODUCTS:
        args_[-2], args_[-1] = args[-2][..., :-1], args[-1][..., :-1, :]
    elif func is _aten._softmax.default:
        weights = (args[0] - args[0].amax(args[1], keepdim=True)).exp()
        return weights / weights.narrow(args[1], 0, max(weights.shape[args[1]] - 1, 1)).sum(args[1], keepdim=True)
    else:
        args_[0] = _without_last(args[0])
    return func(*args_, **kwargs)


def _tf32(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Operands with the 11 bits of tf32."""

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        return (x.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)

    return func(*map(cut, args), **kwargs)


def _each(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The operation with its results changed."""

    def changed(func: Any, *args: Any, **kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        if isinstance(found, Tensor):
            return change(found)
        return tuple(None if t is None else change(t) for t in found)

    return changed


def _neighbour(x: Tensor) -> Tensor:
    x = x.clone()
    if x.dim() > 1 and x.shape[-2] > 1:
        x[..., -1, :] = x[..., -2, :]
    return x


def _pixel(func: Any, first: Tensor, second: Any, **kwargs: Any) -> Tensor:
    found = func(first, second, **kwargs)
    found[_last(found)] = first.expand(found.shape)[_last(found)]
    return found


# name: (what is wrong, the operations that have it, what they do then)
FAULTS: dict[str, tuple[str, Sequence[Any], Callable[..., Any]]] = {
    "term": ("one term of a sum is left out", _SUMS, _term),
    "half": ("a sum ends up in float16", _SUMS, _each(lambda t: t.half().to(t.dtype))),
    "tf32": ("the operands of a product have 11 bits", (*_PRODUCTS, *_CONVOLUTIONS), _tf32),
    "scale": ("a sum is 1.0001 times too large", _SUMS, _each(lambda t: t * (1 + 1e-4))),
    "row": ("the last row of a product is its neighbour's", (*_PRODUCTS, *_CONVOLUTIONS), _each(_neighbour)),
    "pixel": ("an addition (of a bias, or the residual) misses one element", (_aten.add.Tensor,), _pixel),
    "delta": (
        "the row's sum is not subtracted in the gradient of softmax",
        (_aten._softmax_backward_data.default,),
        lambda func, grad, out, *_: grad * out,
    ),
}


class _Plant(TorchDispatchMode):
    """Counts the places that a fault has, and plants it at one of them, if any is named."""

    def __init__(self, fault: str, place: int | None = None) -> None:
        super().__init__()
        _, self._places, self._wrong = FAULTS[fault]
        self._place, self.count = place, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        of_a_number = func is _aten.add.Tensor and not isinstance(
            args[1], Tensor
        )  # eps: no kernel misses it in one place
        if func not in self._places or of_a_number:
            return func(*args, **kwargs)
        self.count += 1
        return (self._wrong if self.count - 1 == self._place else lambda f, *a, **k: f(*a, **k))(func, *args, **kwargs)


def plant(op: Op, arguments: Mapping[str, Any], faults: Sequence[str] = tuple(FAULTS)) -> Iterator[dict[str, Any]]:
    """Every fault at every place of the reference, forward and backward, held to the criterion as a kernel would be.

    Yields "fault", "place", "effect" (whether any bit of the results differs), "share" (the largest error over what is
    allowed: above 1 the criterion says wrong) and "share_by_pytorch", the same where the error of PyTorch on this
    machine is all that counts.
    """
    wanted = list(testing.tensors_in(arguments))
    held, cotangent = testing.yardstick(op, arguments, wanted)

    def run(mode: _Plant) -> dict[str, Tensor]:
        dtype = cotangent.dtype
        with mode:
            return testing.run(lambda **kw: op.reference(**kw, compute_dtype=dtype), arguments, wanted, cotangent)

    for fault in faults:
        counting = _Plant(fault)
        right = run(counting)
        for place in range(counting.count):
            wrong = run(_Plant(fault, place))
            found = held.compare(wrong)
            pytorch = [
                testing.compare(name, result, held.exact[name], held.baseline[name], testing.factor(name))
                for name, result in wrong.items()
            ]
            yield {
                "fault": fault,
                "place": place,
                "effect": any(not torch.equal(wrong[name], right[name]) for name in right),
                "share": max(each.error / each.allowed for each in found),
                "share_by_pytorch": max(each.error / each.allowed for each in pytorch),
            }
