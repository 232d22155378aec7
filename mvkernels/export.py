"""Export of models to other runtimes: torch.export, ONNX, ExecuTorch, OpenVINO, Core ML.

While a model is exported the ops trace their references, so what is written holds ops of PyTorch alone and runs where
this library is not installed. :func:`export_model` writes the file, runs it in the target's own runtime, and holds the
result against the unswapped model in float64.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mvkernels import files
from mvkernels.report import UsageError
from mvkernels.swap import swap
from mvkernels.testing import max_error

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


@dataclass(frozen=True)
class Target:
    """A file format and the runtime that reads it."""

    suffix: str
    needs: tuple[str, ...]
    """Modules that must import."""
    write: Callable[[ExportedProgram, Path], dict[str, Any]]
    """Writes the file; what it answers is shown."""
    load: Callable[[Path, int], Callable[[Tensor], Tensor]] | None
    """``load(path, threads)`` -> a function of the input, run by the target's own runtime."""
    bounded: bool = False
    """Whether dynamic sizes need an upper bound."""
    exact_suffix: bool = False
    """Whether the target writes no file of another suffix."""


def _write_torch(program: ExportedProgram, path: Path) -> dict[str, Any]:
    with path.open("wb") as file:  # given a name it says nothing of a full disk
        torch.export.save(program, file)
    return {}


def _load_torch(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _write_onnx(program: ExportedProgram, path: Path) -> dict[str, Any]:
    converted = torch.onnx.export(
        program, (), dynamo=True, verbose=False, input_names=["image"], output_names=["logits"]
    )
    assert converted is not None
    converted.save(path)
    return {"opset": converted.model.opset_imports[""]}


def _load_onnx(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def _write_openvino(program: ExportedProgram, path: Path) -> dict[str, Any]:
    import openvino

    model = openvino.convert_model(program)
    shape = [d if isinstance(d, int) else -1 for d in _input(program).shape]
    model.reshape(shape)  # the converter forgets which sizes are fixed
    openvino.save_model(model, path, compress_to_fp16=False)
    return {"weights": path.with_suffix(".bin").name}


def _load_openvino(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import openvino

    # Left to itself it computes in bfloat16 where the processor can.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda image: torch.from_numpy(next(iter(request.infer([image.numpy()]).values())).copy())


def _write_executorch(program: ExportedProgram, path: Path) -> dict[str, Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    found = _delegation(edge.exported_program())
    path.write_bytes(edge.to_executorch().buffer)
    return found


def _delegation(program: ExportedProgram) -> dict[str, Any]:
    """How many nodes XNNPACK has, and which were left to ExecuTorch's portable kernels."""
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    def ops(graph: torch.fx.Graph) -> list[str]:
        # What only takes a tuple apart is no work of anybody.
        called = [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"]
        return [name for name in called if "getitem" not in name and "executorch_call_delegate" not in name]

    parts = get_lowered_submodules(program.graph_module)
    delegated = sum(len(ops(lowered.original_module.graph)) for _, lowered, _ in parts)
    left = Counter(ops(program.graph_module.graph))
    return {
        "delegated_nodes": delegated,
        "other_nodes": left.total(),
        "delegated_share": round(delegated / max(delegated + left.total(), 1), 4),
        "subgraphs": len(parts),
        "not_delegated": dict(left.most_common()),
    }


def _load_executorch(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if hasattr(portable_lib, "_threadpool_set_num_threads"):
        portable_lib._threadpool_set_num_threads(threads)
    method = Runtime.get().load_program(path).load_method("forward")
    # The runtime reads dense tensors in the order of their axes.
    return lambda image: method.execute([image.contiguous()])[0].clone()


def _write_coreml(program: ExportedProgram, path: Path) -> dict[str, Any]:
    import coremltools

    converted = coremltools.convert(
        program.run_decompositions({}),
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
        skip_model_load=True,
    )
    converted.save(str(path))
    return {"deployment_target": "iOS17"}


TARGETS = {
    "torch": Target(".pt2", (), _write_torch, _load_torch),
    "onnx": Target(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
    "openvino": Target(".xml", ("openvino",), _write_openvino, _load_openvino, exact_suffix=True),
    "executorch": Target(".pte", ("executorch.exir", "executorch.runtime"), _write_executorch, _load_executorch, True),
    "coreml": Target(".mlpackage", ("coremltools",), _write_coreml, None, True, exact_suffix=True),
}


def require(target: str) -> Target:
    """The target of that name, whose packages import.

    Raises UsageError for an unknown target, and with the extra to install where a package is missing.
    """
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}, want one of {', '.join(TARGETS)}")
    found = TARGETS[target]
    with quiet():
        for name in found.needs:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                package = name.partition(".")[0]
                missing = (error.name or package).partition(".")[0]
                what = f"{package} is not installed" if missing == package else f"{package} needs {missing}"
                raise UsageError(f"{target}: {what}: pip install 'mvkernels[export]'") from None
            except Exception as error:  # a package built for another torch fails in many ways
                raise UsageError(f"{target}: {name} does not import: {_line(error)}") from None
    return found


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
            raise UsageError(f"torch.export cannot export the model: {_line(error)}") from None


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
            raise UsageError(f"{target} does not take this model: {_line(error)}") from None
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
            raise UsageError(f"{path} was written, but its runtime does not run it: {_line(error)}") from None
        exact_model = copy.deepcopy(original).double()
        worst = (0.0, PARITY)
        for image, out in zip(inputs, outputs):
            exact = exact_model(image.double())
            largest = float(exact.abs().max()) or 1.0
            found = max_error(out, exact) / largest
            allowed = max(PARITY, 2 * max_error(original(image), exact) / largest)
            worst = max(worst, (found, allowed), key=lambda pair: pair[0] / pair[1])
    return worst


def _input(program: ExportedProgram) -> Tensor:
    name = program.graph_signature.user_inputs[0]
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


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

    return [size(value) for value in _input(program).shape]


def _size(path: Path) -> int:
    """Bytes of a file with its weights beside it, or of all files in a folder."""
    parts = path.rglob("*") if path.is_dir() else [path, path.with_suffix(".bin"), Path(f"{path}.data")]
    return sum(file.stat().st_size for file in parts if file.is_file())


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings, progress bars and notices that converters print while they work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    held = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(held), contextlib.redirect_stderr(held):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
