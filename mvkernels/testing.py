"""Tools for checking kernels: the error criterion, buffers filled with NaN, and inputs with all kinds of strides.

``mvkernels verify``, the tests, the benchmarks and ``verify_swap`` all use the criterion of :func:`compare`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import Op
from mvkernels.rounding import ExpectedRounding, Tf32Products
from mvkernels.triton import configs

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0
FLOOR = 1e-6
DRAWS = 4, 16
"""How many samples of the expected error are drawn, first and at most. If one or two roundings make all of an error, a
sample may be small by chance, so more are drawn if the first do not decide. The second largest counts: in one sample a
relu may switch sides, which would tell nothing about the others."""

STRIDES = ("contiguous", "channels_last", "packed", "sliced", "transposed", "expanded", "offset")


@dataclass(frozen=True)
class Comparison:
    """The comparison of one tensor with the float64 reference."""

    name: str
    error: float
    """Largest absolute error of the tensor; infinite if NaNs or infinities are not in the same places."""
    allowed: float
    """Upper limit of the error, see :func:`compare`."""
    detail: str = ""
    pytorch: float = 0.0
    """The error of PyTorch with the same formula in the same dtype on this machine."""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        sign, word = ("<=", "ok") if self.ok else (">", "WRONG")
        return f"{self.name}: {word}, error {self.error:.2e} {sign} allowed {self.allowed:.2e} {self.detail}".rstrip()


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, computed in float64.

    It is ``inf`` if the shapes differ, or if a NaN or an infinity is in one tensor and not in the other. If an exact
    value is beyond the range of the dtype of ``actual``, both are clamped to this range.
    """
    if actual.shape != exact.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    a, e = _in_range(actual, exact)
    same = (a == e) | (a.isnan() & e.isnan())
    difference = torch.where(same, 0.0, (a - e).abs())
    return float(torch.where(difference.isnan(), float("inf"), difference).max())


def rms_error(actual: Tensor, exact: Tensor) -> float:
    """Root of the mean squared difference over the finite elements, in float64."""
    if actual.shape != exact.shape:
        return float("inf")
    a, e = _in_range(actual, exact)
    finite = a.isfinite() & e.isfinite()
    count = int(finite.sum())
    return float((torch.where(finite, a - e, 0.0).square().sum() / max(count, 1)).sqrt())


