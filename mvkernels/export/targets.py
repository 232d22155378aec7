"""The file formats that models are exported to, and the runtimes that read them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mvkernels.dispatch import extension
from mvkernels.report import UsageError


@dataclass(frozen=True)
class Target:
    """A file format and the runtime that reads it."""

    suffix: str
    needs: tuple[str, ...]
    """Modules that must be importable."""
    write: Callable[[ExportedProgram, Path], dict[str, Any]]
    """Writes the file, and returns details that are shown to the user."""
    load: Callable[[Path, int], Callable[[Tensor], Tensor]] | None
    """``load(path, threads)`` returns a function of the input that runs the file in the runtime of the target."""
    bounded: bool = False
    """Whether dynamic sizes need an upper bound."""
    exact_suffix: bool = False
    """Whether the file must have this suffix."""
    library: Callable[[], str] | None = None
    """Path of this package's kernels for the runtime, where the file needs them; UsageError if they are not there."""


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


def _write_fused_onnx(program: ExportedProgram, path: Path) -> dict[str, Any]:
    from mvkernels.export.convolutions import replace_blocks
    from mvkernels.export.nodes import DOMAIN, onnx_node, replace_operators

    fused = replace_operators(program, onnx_node) + replace_blocks(program)
    return {**_write_onnx(program, path), "domain": DOMAIN, "fused_nodes": fused, "library": onnxruntime_library()}


def onnxruntime_library() -> str:
    """Path of this package's library of custom ops for ONNX Runtime, 1.17 or newer, on CPUs.

    Give it to ``onnxruntime.SessionOptions.register_custom_ops_library``, or to the function of that name in another
    language: it needs neither Python nor PyTorch. The ops in it take float32.

    Raises:
        UsageError: the package was installed without its C++ kernels.
    """
    path = Path(__file__).parents[1] / "libmvkernels_onnxruntime.so"
    if not path.exists():
        raise UsageError(f"fused ops for ONNX Runtime: there is no {path.name} in this installation, it has no kernels")
    return str(path)


def executorch_library() -> str:
    """Path of this package's kernels for ExecuTorch on CPUs. The ops in it take float32.

    It links to the shared libraries of ExecuTorch's package, and is for the version of it that was there when mvkernels
    was built. In Python :func:`register_executorch` gives it to the runtime. An application that links to it calls
    ``extern "C" const char* mvkernels_register_executorch()`` before it loads a method: it returns null, or a text that
    says what is wrong.

    Raises:
        UsageError: the package was built without its C++ kernels, or where ExecuTorch was not installed.
    """
    path = Path(__file__).parents[1] / "libmvkernels_executorch.so"
    if not path.exists():
        raise UsageError(
            f"fused ops for ExecuTorch: there is no {path.name} in this installation: "
            "build mvkernels where executorch is installed, with pip install --no-build-isolation"
        )
    return str(path)


def register_executorch() -> str:
    """Give ExecuTorch's runtime in this process the kernels of :func:`executorch_library`. Returns the library's path.

    It can be called again.

    Raises:
        UsageError: there is no library or no ExecuTorch, or it is not the one that the library was built for.
    """
    path = executorch_library()
    try:
        importlib.import_module("executorch.runtime")  # loads the libraries that this one links to
    except ModuleNotFoundError as error:
        raise UsageError(f"fused ops for ExecuTorch: there is no {error.name}: pip install executorch") from None
    try:
        kernels = ctypes.CDLL(path)
    except OSError as error:
        raise UsageError(f"fused ops for ExecuTorch: the kernels cannot be loaded: {line_of(error)}") from None
    for function in (kernels.mvkernels_executorch_version, kernels.mvkernels_register_executorch):
        function.argtypes, function.restype = (), ctypes.c_char_p
    built, installed = kernels.mvkernels_executorch_version().decode(), importlib.metadata.version("executorch")
    if installed != built:
        raise UsageError(
            f"fused ops for ExecuTorch: the kernels are built for executorch {built}, but {installed} is installed: "
            "build mvkernels again"
        )
    wrong = kernels.mvkernels_register_executorch()
    if wrong is not None:
        raise UsageError(wrong.decode())
    return path


