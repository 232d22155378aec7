"""What rounding errors PyTorch is expected to make with a formula in a dtype, the same on every machine.

The floor of the error criterion (:func:`mvkernels.testing.compare`) comes from here. docs/numerics.md derives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_SIGNS = 1_000_003
"""So many signs are drawn for a tensor, and repeated: a processor takes seconds for those of the scores of a batch."""


class ExpectedRounding(TorchDispatchMode):
    """Inside it every operation is exact and rounded once, and a sum of n terms is off by what is to be expected.

    An operation is computed in float64, from operands in the dtype that the code gives them, and rounded to the
    dtype of its result. To a sum of terms t an error of random sign is added before, of the size
    ``u sqrt(2 (n - 1) / 27) sqrt(2 (sum t)^2 + sum t^2)``: nearly the standard deviation of what is left where they are
    added one after the other. n counts the terms whose factors are more than u times the largest of their tensors: one
    that is less rounds away without a trace. u is the unit roundoff of float32, or of float64 for that. The signs
    follow from ``seed``.

    Sums are those of products of matrices, convolutions, sum, mean and softmax, and of their gradients. Another
    operation that sums inside is taken for exact.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
        if not operands or func.is_view or func._schema.is_mutable or func in _MOVES:
            return func(*args, **kwargs)
        dtype = _dtype(func, args, operands) if kwargs.get("dtype") is None else kwargs.pop("dtype")
        args, kwargs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
        if func in _SUMS:
            found = _SUMS[func](_Sums(self._generator, dtype), func, *args, **kwargs)
        else:
            found = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == torch.float64 else t, found)


class Tf32Products(TorchDispatchMode):
    """Inside it float32 operands of matrix products and convolutions are those that tf32 has nearest to them.

    What PyTorch may do where the user allows tf32: whether it does depends on the size of a product and the device.
    With a ``seed`` each operand is off by as much as its rounding, but up or down at random: one of the errors that
    are to be expected of a formula whose steps are taken differently.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def _operand(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        rounded = to_tf32(x)
        if self._generator is None:
            return rounded
        signs = _signs(x, self._generator).to(x.dtype)
        return torch.where(x.isfinite(), x + signs * (rounded - x), x)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            operands = _PRODUCTS[func]
            args = tuple(self._operand(a) if i in operands else a for i, a in enumerate(args))
        return func(*args, **(kwargs or {}))


def to_tf32(x: Tensor) -> Tensor:
    """The nearest number with 10 bits of fraction, ties away from 0; what is no float32, or not finite, as it is."""
    if x.dtype != torch.float32:
        return x
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


_PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
    _aten.convolution.default: (0, 1),
    _aten.convolution_backward.default: (0, 1, 2),
}
"""Which arguments are operands."""


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1 at random for each element, in float64; drawn on the CPU, to be the same on every device."""
    count = min(like.numel(), _SIGNS)
    signs = torch.randint(2, (count,), generator=generator, dtype=torch.float64).mul_(2).sub_(1).to(like.device)
    if count < like.numel():
        signs = signs.repeat(-(-like.numel() // count))[: like.numel()]
    return signs.view(like.shape)


def _dtype(func: Any, args: Sequence[Any], operands: Sequence[Tensor]) -> torch.dtype:
    """That of the result, by PyTorch's rules."""
    if func is _aten._softmax.default and args[2]:
        return torch.float32
    if func is _aten._softmax_backward_data.default:
        return args[3]
    return torch.result_type(operands[0], operands[-1])


class _Sums:
    """How sums go wrong whose results have a dtype: they are float32 at least."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self.generator = generator
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.unit = torch.finfo(self.dtype).eps / 2

    def rounded(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).double()

    def off(self, total: Tensor, count: Tensor, squares: Tensor) -> Tensor:
        """The sum of some terms with its error, ``count`` being how many count and ``squares`` the sum of t^2."""
        size = self.unit * ((count - 1).clamp(min=0) * 2 / 27 * (2 * total.square() + squares)).sqrt()
        return total + _signs(total, self.generator) * size

    def counts(self, factors: Tensor) -> Tensor:
        """1 where a factor is large enough to count, else 0."""
        sizes = factors.abs()
        return (sizes > self.unit * sizes.max()).to(factors.dtype) if factors.numel() else factors

    def over(self, terms: Tensor, dim: int) -> Tensor:
        """The sum over a dimension, kept."""
        return self.off(*(each.sum(dim, keepdim=True) for each in (terms, self.counts(terms), terms.square())))


def _linear(sums: _Sums, func: Any, *args: Any) -> Any:
    """Of products of the elements of each operand with those of the others."""
    found = [func(*tree_map_only(Tensor, change, args)) for change in (torch.clone, sums.counts, torch.square)]
    if isinstance(found[0], Tensor):
        return sums.off(*found)
    return tuple(None if each[0] is None else sums.off(*each) for each in zip(*found))


def _addmm(sums: _Sums, func: Any, added: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * added + alpha * _linear(sums, _aten.mm.default, a, b)


def _convolution(sums: _Sums, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    out = _linear(sums, func, x, weight, None, *how)
    return out if bias is None else out + bias.view(-1, *[1] * (out.dim() - 2))


def _mean(sums: _Sums, func: Any, x: Tensor, *where: Any) -> Tensor:
    mean = func(x, *where)
    of_each = x.numel() / mean.numel()
    return sums.off(mean, func(sums.counts(x), *where) * of_each, func(x.square(), *where) / of_each)


def _softmax(sums: _Sums, func: Any, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    weights = sums.rounded(sums.rounded(x - x.amax(dim, keepdim=True)).exp())
    return weights / sums.over(weights, dim)


def _softmax_backward(sums: _Sums, func: Any, grad: Tensor, out: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    terms = sums.rounded(grad * out)
    return terms - sums.rounded(out * sums.rounded(sums.over(terms, dim)))


_MOVES = {_aten.clone.default, _aten._to_copy.default, _aten._unsafe_view.default}
_SUMS: Mapping[Any, Callable[..., Any]] = {
    _aten.mm.default: _linear,
    _aten.bmm.default: _linear,
    _aten.addmm.default: _addmm,
    _aten.sum.default: _linear,
    _aten.sum.dim_IntList: _linear,
    _aten.mean.default: _mean,
    _aten.mean.dim: _mean,
    _aten._softmax.default: _softmax,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _linear,
}
