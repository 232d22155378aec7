"""Ops as single nodes of an exported graph, for a runtime that has kernels of this library.

An export that keeps ops (:mod:`mvkernels.dispatch.exporting`) has their C++ operators in its graph. These take maps
of any strides, which such runtimes do not have. Here each of them becomes a node that takes the tensors its maps are
views of, and numbers that say where the maps lie in them (:class:`Place`). The kernels then read queries, keys
and values out of a product's result where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from mvkernels.dispatch import library
from mvkernels.export.views import Place, Values, drop_dead_code, is_dense, numbers, place

DOMAIN, VERSION = "mvkernels", 1

# The arguments of each operator, as csrc/cpu/placed_ops.h has them: `map` is a tensor and a Place, `channels` a map
# (B, C, H, W) that is read whole, `optional` a tensor that may be left out, `list` are tensors.
NODES: dict[str, tuple[str, str]] = {
    "patch_attention": (
        "patch_attention_forward",
        "query:map key:map value:map patch_height:int patch_width:int bias:optional scale:float",
    ),
    "window_attention": (
        "window_attention_forward",
        "query:map key:map value:map window_height:int window_width:int shift_y:int shift_x:int bias:optional "
        "scale:float",
    ),
    "relu_linear_attention": ("relu_linear_attention", "query:map key:map value:map eps:float"),
    "multiscale_linear_attention": (
        "multiscale_linear_attention",
        "qkv:channels weights:list head_dim:int eps:float",
    ),
    "mobile_to_former": ("mobile_to_former_forward", "query:tensor x:map scale:float"),
    "former_to_mobile": ("former_to_mobile_forward", "x:map key:tensor value:tensor scale:float residual:int"),
}
"""By op: the operator, and its arguments in order."""


class Placed(NamedTuple):
    """A tensor with a map in it, and where."""

    tensor: Tensor
    where: list[int] | int
    """A :class:`Place`; of a map that is read whole, whether its channels are last."""


Node = Callable[[str, dict[str, Any], tuple[Any, ...], torch.dtype], Tensor]
"""Makes the node of an op, from its arguments by name (a tensor, Placed, a list, None, a number), the sizes of the
result and its type."""


def onnx_node(op: str, arguments: dict[str, Any], sizes: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """A node of the domain ``mvkernels``: what is no tensor is an attribute."""
    tensors: list[Tensor] = []
    attributes: dict[str, Any] = {}
    for name, given in arguments.items():
        if isinstance(given, Placed):
            tensors.append(given.tensor)
            attributes[name] = given.where
        elif isinstance(given, list):
            tensors += given
        elif isinstance(given, Tensor):
            tensors.append(given)
        elif given is not None:
            attributes[name] = given
    found = torch.onnx.ops.symbolic(f"{DOMAIN}::{op}", tensors, attributes, dtype=dtype, shape=sizes, version=VERSION)
    assert isinstance(found, Tensor)
    return found


def replace_operators(program: ExportedProgram, make: Node) -> int:
    """Put nodes in the place of the operators in a program's graph. Returns how many there are."""
    known = {operator_of(op): op for op in NODES}
    module = program.graph_module
    found = [node for node in module.graph.nodes if node.target in known]
    if found:
        values = Values(module)
        for node in found:
            _replace(node, known[node.target], values, make)
        join_permutations(module.graph)
        _drop_undone_views(module.graph)
        drop_dead_code(module.graph)
        module.recompile()
    return len(found)


def operator_of(op: str) -> Any:
    """The C++ operator of an op."""
    namespace, operator = library.OPERATOR.format(backend="cpp", name=NODES[op][0]).split("::")
    return getattr(getattr(torch.ops, namespace), operator).default


Take = Callable[..., Tensor]


