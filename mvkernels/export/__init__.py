"""Export of models to other runtimes: torch.export, ONNX, ExecuTorch, OpenVINO, Core ML.

During an export the ops run their reference implementations. So the exported graph has PyTorch ops only and runs where
mvkernels is not installed. For ONNX Runtime and ExecuTorch the ops can stay single nodes instead (``fused``): these
runtimes run them with a library of this package's kernels. :func:`export_model` writes the file, runs it in the runtime
of the target, and compares the result with the unswapped model in float64.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mvkernels import files
from mvkernels.dispatch.exporting import keep_in_exports
from mvkernels.export.nodes import NODES
from mvkernels.export.targets import (
    FUSED,
    TARGETS,
    Target,
    executorch_library,
    input_of,
    line_of,
    onnxruntime_library,
    quiet,
    register_executorch,
    require,
)
from mvkernels.report import UsageError
from mvkernels.swap import swap
from mvkernels.testing import max_error

__all__ = [
    "FUSED",
    "PARITY",
    "TARGETS",
    "Exported",
    "Logits",
    "Target",
    "executorch_library",
    "export_model",
    "onnxruntime_library",
    "program",
    "quiet",
    "register_executorch",
    "require",
]

PARITY = 1e-4
"""Largest difference allowed between an export and the model in float64, relative to the largest output."""

_LARGEST = 4
"""Upper bound of dynamic sizes, in multiples of the example's, for targets that plan their memory ahead."""


@dataclass
class Exported:
    """What :func:`export_model` returns: the file that was written, and its difference from the model."""

    target: str
    path: str
    bytes: int
    """Size of the file, with its weights if they are beside it."""
    swapped: int
    """Number of attention blocks that were swapped before the export."""
    nodes: int
    """Number of op calls in the exported graph."""
    input_shape: list[str]
    """Sizes of the input; for a dynamic size its range or "any"."""
    error: float | None
    """Largest difference from the unswapped model in float64, divided by the largest output. None if the file was not
    run."""
    allowed: float
    """Upper limit of ``error``."""
    checked: list[list[int]] = field(default_factory=list)
    """The input sizes that were run."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further facts that depend on the target."""

    @property
    def ok(self) -> bool:
        """Whether the error is within its limit; true if the file was not run."""
        return self.error is None or self.error <= self.allowed