def _load_onnx(path: Path, threads: int, library: str | None = None) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def _write_openvino(program: ExportedProgram, path: Path) -> dict[str, Any]:
    import openvino

    model = openvino.convert_model(program)
    shape = [d if isinstance(d, int) else -1 for d in input_of(program).shape]
    model.reshape(shape)  # the converter forgets which sizes are fixed
    openvino.save_model(model, path, compress_to_fp16=False)
    return {"weights": path.with_suffix(".bin").name}


def _load_openvino(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import openvino

    # Without the hint it computes in bfloat16 if the processor can.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda image: torch.from_numpy(next(iter(request.infer([image.numpy()]).values())).copy())


def _write_fused_executorch(program: ExportedProgram, path: Path) -> dict[str, Any]:
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    from mvkernels.export.nodes import DOMAIN, replace_operators
    from mvkernels.export.operators import executorch_node

    library = register_executorch()  # before minutes of work
    fused = replace_operators(program, executorch_node)
    # The weights of query, key and value are concatenated in the graph. XNNPACK takes only weights that are constants.
    program = constant_prop_pass(program)
    return {**_write_executorch(program, path), "domain": DOMAIN, "fused_nodes": fused, "library": library}


def _load_fused_executorch(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    register_executorch()
    return _load_executorch(path, threads)


def _write_executorch(program: ExportedProgram, path: Path) -> dict[str, Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    found = _delegation(edge.exported_program())
    path.write_bytes(edge.to_executorch().buffer)
    return found


def _delegation(program: ExportedProgram) -> dict[str, Any]:
    """How many nodes run on XNNPACK, and which run on ExecuTorch's portable kernels."""
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    def ops(graph: torch.fx.Graph) -> list[str]:
        # getitem only unpacks a tuple, and is not counted.
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
    from executorch.runtime import Runtime

    # Its pool of threads is the process's. What has been loaded before uses it, so it stays as it is.
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
FUSED = {
    "onnx": replace(
        TARGETS["onnx"],
        write=_write_fused_onnx,
        load=lambda path, threads: _load_onnx(path, threads, onnxruntime_library()),
        library=onnxruntime_library,
    ),
    "executorch": replace(
        TARGETS["executorch"],
        write=_write_fused_executorch,
        load=_load_fused_executorch,
        library=executorch_library,
    ),
}
"""The targets whose runtime can be given this library's ops, and then keeps them as single nodes."""


def require(target: str, fused: bool = False) -> Target:
    """The target of that name, after a check that its packages can be imported.

    Raises UsageError if the target is unknown or a package is missing; the message then says what to install. With
    ``fused`` also if the target has no ops of this library, or the library for its runtime is missing.
    """
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}, want one of {', '.join(TARGETS)}")
    if fused and target not in FUSED:
        raise UsageError(f"{target} has no ops of this library, only these have: {', '.join(FUSED)}")
    if fused and extension.module is None:  # what keeps ops in an export are the operators of the extension
        raise UsageError(f"{target} with fused ops: {extension.reason}")
    found = (FUSED if fused else TARGETS)[target]
    if found.library is not None:
        found.library()
    with quiet():
        for name in found.needs:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                package = name.partition(".")[0]
                missing = (error.name or package).partition(".")[0]
                what = f"{package} is not installed"
                if missing != package:
                    what = f"{package} needs {missing}, which is not installed"
                raise UsageError(f"{target}: {what}: pip install 'mvkernels[export]'") from None
            except Exception as error:  # a package built for another torch fails in many ways
                raise UsageError(f"{target}: {name} cannot be imported: {line_of(error)}") from None
    return found


def input_of(program: ExportedProgram) -> Tensor:
    name = program.graph_signature.user_inputs[0]
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


def line_of(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings, progress bars and notices that converters print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    held = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(held), contextlib.redirect_stderr(held):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
