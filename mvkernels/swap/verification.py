"""Holding a swapped model against its original: outputs and gradients, the whole model and block by block."""

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

# Through a whole model rounding errors are amplified by the same weights but not in step: of two equally
# good computations one can be a few times luckier on a handful of logits. The blocks' own rows are the strict ones.
_WHOLE_MODEL = 4.0


@dataclass
class SwapVerification:
    """The answer of :func:`mvkernels.verify_swap`. Prints as a table."""

    report: SwapReport
    rows: list[Comparison] = field(default_factory=list)
    """One for each output, the gradients of the inputs, and the worst of the parameters' gradients, of the
    model and then of each swapped block on its own."""

    @property
    def ok(self) -> bool:
        """Whether there was anything to compare, and every row is within what is allowed."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def swapped(self) -> int:
        """How many blocks the verified model had swapped."""
        return sum(entry.swapped for entry in self.report.entries)

    def __str__(self) -> str:
        rows = [
            (r.name, f"{r.error:.2e}", f"{r.allowed:.2e}", "ok" if r.ok else "WRONG", r.detail.strip("()"))
            for r in self.rows
        ]
        word = "ok" if self.ok else "WRONG"
        if not self.swapped:
            word += ", but nothing was swapped"
        lines = table(("against float64", "error", "allowed", "", ""), rows)
        return f"{lines}\nswapped against original: {word} ({self.swapped} swapped)"


def verify_swap(
    model: nn.Module,
    example_input: Any,
    backend: str | None = None,
    rtol: float = 0.0,
) -> SwapVerification:
    """Compare a model with its swapped form: outputs, and gradients of the inputs and of every parameter.

    Works on copies, in eval mode; ``model`` is not touched. If it is swapped already, what is swapped in it is
    compared with its restored copy; else a copy is swapped.

    The yardstick is the original in float64. The swapped model's error may be at most twice (gradients:
    three times) that of the original in the model's own dtype, and for whole-model rows four times that again,
    because rounding errors amplified by a deep model do not come out alike; plus 1e-6 of the tensor's largest
    magnitude (half types: 4 units in its last place). The gradient of a parameter gets the same allowance
    once more for the median error and the median size among the parameters. Below these limits an error is
    not told from rounding; in half types that is a few percent, so verify in float32 where you can.

    Args:
        model: swapped or not, on any device; floating point.
        example_input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        backend: for the swapped blocks.
        rtol: allowed on top, relative to the largest magnitude of each tensor.

    Raises TypeError for a model that is not an ``nn.Module``, and whatever the model raises.
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
    results = SwapVerification(report)
    captured: dict[str, tuple[Any, ...]] = {}
    names = [entry.name for entry in report.entries if entry.swapped]
    runs = [
        _run(exact, _cast(args, torch.float64), _cast(kwargs, torch.float64), _formed_later(swapped)),
        _run(original, args, kwargs, _formed_later(swapped), names, captured),
        _run(swapped, args, kwargs, _formed_later(swapped)),
    ]
    results.rows += _compare("", runs, _WHOLE_MODEL, rtol)
    for name in names:
        if name == "" or name not in captured:  # the model itself, or a block that this input does not reach
            continue
        blocks = [m.get_submodule(name) for m in (exact, original, swapped)]
        inputs = captured[name]
        skip = _formed_later(blocks[2])
        runs = [_run(blocks[0], _cast(inputs, torch.float64), {}, skip)]
        runs += [_run(block, inputs, {}, skip) for block in blocks[1:]]
        results.rows += _compare(name + ": ", runs, 1.0, rtol)
    return results


def _forget(model: nn.Module) -> None:
    """Empty what timm's EfficientFormer keeps from one call in eval mode to the next: biases with their graph.

    It can be walked back only once, and not be copied; the next call gathers them again.
    """
    for module in model.modules():
        if module.__dict__.get("attention_bias_cache"):
            module.attention_bias_cache = {}  # type: ignore[assignment]


def _is_swapped(model: nn.Module) -> bool:
    return any(original_of(m) is not None for m in model.modules())


def _formed_later(module: nn.Module) -> tuple[str, ...]:
    """The outputs, by name, that a swapped block forms only if they are used.

    They are not the kernel's, and beside their gradients those of what is would hardly be seen.
    """
    return getattr(type(module), "mvk_formed_later", ())


def _report(model: nn.Module, backend: str | None) -> SwapReport:
    """The report of a model that was swapped before, which stays as it is but for a backend that is asked for."""
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
    """{"output": …, "d input": …, "d parameter": …}, each of tensors by name, on the CPU; outputs but for ``skip``."""
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
        # Exact gradients of some parameters are zero or nearly (the key's bias): what is computed is the rounding
        # error of larger terms, on which the original may be lucky. The median says what is not luck.
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
