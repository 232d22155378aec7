"""Comparing a swapped model with its original: outputs and gradients of the whole model and of each block."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.swap.eligibility import class_name
from mvkernels.swap.engine import swap, unswap
from mvkernels.swap.later import LaterTensor
from mvkernels.swap.report import SwapReport, original_of, table
from mvkernels.testing import BACKWARD_FACTOR, FLOOR, FORWARD_FACTOR, Comparison, compare, max_error

# A whole model amplifies rounding errors. Of two equally accurate computations one can by chance have an error on a few
# logits that is several times smaller. The rows of the single blocks are the strict ones.
_WHOLE_MODEL = 4.0


@dataclass
class SwapVerification:
    """What :func:`mvkernels.verify_swap` returns: errors and their limits. Prints as a table.

    ``ok`` says whether all errors are within their limits.
    """

    report: SwapReport
    rows: list[Comparison] = field(default_factory=list)
    """A row for each output, for the gradient of each input, and for the worst gradient of a parameter: first of the
    whole model, then of each swapped block."""
    folded: int = 0
    """Number of other modules whose norms are folded or which run on packed weights."""

    @property
    def ok(self) -> bool:
        """Whether there is at least one row and the error of every row is within its limit."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def swapped(self) -> int:
        """Number of swapped blocks in the model that was compared."""
        return sum(entry.swapped for entry in self.report.entries)

    def __str__(self) -> str:
        rows = [
            (r.name, f"{r.error:.2e}", f"{r.allowed:.2e}", "ok" if r.ok else "WRONG", r.detail.strip("()"))
            for r in self.rows
        ]
        word = "ok" if self.ok else "WRONG"
        if not self.swapped and not self.folded:
            word += ", but nothing was swapped"
        others = f", {self.folded} others with norms folded or on packed weights" if self.folded else ""
        lines = table(("against float64", "error", "allowed", "", ""), rows)
        return f"{lines}\nswapped against original: {word} ({self.swapped} swapped{others})"


