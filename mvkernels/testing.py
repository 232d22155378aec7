"""The one error criterion, poisoned buffers, and inputs of every stride kind.

``mvkernels verify``, the tests, the benchmarks and ``verify_swap`` all decide with :func:`compare`.
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
"""How often expected errors are drawn: where one or two roundings make all of an error, a draw may be lucky too. So
what a few of them do not settle is held to more. The worst but one counts: a draw in which relu falls on the other
side of its kink says nothing of the others."""

STRIDES = ("contiguous", "channels_last", "packed", "sliced", "transposed", "expanded", "offset")


@dataclass(frozen=True)
class Comparison:
    """One tensor held against the float64 reference."""

    name: str
    error: float
    """Largest absolute error of the tensor; infinite where NaNs or infinities stand in other places."""
    allowed: float
    """factor x PyTorch's own error with the same formula in the same dtype, or that of rounding the exact value once,
    plus the floor; where the error is more than that, factor x the expected error of PyTorch if that is larger."""
    detail: str = ""
    pytorch: float = 0.0
    """The error of PyTorch with the same formula in the same dtype, on this machine."""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        sign, word = ("<=", "ok") if self.ok else (">", "WRONG")
        return f"{self.name}: {word}, error {self.error:.2e} {sign} allowed {self.allowed:.2e} {self.detail}".rstrip()


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64. NaN must meet NaN and infinity the same infinity, else ``inf``.

    An exact value beyond what the dtype holds is taken for the largest that it does, and infinity there for that too.
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
    """Both in float64; where the exact value is finite and near the end of the dtype's range, neither is beyond it."""
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
    """The error criterion.

    ``exact`` is the float64 reference, ``baseline`` the same formula done by PyTorch in the kernel's dtype.
    The error of ``actual`` may be at most ``factor`` times the largest of three, plus ``floor``: that of ``baseline``,
    the worst but one of ``expected(count)``, and that of the exact value rounded once. The largest error is held to it
    and, so that one bad row cannot hide nor a general blur, the root mean square too.

    ``expected`` gives what PyTorch computes on no machine in particular (:class:`ExpectedRounding`), so many times. It
    is called only where the baseline does not settle it, for it takes longer than all else.
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
    """The error that is to be expected: the worst but one of those drawn, 0 of none."""
    return sorted([0.0, 0.0, *(_finite(measure(each, exact)) for each in drawn)])[-2]


def _finite(error: float) -> float:
    # A baseline that overflows where the exact value is finite gives no licence.
    return error if error < float("inf") else 0.0


def tensors_in(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among an op's arguments by name; those of a list ``weights`` are ``weights[0]`` and so on."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        each = {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, (list, tuple)) else {name: value}
        found |= {key: v for key, v in each.items() if isinstance(v, Tensor)}
    return found


def with_tensors(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments with these tensors in the places that :func:`tensors_in` names."""
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
    """Call ``function`` on copies of the arguments; return {"out": …} and {"d<name>": …} for the names wanted.

    Strides are kept. With ``dtype`` the tensors are cast first. ``cotangent`` is the gradient of out.
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
    """What the results of a formula are held against, by the names that :func:`run` gives them.

    Args:
        formula: ``formula(dtype)`` -> results, all of it computed by PyTorch in that dtype.
        dtype: the dtype of the results to be held against it.
    """

    def __init__(self, formula: Callable[[torch.dtype], dict[str, Tensor]], dtype: torch.dtype) -> None:
        self._formula, self._dtype = formula, dtype
        self.exact, self.baseline = formula(torch.float64), formula(dtype)
        self._drawn: list[dict[str, Tensor]] = []

    def expected(self, name: str, count: int = DRAWS[0]) -> list[Tensor]:
        """A result with the rounding errors that are to be expected, drawn so many times, alike on every machine.

        For half types the formula is drawn in float32 as well, and its results are rounded once.
        """
        dtypes = (self._dtype, torch.float32) if self._dtype.itemsize == 2 else (self._dtype,)
        for seed in range(len(self._drawn) // len(dtypes), count):
            for dtype in dtypes:
                with ExpectedRounding(seed):
                    self._drawn.append(self._formula(dtype))
        return [drawn[name].to(self._dtype) for drawn in self._drawn[: count * len(dtypes)]]

    def expected_error(self, name: str) -> float:
        """The largest error of a result that is to be expected."""
        return _expected_of(self.expected(name), self.exact[name], max_error)

    def compare(self, actual: Mapping[str, Tensor]) -> list[Comparison]:
        """Hold these results to the criterion: the output, and gradients by the backward's factor."""
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
    """The op's arguments as its reference takes them, a pair for an int, say."""
    return dict(zip(inspect.signature(op.check).parameters, op.check(**arguments)))


def yardstick(op: Op, arguments: Mapping[str, Any], wanted: Sequence[str]) -> tuple[Yardstick, Tensor]:
    """What an op's output and the gradients wanted are held against for these arguments, and the output's gradient.

    ``arguments`` are the op's, by name, as the reference takes them.
    """
    first = next(iter(tensors_in(arguments).values()))
    with torch.no_grad():
        shape = op.reference(**arguments).shape
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(first.device, first.dtype)

    # Whether PyTorch takes what it may depends on a product's size; ours are held to what is allowed.
    allowed = configs.tf32_allowed(first.device.type)

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        # Inputs in float64 for the exact values; else as they are, and only what is computed from them in the dtype.
        inputs = dtype if dtype == torch.float64 else None
        with Tf32Products() if allowed and dtype == torch.float32 else nullcontext():
            return run(lambda **kw: op.reference(**kw, compute_dtype=dtype), arguments, wanted, cotangent, inputs)

    return Yardstick(formula, first.dtype), cotangent


def check(
    op: Op,
    arguments: Mapping[str, Any],
    backend: str,
    backward: bool = True,
    function: Callable[..., Tensor] | None = None,
) -> list[Comparison]:
    """Compare an op on a backend with the float64 reference: the output and every gradient.

    ``arguments`` are the op's, by name, without ``backend``. ``function`` replaces the op's own (a
    compiled one, say). Kernels run on poisoned buffers.
    """
    arguments = normalised(op, arguments)
    wanted = list(tensors_in(arguments)) if backward else []
    call = function or op.function
    held, cotangent = yardstick(op, arguments, wanted)
    with poisoned():
        actual = run(lambda **kw: call(**kw, backend=backend), arguments, wanted, cotangent)
    return held.compare(actual)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every uninitialised buffer with NaN: those made in Python by torch.empty and those of the C++ kernels."""

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
    """A random map (B, heads, head_dim, H, W) or (B, C, H, W) of a stride kind; all around it in memory is NaN.

    Kinds: "contiguous" (channels first), "channels_last", "packed" (a third of a channels-last qkv),
    "sliced" (every second row and column of a larger map), "transposed" (H and W swapped in memory),
    "expanded" (stride 0 over the heads, or over C), "offset" (starts inside its storage).
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
