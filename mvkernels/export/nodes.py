"""Ops as single nodes of an ONNX graph, for a runtime that has kernels of this library.

An export that keeps ops (:func:`mvkernels.dispatch.kept.keep_in_exports`) has their C++ operators in its graph. These
take maps of any strides, which ONNX does not have. Here each of them becomes a node of the domain ``mvkernels`` that
takes the tensors its maps are views of, and says in attributes where the maps lie in them (:class:`Place`). The kernels
then read queries, keys and values out of a product's result where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from mvkernels.dispatch import library
from mvkernels.export.views import Place, Values, is_dense, numbers, place

DOMAIN, VERSION = "mvkernels", 1

# The arguments of each operator, as csrc/onnxruntime/register.cpp has them: for a map a tensor and a Place, for
# `channels` a map (B, C, H, W) that is read whole, and what has neither mark is an attribute.
NODES: dict[str, tuple[str, str]] = {
    "patch_attention": (
        "patch_attention_forward",
        "query:map key:map value:map patch_height patch_width bias:tensor scale",
    ),
    "window_attention": (
        "window_attention_forward",
        "query:map key:map value:map window_height window_width shift_y shift_x bias:tensor scale",
    ),
    "relu_linear_attention": ("relu_linear_attention", "query:map key:map value:map eps"),
    "multiscale_linear_attention": ("multiscale_linear_attention", "qkv:channels weights:list head_dim eps"),
    "mobile_to_former": ("mobile_to_former_forward", "query:tensor x:map scale"),
    "former_to_mobile": ("former_to_mobile_forward", "x:map key:tensor value:tensor scale residual"),
}
"""By op: the operator, and its arguments in order."""


def replace_operators(program: ExportedProgram) -> int:
    """Put nodes of ``mvkernels`` in the place of the operators in a program's graph. Returns how many there are."""
    known = {_operator(operator): (name, arguments.split()) for name, (operator, arguments) in NODES.items()}
    module = program.graph_module
    found = [node for node in module.graph.nodes if node.target in known]
    if found:
        values = Values(module)
        for node in found:
            _replace(node, *known[node.target], values)
        _join_permutations(module.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
    return len(found)


def _operator(name: str) -> Any:
    namespace, operator = library.OPERATOR.format(backend="cpp", name=name).split("::")
    return getattr(getattr(torch.ops, namespace), operator).default


Take = Callable[..., Tensor]


def _replace(node: fx.Node, op: str, arguments: list[str], values: Values) -> None:
    inputs: list[fx.Node] = []
    takes: list[tuple[int, int, Take]] = []
    attributes: dict[str, Any] = {}
    first: Place | None = None
    for argument, given in zip(arguments, node.args):
        name, _, kind = argument.partition(":")
        if kind in ("map", "channels"):
            used, take, where = (_map if kind == "map" else _channels)(given, values)  # type: ignore[arg-type]
            attributes[name] = list(where) if kind == "map" else where.channels_last
            first = first or where
            takes.append((len(inputs), len(used), take))
            inputs += used
        elif kind:
            for each in given if kind == "list" else [given]:  # type: ignore[union-attr]
                if each is not None:
                    takes.append((len(inputs), 1, _same))
                    inputs.append(each)  # type: ignore[arg-type]
        else:
            attributes[name] = int(given) if isinstance(given, bool) else given
    out = values.of[node]

    def call(*tensors: Tensor) -> Tensor:
        given = [take(*tensors[start : start + count]) for start, count, take in takes]
        return _node(op, given, attributes, first, out)

    with values.mode, torch.no_grad():
        traced = make_fx(call)(*[values.of[each] for each in inputs])
    graph = node.graph
    places = [n for n in traced.graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(node):
        result = graph.graph_copy(traced.graph, dict(zip(places, inputs)))
    assert isinstance(result, fx.Node)
    values.of[result] = out
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _map(node: fx.Node, values: Values) -> tuple[list[fx.Node], Take, Place]:
    """The nodes that a map (B, heads, dim, H, W) is taken from, how, and where in the result it is."""
    value, source = values.of[node], values.source(node)
    base = values.of[source]
    found = place(value, base) if is_dense(base) else None
    if found is None:  # a copy

        def copied(view: Tensor) -> Tensor:
            b, heads, dim, height, width = view.shape
            return view.permute(0, 3, 4, 1, 2).reshape(b, height, width, heads * dim)

        heads, dim = int(value.shape[1]), int(value.shape[2])
        return [node], copied, Place(1, heads, dim, 0, dim, 1)
    channels = math.prod(numbers(base.shape)) // math.prod(numbers((value.shape[0], *value.shape[3:])))

    def shaped(base: Tensor, view: Tensor) -> Tensor:
        b, _, _, height, width = view.shape
        return base.reshape((b, height, width, channels) if found.channels_last else (b, channels, height, width))

    b, _, _, height, width = numbers(value.shape)
    wanted = [b, height, width, channels] if found.channels_last else [b, channels, height, width]
    if numbers(base.shape) == wanted:
        return [source], _same, found
    return [source, node], shaped, found


def _channels(node: fx.Node, values: Values) -> tuple[list[fx.Node], Take, Place]:
    """As :func:`_map`, of a map (B, C, H, W) that is all of a tensor; another one is copied."""
    value, source = values.of[node], values.source(node)
    base, channels = values.of[source], int(value.shape[1])
    whole = Place(1, 1, channels, 0, 0, 1)
    if is_dense(base) and base.dim() == 4 and place(value.unsqueeze(1), base) == whole:
        return [source], _same, whole
    return [node], _same, whole._replace(channels_last=0)


def _node(op: str, inputs: list[Tensor], attributes: dict[str, Any], like: Place | None, out: Tensor) -> Tensor:
    """The op's node, and its result as the operator gives it."""

    def symbolic(*shape: Any) -> Tensor:
        name = f"{DOMAIN}::{op}"
        found = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=out.dtype, shape=shape, version=VERSION)
        assert isinstance(found, Tensor)
        return found

    given = inputs[0]
    if op == "mobile_to_former":
        return symbolic(*given.shape)
    assert like is not None
    last = like.channels_last and like.next == 1
    b, height, width = (given.shape[axis] for axis in ((0, 1, 2) if like.channels_last else (0, 2, 3)))
    heads, dim = map(int, out.shape[1:3]) if out.dim() == 5 else (1, int(out.shape[1]))
    found = symbolic(b, height, width, heads * dim) if last else symbolic(b, heads * dim, height, width)
    if out.dim() == 4:
        return found.permute(0, 3, 1, 2) if last else found
    return found.unflatten(-1, (heads, dim)).permute(0, 3, 4, 1, 2) if last else found.unflatten(1, (heads, dim))


def _join_permutations(graph: fx.Graph) -> None:
    """One permutation for two in a row, none where they undo each other."""
    permute = torch.ops.aten.permute.default
    for node in graph.nodes:
        before = node.args[0] if node.target is permute else None
        if isinstance(before, fx.Node) and before.target is permute:
            inner, outer = before.args[1], node.args[1]
            joined = [inner[axis] for axis in outer]  # type: ignore[union-attr, index]
            if joined == list(range(len(joined))):
                node.replace_all_uses_with(before.args[0])  # type: ignore[arg-type]
            else:
                node.args = (before.args[0], joined)