def _replace(node: fx.Node, op: str, values: Values, make: Node) -> None:
    inputs: list[fx.Node] = []
    # By name: what makes the argument of those tensors among the inputs that are its own.
    makers: dict[str, tuple[slice, Callable[..., Any]]] = {}
    first: Place | None = None
    for argument, given in zip(NODES[op][1].split(), node.args):
        name, _, kind = argument.partition(":")
        used: list[fx.Node] = []
        maker: Callable[..., Any]
        if kind in ("map", "channels"):
            used, take, where = (_map if kind == "map" else _channels)(given, values)  # type: ignore[arg-type]
            maker = _placed(take, list(where) if kind == "map" else where.channels_last)
            first = first or where
        elif kind == "list":
            used, maker = list(given), lambda *tensors: list(tensors)  # type: ignore[arg-type]
        elif isinstance(given, fx.Node):
            used, maker = [given], _same
        else:
            maker = _constant(int(given) if kind == "int" else given)  # type: ignore[arg-type]
        makers[name] = (slice(len(inputs), len(inputs) + len(used)), maker)
        inputs += used
    out = values.of[node]

    def call(*tensors: Tensor) -> Tensor:
        return _made(op, {name: maker(*tensors[own]) for name, (own, maker) in makers.items()}, make, first, out)

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


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _placed(take: Take, where: list[int] | int) -> Callable[..., Placed]:
    return lambda *tensors: Placed(take(*tensors), where)


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


def _made(op: str, arguments: dict[str, Any], make: Node, like: Place | None, out: Tensor) -> Tensor:
    """The op's node, and its result as the operator gives it."""
    given = next(iter(arguments.values()))
    if op == "mobile_to_former":
        return make(op, arguments, tuple(given.shape), out.dtype)
    assert like is not None
    last = like.channels_last and like.next == 1
    b, height, width = (given.tensor.shape[axis] for axis in ((0, 1, 2) if like.channels_last else (0, 2, 3)))
    heads, dim = map(int, out.shape[1:3]) if out.dim() == 5 else (1, int(out.shape[1]))
    sizes = (b, height, width, heads * dim) if last else (b, heads * dim, height, width)
    found = make(op, arguments, sizes, out.dtype)
    if out.dim() == 4:
        return found.permute(0, 3, 1, 2) if last else found
    return found.unflatten(-1, (heads, dim)).permute(0, 3, 4, 1, 2) if last else found.unflatten(1, (heads, dim))


def join_permutations(graph: fx.Graph) -> None:
    """One permutation for two in a row, none where they undo each other, and those after a sum before it where this
    leaves fewer."""
    for node in graph.nodes:
        _permute_before(graph, node)
    for node in graph.nodes:
        before = node.args[0] if node.target is _PERMUTE else None
        if isinstance(before, fx.Node) and before.target is _PERMUTE:
            joined = _joined(before, node.args[1])
            if joined == list(range(len(joined))):
                node.replace_all_uses_with(before.args[0])  # type: ignore[arg-type]
            else:
                node.args = (before.args[0], joined)


def _drop_undone_views(graph: fx.Graph) -> None:
    """No view of a view that has the sizes of what both are views of: heads that are divided and joined again."""
    aten = torch.ops.aten
    views = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)

    def sizes(node: fx.Node) -> list[str]:
        return [str(size) for size in node.meta["val"].shape]

    for node in graph.nodes:
        before = node.args[0] if node.target in views else None
        if isinstance(before, fx.Node) and before.target in views:
            first = before.args[0]
            if isinstance(first, fx.Node) and sizes(node) == sizes(first):
                node.replace_all_uses_with(first)


_PERMUTE = torch.ops.aten.permute.default


def _joined(inner: fx.Node, outer: Any) -> list[int]:
    return [inner.args[1][axis] for axis in outer]  # type: ignore[union-attr, index, misc]


def _permute_before(graph: fx.Graph, node: fx.Node) -> None:
    """Add in the order of axes that is read, where a summand had this order before it was permuted."""
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or not node.users:
        return
    orders = [user.args[1] if user.target is _PERMUTE else None for user in node.users]
    summands = [part for part in node.args if isinstance(part, fx.Node)]
    if orders[0] is None or any(order != orders[0] for order in orders) or len(summands) != 2:
        return
    one, other = (part.meta["val"].shape for part in summands)
    undone = [part.target is _PERMUTE and _joined(part, orders[0]) == list(range(len(one))) for part in summands]
    if list(one) != list(other) or not any(undone):
        return
    with graph.inserting_before(node):
        parts = [graph.call_function(_PERMUTE, (part, orders[0])) for part in summands]
        for part, summand in zip(parts, summands):
            part.meta["val"] = summand.meta["val"].permute(orders[0])
        found = graph.call_function(torch.ops.aten.add.Tensor, tuple(parts))
    found.meta["val"] = node.meta["val"].permute(orders[0])
    for user in list(node.users):
        user.replace_all_uses_with(found)