class Logits(nn.Module):
    """A model with a tensor as output: ``logits`` or ``sample`` of a structure that its package has for outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        out = self.model(image)
        if isinstance(out, Tensor):
            return out
        return out.logits if hasattr(out, "logits") else out.sample


def program(model: nn.Module, example: Tensor, dynamic: bool = False, largest: int | None = None) -> ExportedProgram:
    """Export a model with ``torch.export``, under no_grad. The graph has the reference implementations of the ops.

    Args:
        model: takes a map (B, C, H, W); its output is a tensor or a structure with ``logits`` or ``sample``.
        example: example input (B, C, H, W).
        dynamic: whether B, H and W of the input may change. In the example none of them may be 1.
        largest: upper bound of the dynamic sizes, in multiples of the example's; None for no bound.

    Raises:
        UsageError: torch.export cannot export the model; the message has the first line of its error.
    """
    shapes: Any = None
    if dynamic:
        sizes = {0: "batch", 2: "height", 3: "width"}
        if largest is None:
            shapes = ({axis: Dim.DYNAMIC for axis in sizes},)
        else:
            shapes = ({axis: Dim.DYNAMIC(max=largest * example.shape[axis]) for axis in sizes},)
    with torch.no_grad(), quiet():
        try:
            return torch.export.export(Logits(model).eval(), (example,), dynamic_shapes=shapes)
        except Exception as error:
            raise UsageError(f"torch.export cannot export the model: {line_of(error)}") from None


def export_model(
    model: nn.Module,
    example: Tensor,
    target: str,
    path: str | Path,
    *,
    dynamic: bool = False,
    swapped: bool = True,
    fused: bool = False,
    threads: int = 1,
) -> Exported:
    """Export a model to a file, run the file, and compare its output with the unswapped model in float64.

    For "coreml" the file is written, but not run.

    Args:
        model: takes images (B, C, H, W); its output is a tensor or a structure with ``logits`` or ``sample``. The model
            is not changed: a copy in eval mode is swapped and exported.
        example: example input (B, C, H, W) in float32. A dynamic export needs a batch of at least 2.
        target: a name in :data:`TARGETS`: "torch", "onnx", "openvino", "executorch" or "coreml".
        path: file to write. OpenVINO writes a second file beside it, and Core ML writes a folder.
        dynamic: whether B, H and W of the input may change. For "executorch" and "coreml" they can be up to four times
            those of the example.
        swapped: True exports the swapped model, False the original.
        fused: whether the ops of this library stay single nodes of the graph, which run only where the runtime is given
            the library's kernels: for "onnx" those of :func:`onnxruntime_library`, for "executorch" those of
            :func:`executorch_library`. False writes PyTorch's ops alone.
        threads: number of threads of the runtime that runs the file; ExecuTorch's own pool stays as it is.

    Returns:
        :class:`Exported`. Its ``ok`` says whether the difference is within the limit: 1e-4 of the largest output, or
        twice the error of the model itself in float32 if that is larger. A dynamic export is also run with another
        batch, height and width.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``example`` is not a float32 tensor (B, C, H, W), or its batch is too small for a dynamic export.
        UsageError: the target is unknown or has no fused ops, a package is missing, the model cannot be exported to
            the target, or the path cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_model: model is a {type(model).__name__}, want a torch.nn.Module")
    if not isinstance(example, Tensor):
        raise ValueError(f"export_model: example is a {type(example).__name__}, want a float32 tensor (B, C, H, W)")
    if example.dim() != 4 or example.dtype != torch.float32:
        found_example = f"{tuple(example.shape)} in {example.dtype}"
        raise ValueError(f"export_model: example is {found_example}, want (B, C, H, W) in torch.float32")
    if dynamic and example.shape[0] < 2:
        raise ValueError(f"export_model: example has batch {example.shape[0]}, want at least 2 for a dynamic export")
    kind, path = require(target, fused), Path(path)
    if kind.exact_suffix and path.suffix != kind.suffix:
        raise UsageError(f"{path} cannot be written: {target} needs a file name that ends in {kind.suffix}")
    original = Logits(copy.deepcopy(model)).eval()
    exporting = copy.deepcopy(model)
    exporting.eval()  # whose result timm's EfficientFormer attention lacks
    count = swap(exporting).count if swapped else 0
    with keep_in_exports(*NODES) if fused else contextlib.nullcontext():
        graph = program(exporting, example, dynamic, _LARGEST if kind.bounded else None)
    with torch.no_grad(), quiet():
        if path.is_dir() and (path.suffix != kind.suffix or target != "coreml"):
            raise UsageError(f"{path} cannot be written: it is a folder")
        try:
            with files.replacing_all(path) as place:
                details = kind.write(graph, place)
        except UsageError:
            raise
        except Exception as error:  # the converters have no common error
            raise UsageError(f"{target} cannot convert this model: {line_of(error)}") from None
    inputs = [example]
    if dynamic:
        batch, channels, height, width = example.shape
        other = (batch + 1, channels, height + 32, width + 64)
        inputs.append(torch.rand(other, generator=torch.Generator().manual_seed(0)))
    found: float | None = None
    allowed = PARITY
    if kind.load is not None:
        found, allowed = _compare(original, kind.load, path, inputs, threads)
    return Exported(
        target=target,
        path=str(path),
        bytes=_size(path),
        swapped=count,
        nodes=sum(node.op == "call_function" for node in graph.graph.nodes),
        input_shape=_described(graph),
        error=found,
        allowed=allowed,
        checked=[list(image.shape) for image in inputs] if found is not None else [],
        details=details,
    )


def _compare(
    original: nn.Module,
    load: Callable[[Path, int], Callable[[Tensor], Tensor]],
    path: Path,
    inputs: list[Tensor],
    threads: int,
) -> tuple[float, float]:
    """(error, limit) of the export, at the input with the largest ratio of the two."""
    with torch.no_grad(), quiet():
        try:
            run = load(path, threads)
            outputs = [run(image) for image in inputs]
        except Exception as error:
            raise UsageError(f"{path} was written, but its runtime cannot run it: {line_of(error)}") from None
        exact_model = copy.deepcopy(original).double()
        worst = (0.0, PARITY)
        for image, out in zip(inputs, outputs):
            exact = exact_model(image.double())
            largest = float(exact.abs().max()) or 1.0
            found = max_error(out, exact) / largest
            allowed = max(PARITY, 2 * max_error(original(image), exact) / largest)
            worst = max(worst, (found, allowed), key=lambda pair: pair[0] / pair[1])
    return worst


def _described(program: ExportedProgram) -> list[str]:
    """The sizes of the input: a number, or the range of a dynamic size.

    torch.export gives 2 as the lower bound of every size that it traces, but 1 runs too. So a bound of 2 is left out.
    """

    def size(value: Any) -> str:
        if isinstance(value, int):
            return str(value)
        found = program.range_constraints.get(value.node.expr)
        if found is None:
            return "any"
        lower, upper = (str(bound) for bound in (found.lower, found.upper))
        bounds = "" if int(lower) <= 2 else lower, "" if "oo" in upper else upper
        return "..".join(bounds) if any(bounds) else "any"

    return [size(value) for value in input_of(program).shape]


def _size(path: Path) -> int:
    """Bytes of a file with its weights beside it, or of all files in a folder."""
    parts = path.rglob("*") if path.is_dir() else [path, path.with_suffix(".bin"), Path(f"{path}.data")]
    return sum(file.stat().st_size for file in parts if file.is_file())
