"""Ops called through ONNX Runtime: a graph of one node of the domain ``mvkernels``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvkernels.export import nodes, onnxruntime_library
from mvkernels.export.views import Place, is_dense, place

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def session(model: Any, threads: int = 1) -> Any:
    """Of a model, or of the file that it is in."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(onnxruntime_library())
    model = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def model_of(
    op: str,
    inputs: Mapping[str, np.ndarray | None],
    names: list[str],
    attributes: Mapping[str, Any],
    constants: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Any:
    """A graph with that node alone; ``names`` are its inputs in order, "" for one left out.

    Each is one of ``inputs``, of any sizes where that is None, or an initializer with the value in ``constants``.
    """
    float32 = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(op, names, ["out"], domain=nodes.DOMAIN, **attributes)
    sizes = {name: None if x is None else list(x.shape) for name, x in inputs.items()}
    given = [onnx.helper.make_tensor_value_info(name, float32, size) for name, size in sizes.items()]
    out = onnx.helper.make_tensor_value_info("out", float32, None)
    initializers = [onnx.numpy_helper.from_array(x, name) for name, x in constants.items()]
    graph = onnx.helper.make_graph([node], op, given, [out], initializers)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(nodes.DOMAIN, nodes.VERSION)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def call(op: str, values: Mapping[str, Any], threads: int = 1) -> Tensor:
    """The op's result in ONNX Runtime; ``values`` by the names of the node's arguments, maps views of any tensors."""
    inputs: dict[str, np.ndarray] = {}
    names: list[str] = []
    attributes: dict[str, Any] = {}
    where: Place | None = None

    def add(name: str, value: Tensor) -> None:
        names.append(name)
        inputs[name] = value.detach().contiguous().numpy()

    for argument in nodes.NODES[op][1].split():
        name, _, kind = argument.partition(":")
        value = values[name]
        if kind == "map":
            base, found = _base(value)
            attributes[name] = list(found)
            where = where or found
            add(name, base)
        elif kind == "channels":
            last = value.stride(1) == 1
            attributes[name] = int(last)
            where = Place(int(last), 1, value.shape[1], 0, 0, 1)
            add(name, value.permute(0, 2, 3, 1) if last else value)
        elif kind == "list":
            for number, each in enumerate(value):
                add(f"{name}{number}", each)
        elif kind in ("tensor", "optional"):
            if value is not None:
                add(name, value)
        else:
            attributes[name] = value
    (out,) = session(model_of(op, inputs, names, attributes), threads).run(None, inputs)
    found = torch.from_numpy(out)
    if where is None or op == "mobile_to_former":
        return found
    if where.channels_last and where.next == 1:
        found = found.permute(0, 3, 1, 2)
    first = values[next(iter(values))]
    return found if first.dim() == 4 else found.unflatten(1, (first.shape[1], -1))


def _base(value: Tensor) -> tuple[Tensor, Place]:
    """A tensor of four axes that a map is a view of, and where it lies there; a copy if it is none's."""
    base = value._base if value._base is not None else value
    found = place(value, base) if is_dense(base) else None
    b, heads, dim, height, width = value.shape
    if found is None:
        rows = value.permute(0, 3, 4, 1, 2).reshape(b, height, width, heads * dim)
        return rows, Place(1, heads, dim, 0, dim, 1)
    return base.reshape((b, height, width, -1) if found.channels_last else (b, -1, height, width)), found


def through_onnx(op: str, threads: int = 1) -> Any:
    """The op's own function, but run by ONNX Runtime: for :func:`mvkernels.testing.check`."""

    def function(backend: str = "", **arguments: Any) -> Tensor:
        return call(op, _as_node(op, **arguments), threads)

    return function


def _as_node(op: str, **given: Any) -> dict[str, Any]:
    """The arguments of an op by the names that they have in a node."""

    def pair(name: str, *names: str) -> dict[str, int]:
        value = given.pop(name)
        return dict(zip(names, value if isinstance(value, (tuple, list)) else (value, value)))

    numbers: dict[str, Any] = {}
    if op == "patch_attention":
        numbers |= pair("patch_size", "patch_height", "patch_width")
    if op == "window_attention":
        numbers |= pair("window_size", "window_height", "window_width") | pair("shift", "shift_y", "shift_x")
    if op == "multiscale_linear_attention":
        scales = list(zip(given.pop("depthwise"), given.pop("pointwise")))
        weights = [each[i] for i in (0, 1) for each in scales]
        biases = [given.pop(name, None) for name in ("depthwise_bias", "pointwise_bias")]
        if any(biases):
            weights += [torch.empty(0) if b is None else b for some in biases for b in some or [None] * len(scales)]
        numbers["weights"] = weights
    if op == "former_to_mobile":
        given["residual"] = int(given["residual"])
    return given | numbers


@contextmanager
def poisoned(instruction_set: str | None = None) -> Iterator[None]:
    """Fresh buffers of the library are full of NaN inside, and it runs this instruction set."""
    library = ctypes.CDLL(onnxruntime_library())
    name = None if instruction_set is None else instruction_set.encode()
    assert library.mvkernels_set_instruction_set(name)
    library.mvkernels_set_poison(1)
    try:
        yield
    finally:
        library.mvkernels_set_poison(0)
        library.mvkernels_set_instruction_set(None)
