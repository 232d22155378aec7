"""Export of models to other runtimes: torch.export, ONNX, ExecuTorch, OpenVINO, Core ML.

While a model is exported the ops trace their references, so what is written holds ops of PyTorch alone and runs where
this library is not installed. :func:`export_model` writes the file, runs it in the target's own runtime, and holds the
result against the unswapped model in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mvkernels import files
from mvkernels.export.targets import TARGETS, Target, input_of, line_of, quiet, require
from mvkernels.report import UsageError
from mvkernels.swap import swap
from mvkernels.testing import max_error

__all__ = ["PARITY", "TARGETS", "Exported", "Logits", "Target", "export_model", "program", "quiet", "require"]

PARITY = 1e-4
"""Of the largest output: what an export may differ from the model in float64."""

_LARGEST = 4
"""Dynamic sizes of a target that plans its memory ahead go up to this many times the example's."""


@dataclass
class Exported:
    """What was written, and how far from the model it is."""

    target: str
    path: str
    bytes: int
    swapped: int
    """Attention blocks that were swapped before the export."""
    nodes: int
    """Calls of ops in the exported graph."""
    input_shape: list[str]
    """Sizes of the input, by name or range where they are dynamic."""
    error: float | None
    """Largest difference from the unswapped model in float64, over the largest output; None if nothing ran it."""
    allowed: float
    checked: list[list[int]] = field(default_factory=list)
    """The input sizes that were run."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether what ran is right; true if nothing can run it here."""
        return self.error is None or self.error <= self.allowed


class Logits(nn.Module):
    """A model whose answer is one tensor: the logits of a model that answers with a structure of its package."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        out = self.model(image)
        return out if isinstance(out, Tensor) else out.logits


def program(model: nn.Module, example: Tensor, dynamic: bool = False, largest: int | None = None) -> ExportedProgram:
    """The model as ``torch.export`` sees it, with the ops' references in it, under no_grad.

    example: (B, C, H, W). With ``dynamic``, B, H and W may change, up to ``largest`` times the example's if that is
    given; B, H and W of the example must differ from 1. Raises UsageError with the first line of what torch.export
    says against it.
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
    threads: int = 1,
) -> Exported:
    """Export a model, run the file where its runtime is here, and compare with the unswapped model in float64.

    Args:
        model: takes a picture (B, C, H, W), answers with a tensor or with a structure that has ``logits``. It is not
            changed: a copy in eval mode is swapped and exported.
        example: float32 input (B, C, H, W). For a dynamic export it has a batch of at least 2.
        target: a name of :data:`TARGETS`: "torch", "onnx", "openvino", "executorch" or "coreml".
        path: the file to write (for OpenVINO a second one beside it, for Core ML a folder).
        dynamic: B, H and W of the input may change; "executorch" and "coreml" bound them by four times the example's.
        swapped: export the swapped model, which is the default, or the original.
        threads: of the runtime that checks the file.

    Returns:
        :class:`Exported`; ``ok`` says whether the difference is at most 1e-4 of the largest output, or twice that of
        the model itself in float32 where that is more. A dynamic export is also run at another batch and size.

    Raises:
        TypeError: ``model`` is no module. ValueError: ``example`` is no such tensor.
        UsageError: unknown target, a package that is missing, a model that the target does not take, a path that
            cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_model: model is a {type(model).__name__}, want a torch.nn.Module")
    if not isinstance(example, Tensor) or example.dim() != 4 or example.dtype != torch.float32:
        raise ValueError("export_model: example is no float32 tensor (B, C, H, W)")
    if dynamic and example.shape[0] < 2:
        raise ValueError(f"export_model: a dynamic export needs an example with B of 2 or more, not {example.shape[0]}")
    kind, path = require(target), Path(path)
    if kind.exact_suffix and path.suffix != kind.suffix:
        raise UsageError(f"{path} cannot be written: {target} wants a name that ends in {kind.suffix}")
    original = Logits(copy.deepcopy(model)).eval()
    exporting = copy.deepcopy(model).eval()
    count = swap(exporting).count if swapped else 0
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
            raise UsageError(f"{target} does not take this model: {line_of(error)}") from None
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
    """The export's error and what is allowed, at the input where they are furthest apart."""
    with torch.no_grad(), quiet():
        try:
            run = load(path, threads)
            outputs = [run(image) for image in inputs]
        except Exception as error:
            raise UsageError(f"{path} was written, but its runtime does not run it: {line_of(error)}") from None
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
    """The input's sizes: a number, or the range of a dynamic one.

    torch.export traces sizes of 2 and more, and says so of every one of them; smaller ones run as well.
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