def verify_swap(
    model: nn.Module,
    example_input: Any,
    backend: str | None = None,
    rtol: float = 0.0,
) -> SwapVerification:
    """Compare a model with its swapped form: outputs, gradients of the inputs and gradients of all parameters.

    The comparison runs on copies in eval mode; ``model`` is not changed. If ``model`` is swapped already, it is
    compared with a restored copy; else a copy of it is swapped.

    Errors are measured against the original in float64. The error of the swapped model may be at most twice (for
    gradients: three times) the error of the original in the model's own dtype, plus 1e-6 of the largest magnitude in
    the tensor (float16, bfloat16: 4 units in the last place of this magnitude). For the whole model the factor is four
    times as large, because a deep model amplifies rounding errors by different amounts. For the gradient of a
    parameter, the limit also includes the same factor times the median error of all parameters, and uses their median
    magnitude if that is larger. Below these limits an error cannot be told from rounding. In half types the limits are
    a few percent, so verify in float32 if you can. If ``model`` was swapped with ``inference=True``, calls that record
    no gradient are compared too, in rows of their own.

    Args:
        model: swapped or not, with floating-point parameters, on any device.
        example_input: input of the model: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments.
        backend: backend of the swapped blocks; None chooses at each call.
        rtol: additional tolerance, relative to the largest magnitude in each tensor.

    Returns:
        A :class:`SwapVerification`; its ``ok`` is the result.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Exceptions that the model raises are passed on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify_swap: model is a {class_name(type(model))}, want a torch.nn.Module")
    _forget(model)
    # eval() and not its result: that of timm's EfficientFormer attention is None.
    swapped = copy.deepcopy(model)
    swapped.eval()
    report = swap(swapped, backend=backend) if not _is_swapped(swapped) else _report(swapped, backend)
    original = copy.deepcopy(model)
    original.eval()
    unswap(original)
    exact = copy.deepcopy(original).double()

    args, kwargs = _arguments(example_input)
    forms = sum(original_of(module) is not None for module in swapped.modules())
    results = SwapVerification(report, folded=forms - sum(entry.swapped for entry in report.entries))
    captured: dict[str, tuple[Any, ...]] = {}
    names = [entry.name for entry in report.entries if entry.swapped]
    runs = [
        _run(exact, _cast(args, torch.float64), _cast(kwargs, torch.float64), _formed_later(swapped)),
        _run(original, args, kwargs, _formed_later(swapped), names, captured),
        _run(swapped, args, kwargs, _formed_later(swapped)),
    ]
    results.rows += _compare("", runs, _WHOLE_MODEL, rtol)
    packs = any(getattr(type(module), "mvk_packs", False) for module in swapped.modules())
    if packs:
        given = [(_cast(args, torch.float64), _cast(kwargs, torch.float64)), (args, kwargs), (args, kwargs)]
        runs = [_infer(m, *each, _formed_later(swapped)) for m, each in zip((exact, original, swapped), given)]
        results.rows += _compare("inference: ", runs, _WHOLE_MODEL, rtol)
    for name in names:
        if name == "" or name not in captured:  # the model itself, or a block that this input does not reach
            continue
        blocks = [m.get_submodule(name) for m in (exact, original, swapped)]
        inputs = captured[name]
        skip = _formed_later(blocks[2])
        runs = [_run(blocks[0], _cast(inputs, torch.float64), {}, skip)]
        runs += [_run(block, inputs, {}, skip) for block in blocks[1:]]
        results.rows += _compare(name + ": ", runs, 1.0, rtol)
        if packs:
            cast = [_cast(inputs, torch.float64), inputs, inputs]
            runs = [_infer(block, each, {}, skip) for block, each in zip(blocks, cast)]
            results.rows += _compare(f"inference: {name}: ", runs, 1.0, rtol)
    return results


def _forget(model: nn.Module) -> None:
    """Empty the cache of biases that timm's EfficientFormer keeps between calls in eval mode.

    The cached biases hold a graph, which allows only one backward and cannot be copied. The next call fills the cache
    again.
    """
    for module in model.modules():
        if module.__dict__.get("attention_bias_cache"):
            module.attention_bias_cache = {}  # type: ignore[assignment]


def _is_swapped(model: nn.Module) -> bool:
    return any(original_of(m) is not None for m in model.modules())


def _formed_later(module: nn.Module) -> tuple[str, ...]:
    """The names of the outputs that a swapped block computes only if they are used.

    They are left out: they do not come from the kernel, and their gradients would hide those of the kernel's output.
    """
    return getattr(type(module), "mvk_formed_later", ())


def _report(model: nn.Module, backend: str | None) -> SwapReport:
    """The report of a model that was swapped before. Nothing more is swapped; ``backend`` is set if it is given."""
    return swap(model, only=lambda name, module: original_of(module) is not None, backend=backend)


def _arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, (tuple, list)):
        return tuple(example_input), {}
    return (example_input,), {}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a tuple or dict as ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def _run(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    skip: Sequence[str] = (),
    capture: Sequence[str] = (),
    captured: dict[str, tuple[Any, ...]] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """{"output": …, "d input": …, "d parameter": …}: CPU tensors by name, without the outputs in ``skip``."""
    inputs: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = inputs[name] = value.detach().clone().requires_grad_(True)
        elif type(value) in (tuple, list):
            value = type(value)(leaf(f"{name}[{i}]", item) for i, item in enumerate(value))
        return value

    _forget(model)
    args = [leaf(str(i), value) for i, value in enumerate(args)]
    kwargs = {name: leaf(name, value) for name, value in kwargs.items()}
    handles = []
    if captured is not None:
        for name in capture:

            def keep(module: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                captured.setdefault(name, given)

            handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    try:
        with torch.enable_grad():
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    outputs = {name: t for name, t in _tensors("", result) if name not in skip}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves: dict[str, dict[str, Any]] = {"d input": inputs, "d parameter": parameters}
    found: dict[str, dict[str, Tensor]] = {"output": {n: t.detach().cpu() for n, t in outputs.items()}}
    wanted = [(group, name, t) for group, tensors in leaves.items() for name, t in tensors.items()]
    differentiable = [t for t in outputs.values() if t.requires_grad]
    if wanted and differentiable:
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in differentiable]
        grads = torch.autograd.grad(differentiable, [t for _, _, t in wanted], cotangents, allow_unused=True)
        for (group, name, _), grad in zip(wanted, grads):
            if grad is not None:
                found.setdefault(group, {})[name] = grad.cpu()
    return found


def _infer(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], skip: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """{"output": …} of a call that records no gradient, which may run on packed weights."""
    _forget(model)
    with torch.no_grad():
        result = model(*args, **kwargs)
    return {"output": {name: t.cpu() for name, t in _tensors("", result) if name not in skip}}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors in an output: a tensor, a tuple or list, a dict or a ModelOutput."""
    if isinstance(value, LaterTensor):
        value = value.tensor
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)


def _compare(
    where: str, runs: Sequence[dict[str, dict[str, Tensor]]], leniency: float, rtol: float
) -> Iterator[Comparison]:
    """Rows for three runs: exact, original, swapped."""
    exact, baseline, actual = runs
    for group, tensors in exact.items():
        factor = leniency * (FORWARD_FACTOR if group == "output" else BACKWARD_FACTOR)
        missing = tensors.keys() - actual.get(group, {}).keys()
        if missing:
            yield Comparison(f"{where}{group} {min(missing)}", float("inf"), 0.0, "(missing)")
            continue
        # The exact gradients of some parameters are zero or nearly so (the bias of the keys). What is computed is then
        # the rounding error of larger terms, which may be small in the original by chance. So the median counts too.
        typical, size = 0.0, 0.0
        if group == "d parameter":
            typical = statistics.median(max_error(baseline[group][n], t) for n, t in tensors.items())
            size = statistics.median(_largest(t) for t in tensors.values())
        rows = []
        for name, t in tensors.items():
            rounding = max(FLOOR, 4 * torch.finfo(baseline[group][name].dtype).eps)
            floor = rounding * max(_largest(t), size) + factor * typical + rtol * _largest(t)
            label = f"{where}{group}{name and ' ' + name}"
            rows.append(compare(label, actual[group][name], t, baseline[group][name], factor, floor))
        if group == "d parameter":
            worst = max(rows, key=lambda row: row.error / max(row.allowed, 1e-300))
            detail = f"(the worst of {len(rows)}) {worst.detail}".rstrip()
            rows = [Comparison(worst.name, worst.error, worst.allowed, detail)]
        yield from rows


def _largest(t: Tensor) -> float:
    return float(t.double().abs().nan_to_num(0.0).max()) if t.numel() else 0.0