def _in_range(actual: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64. Where the exact value is finite and near the end of the dtype's range, both are clamped."""
    a, e = actual.detach().double(), exact.detach().double().to(actual.device)
    if not actual.is_floating_point():
        return a, e
    most = torch.finfo(actual.dtype).max
    near = e.isfinite() & (e.abs() > most / 2)
    return tuple(torch.where(near, t.clamp(-most, most), t) for t in (a, e))  # type: ignore[return-value]


def compare(
    name: str,
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor,
    factor: float = FORWARD_FACTOR,
    floor: float = FLOOR,
    expected: Callable[[int], Sequence[Tensor]] | None = None,
) -> Comparison:
    """The error criterion: compare ``actual`` with ``exact``.

    The error may be at most ``factor`` times the largest of three errors, plus ``floor``: the error of ``baseline``,
    the second largest error in ``expected(count)``, and the error of rounding the exact value once. This has to hold
    for the largest error and for the root mean square of the errors.

    Args:
        name: name of the tensor in the result.
        actual: the tensor to check.
        exact: the float64 reference.
        baseline: the same formula, computed by PyTorch in the dtype of ``actual``.
        factor: 2 for an output and 3 for a gradient, see :func:`factor`.
        floor: absolute error that is always allowed.
        expected: function of a count that returns as many samples of what PyTorch computes with random rounding
            errors, the same on every machine (:class:`ExpectedRounding`). It is slow, so it is called only if the
            baseline does not decide.
    """
    found = _hold(name, actual, exact, baseline, factor, floor)
    for count in DRAWS if expected is not None else ():
        if found.ok:
            break
        found = _hold(name, actual, exact, baseline, factor, floor, expected(count))  # type: ignore[misc]
    return found


def factor(name: str) -> float:
    """The factor of the output, "out", or of a gradient."""
    return FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR


def _hold(
    name: str,
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor,
    factor: float,
    floor: float,
    expected: Sequence[Tensor] = (),
) -> Comparison:
    found = []
    for measure, detail in ((max_error, ""), (rms_error, "(root mean square)")):
        pytorch = _finite(measure(baseline, exact))
        rounded = _finite(measure(exact.to(actual.dtype), exact))
        allowed = factor * max(pytorch, _expected_of(expected, exact, measure), rounded) + floor
        found.append(Comparison(name, measure(actual, exact), allowed, detail, pytorch))
    return next((each for each in found if not each.ok), found[0])


def _expected_of(drawn: Sequence[Tensor], exact: Tensor, measure: Callable[[Tensor, Tensor], float]) -> float:
    """The expected error: the second largest of the samples; 0 without samples."""
    return sorted([0.0, 0.0, *(_finite(measure(each, exact)) for each in drawn)])[-2]


def _finite(error: float) -> float:
    # A baseline that overflows where the exact value is finite gives no licence.
    return error if error < float("inf") else 0.0


def tensors_in(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in an op's arguments, by name. Those in a list ``weights`` are ``weights[0]`` and so on."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        each = {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, (list, tuple)) else {name: value}
        found |= {key: v for key, v in each.items() if isinstance(v, Tensor)}
    return found


def with_tensors(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments with these tensors in place of theirs; the names are those of :func:`tensors_in`."""
    return {
        name: type(value)(tensors.get(f"{name}[{i}]", v) for i, v in enumerate(value))
        if isinstance(value, (list, tuple))
        else tensors.get(name, value)
        for name, value in arguments.items()
    }


def run(
    function: Callable[..., Tensor],
    arguments: Mapping[str, Any],
    wanted: Sequence[str] = (),
    cotangent: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Call ``function`` on detached arguments. Returns {"out": …}, and {"d<name>": …} for the names in ``wanted``.

    Strides are kept. With ``dtype`` the tensors are cast to it first. ``cotangent`` is the gradient of the output.
    """
    inputs = {}
    for name, value in tensors_in(arguments).items():
        cast = value.detach() if dtype in (None, value.dtype) else value.detach().to(dtype)
        inputs[name] = cast.requires_grad_(name in wanted)
    with torch.set_grad_enabled(bool(wanted)):
        out = function(**with_tensors(arguments, inputs))
    results = {"out": out.detach()}
    if wanted:
        if cotangent is None:
            raise ValueError("run: gradients need a cotangent")
        grads = torch.autograd.grad(out, [inputs[n] for n in wanted], cotangent.to(out.dtype))
        results.update({f"d{n}": g for n, g in zip(wanted, grads)})
    return results


class Yardstick:
    """The exact results of a formula and those of PyTorch, for comparison with the results of a kernel.

    Args:
        formula: ``formula(dtype)`` returns the results of PyTorch in this dtype, with the names of :func:`run`.
        dtype: the dtype of the results that are compared with them.
        tf32: whether the operands of products in float32 may be rounded to tf32. Whether PyTorch takes what it may
            depends on a product's size; ours are held to what is allowed.
    """

    def __init__(
        self, formula: Callable[[torch.dtype], dict[str, Tensor]], dtype: torch.dtype, tf32: bool = False
    ) -> None:
        self._formula, self._dtype, self._tf32 = formula, dtype, tf32
        self.exact, self.baseline = formula(torch.float64), self._rounded(dtype)
        self._drawn: list[dict[str, Tensor]] = []

    def expected(self, name: str, count: int = DRAWS[0]) -> list[Tensor]:
        """``count`` samples of a result with random rounding errors, the same on every machine.

        For half types there are as many samples in float32, rounded once.
        """
        dtypes = (self._dtype, torch.float32) if self._dtype.itemsize == 2 else (self._dtype,)
        for seed in range(len(self._drawn) // len(dtypes), count):
            for dtype in dtypes:
                with ExpectedRounding(seed):
                    self._drawn.append(self._rounded(dtype, seed))
        return [drawn[name].to(self._dtype) for drawn in self._drawn[: count * len(dtypes)]]

    def _rounded(self, dtype: torch.dtype, seed: int | None = None) -> dict[str, Tensor]:
        with Tf32Products(seed) if self._tf32 and dtype == torch.float32 else nullcontext():
            return self._formula(dtype)

    def expected_error(self, name: str) -> float:
        """The expected error of a result."""
        return _expected_of(self.expected(name), self.exact[name], max_error)

    def compare(self, actual: Mapping[str, Tensor]) -> list[Comparison]:
        """Compare these results with the exact ones, see :func:`mvkernels.testing.compare`."""
        return [
            compare(
                name,
                result,
                self.exact[name],
                self.baseline[name],
                factor(name),
                expected=partial(self.expected, name),
            )
            for name, result in actual.items()
        ]


def normalised(op: Op, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The op's arguments in the form that its reference takes: for example an int becomes a pair."""
    return dict(zip(inspect.signature(op.check).parameters, op.check(**arguments)))


def yardstick(op: Op, arguments: Mapping[str, Any], wanted: Sequence[str]) -> tuple[Yardstick, Tensor]:
    """(the :class:`Yardstick` for an op's output and the gradients in ``wanted``, a random gradient of the output).

    ``arguments`` are the op's, by name, in the form that the reference takes.
    """
    first = next(iter(tensors_in(arguments).values()))
    with torch.no_grad():
        shape = op.reference(**arguments).shape
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(first.device, first.dtype)

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        # Inputs in float64 for the exact values; else as they are, and only what is computed from them in the dtype.
        inputs = dtype if dtype == torch.float64 else None
        return run(lambda **kw: op.reference(**kw, compute_dtype=dtype), arguments, wanted, cotangent, inputs)

    return Yardstick(formula, first.dtype, configs.tf32_allowed(first.device.type)), cotangent


def check(
    op: Op,
    arguments: Mapping[str, Any],
    backend: str,
    backward: bool = True,
    function: Callable[..., Tensor] | None = None,
) -> list[Comparison]:
    """Compare an op on a backend with the float64 reference: the output and all gradients.

    Args:
        op: the op, an entry of ``mvkernels.dispatch.registry.OPS``.
        arguments: the op's arguments by name, without ``backend``.
        backend: name of the backend.
        backward: whether to compare the gradients too, where the op has a backward on this backend.
        function: function to call in place of the op's own, such as a compiled one.

    Returns:
        A list of :class:`Comparison`, the output first. Kernels run on buffers filled with NaN (:func:`poisoned`).
    """
    arguments = normalised(op, arguments)
    wanted = list(tensors_in(arguments)) if backward and op.has_backward(backend) else []
    call = function or op.function
    held, cotangent = yardstick(op, arguments, wanted)
    with poisoned():
        actual = run(lambda **kw: call(**kw, backend=backend), arguments, wanted, cotangent)
    return held.compare(actual)


@contextmanager
def poisoned() -> Iterator[None]:
    """Context manager that fills uninitialised buffers with NaN: those of torch.empty and of the C++ kernels."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.fill_(float("nan"))
            return tensor

        return made

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        if extension.module is None:
            yield
            return
        before = extension.module.set_poison(True)
        try:
            yield
        finally:
            extension.module.set_poison(before)


def make_map(
    shape: Sequence[int],
    strides: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random map (B, heads, head_dim, H, W) or (B, C, H, W) with strides of a kind. The memory around it is NaN.

    The kinds: "contiguous" (channels first), "channels_last", "packed" (a third of a channels-last qkv), "sliced"
    (every second row and column of a larger map), "transposed" (H and W swapped in memory), "expanded" (stride 0 over
    the heads, or over C), "offset" (begins inside its storage). Raises ValueError for another kind.
    """
    if len(shape) == 4:
        b, c, *size = shape
        if strides == "expanded":
            return make_map((b, c, 1, *size), strides, dtype, device, generator)[:, :, 0]
        return make_map((b, 1, c, *size), strides, dtype, device, generator)[:, 0]
    b, h, d, height, width = shape
    values = torch.randn(b, h, d, height, width, generator=generator).to(dtype)
    nan = float("nan")

    def room(*sizes: int) -> Tensor:
        return torch.full(sizes, nan, dtype=dtype)

    if strides == "contiguous":
        out = values
    elif strides == "channels_last":
        out = room(b, height, width, h, d).permute(0, 3, 4, 1, 2)
    elif strides == "packed":
        out = room(b, height, width, 3, h, d)[:, :, :, 1].permute(0, 3, 4, 1, 2)
    elif strides == "sliced":
        out = room(b, h, d, 2 * height + 1, 2 * width + 1)[..., 1::2, 1::2]
    elif strides == "transposed":
        out = room(b, h, d, width, height).transpose(-2, -1)
    elif strides == "expanded":
        values = values[:, :1]
        out = room(b, 1, d, height, width)
    elif strides == "offset":
        out = room(b * h * d * height * width + 3)[3:].view(b, h, d, height, width)
    else:
        raise ValueError(f"unknown strides {strides!r}, want one of {', '.join(STRIDES)}")
    out = out if out is values else out.copy_(values)
    if strides == "expanded":
        out = out.expand(b, h, d, height, width)
    return _to(out, device)


def _to(value: Tensor, device: torch.device | str) -> Tensor:
    """``value`` on ``device`` with its strides and the NaNs around it."""
    if torch.device(device).type == "cpu":
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())
