"""Inverted residuals of an exported graph as single nodes, where this library's kernel is faster than convolutions.

An inverted residual is a 1 x 1 convolution to more channels, a depthwise one and a 1 x 1 convolution to few, with norms
and activations between them. Here each becomes a node ``mvkernels::inverted_residual`` that has the norms folded into
its weights. Nodes take and give channels-last maps, and what follows each other needs no permutation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.experimental.proxy_tensor import make_fx

from mvkernels.export.nodes import DOMAIN, VERSION, join_permutations
from mvkernels.export.views import Values, drop_dead_code, is_higher_order, memory_of, numbers
from mvkernels.ops.common.activations import CODES

_aten = torch.ops.aten
_ACTIVATIONS = {
    _aten.relu.default: "relu",
    _aten.relu_.default: "relu",
    _aten.silu.default: "silu",
    _aten.silu_.default: "silu",
    _aten.hardswish.default: "hardswish",
    _aten.hardswish_.default: "hardswish",
    _aten.relu6.default: "relu6",
    _aten.relu6_.default: "relu6",
}
_GELUS = (_aten.gelu.default, _aten.gelu_.default)
_CLAMPS = (_aten.hardtanh.default, _aten.hardtanh_.default)
_KERNELS = (3, 5)


@dataclass
class _Layer:
    """A convolution, and the norm and the activation that follow it."""

    convolution: fx.Node
    norm: fx.Node | None
    activation: str | None
    nodes: list[fx.Node]
    """All of its nodes, the last one first."""

    @property
    def input(self) -> fx.Node:
        found = self.convolution.args[0]
        assert isinstance(found, fx.Node)
        return found


@dataclass
class Block:
    """An inverted residual in a graph."""

    expand: _Layer | None
    depthwise: _Layer
    project: _Layer
    residual: bool
    last: fx.Node
    """The node whose value is the block's result."""

    @property
    def layers(self) -> list[_Layer]:
        """The last one first."""
        return [layer for layer in (self.project, self.depthwise, self.expand) if layer]

    @property
    def input(self) -> fx.Node:
        return self.layers[-1].input


def replace_blocks(program: ExportedProgram) -> int:
    """Put nodes of ``mvkernels`` in the place of inverted residuals where they are faster. Returns how many."""
    graph = program.graph_module.graph
    _drop_dropouts(graph)
    blocks = find_blocks(program)
    first = [block for block in blocks if faster(block)]
    found = [block for block in blocks if faster(block, first)]
    for number, block in enumerate(found):
        _replace(program, block, number)
    join_permutations(graph)
    drop_dead_code(graph)
    program.graph_module.recompile()
    return len(found)


def find_blocks(program: ExportedProgram) -> list[Block]:
    """The inverted residuals of a graph, in order; none has a part of another."""
    constants, found = _Constants(program), []
    taken: set[fx.Node] = set()
    if any(is_higher_order(node) for node in program.graph_module.graph.nodes):
        return []  # what a graph inside this one changes is not looked for
    changes: _Changes | None = None
    for node in program.graph_module.graph.nodes:
        block = _block(node, constants)
        convolutions = {layer.convolution for layer in block.layers} if block else set()
        if block is None or taken & convolutions:
            continue
        changes = changes or _Changes(program.graph_module)
        if not changes.meet(block):
            found.append(block)
            taken |= convolutions
    return found


_SLOW = ("hardswish", "gelu", "gelu_tanh")
"""Activations that ONNX Runtime computes slowly, in its convolutions or after them."""
_PIXELS = {"silu": 2048, "relu6": 2048}
"""From how many pixels of the hidden map on a block with another activation is faster."""


def faster(block: Block, others: Sequence[Block] = ()) -> bool:
    """Whether a block is faster as a node, also where its input and its result have to be permuted.

    ``others`` are nodes already: between one of them and this block nothing is permuted. The rule was found on one
    thread of a processor with AVX-512 and ONNX Runtime 1.32, between two 1 x 1 convolutions, with 16 to 256 channels, 4
    times as many hidden ones, and maps of 128 x 128 to 8 x 8 pixels. With hardswish and gelu a node is faster at all
    sizes; with silu and relu6 at large ones, and slower in some blocks at small ones; with relu, which ONNX Runtime's
    products compute at the end of a row, it is about as fast. Without an expansion it is slower by what the
    permutations cost. benchmarks/export.py measures whole models.
    """
    activation = block.depthwise.activation
    if block.expand is None:
        beside = any(other.input is block.last or other.last is block.input for other in others)
        return activation in _SLOW and beside
    sizes = block.expand.convolution.meta["val"].shape[2:]
    return activation in _SLOW or math.prod(numbers(sizes)) >= _PIXELS.get(activation or "", math.inf)


def _drop_dropouts(graph: fx.Graph) -> None:
    """Those of inference, which stand between convolutions."""
    for node in graph.nodes:
        if node.target is _aten.dropout.default and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)


class _Constants:
    """The tensors of a program that are the same in every call: parameters, buffers and constants."""

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        named = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        changed = set(signature.buffers_to_mutate.values())
        tensors = {**program.constants, **program.state_dict}
        self._of = {name: tensors[target] for name, target in named.items() if target not in changed}

    def __getitem__(self, node: Any) -> Tensor:
        found = self._of[node.name]
        assert isinstance(found, Tensor)
        return found

    def has(self, *nodes: Any) -> bool:
        """Whether each of them is a constant in float32, or None."""
        found = [self._of.get(node.name) if isinstance(node, fx.Node) else None for node in nodes if node is not None]
        return all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in found)


# ---- the blocks of a graph ----


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, with the defaults of what is not given."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def _is_call(node: object, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _activation(node: fx.Node) -> str | None:
    if node.target in _GELUS:
        return {"none": "gelu", "tanh": "gelu_tanh"}[_arguments(node)["approximate"]]
    if node.target in _CLAMPS:
        limits = _arguments(node)
        return "relu6" if (limits["min_val"], limits["max_val"]) == (0, 6) else None
    return _ACTIVATIONS.get(node.target)  # type: ignore[call-overload, no-any-return]


def _norm(node: object, constants: _Constants) -> bool:
    """Whether a node is a norm by statistics that are known."""
    if not isinstance(node, fx.Node) or not _is_call(node, _aten.batch_norm.default):
        return False
    given = _arguments(node)
    known = given["running_mean"] is not None and given["running_var"] is not None and not given["training"]
    return known and constants.has(*(given[name] for name in ("weight", "bias", "running_mean", "running_var")))


def _layer(node: object, constants: _Constants) -> _Layer | None:
    """The layer whose result this is, if nothing else reads a value inside it."""
    if not isinstance(node, fx.Node):
        return None
    inside, norm, activation = node, None, _activation(node)
    if activation:
        inside = node.args[0]  # type: ignore[assignment]
    if _norm(inside, constants):
        norm, inside = inside, inside.args[0]  # type: ignore[assignment]
    if not _is_call(inside, _aten.conv2d.default):
        return None
    given = _arguments(inside)
    if not constants.has(given["weight"], given["bias"]):
        return None
    parts = [part for part in (node, norm, inside) if part is not None]
    parts = list(dict.fromkeys(parts))
    if any(len(part.users) != 1 for part in parts[1:]):
        return None
    return _Layer(inside, norm, activation, parts)


def _kernel(layer: _Layer, depthwise: bool) -> tuple[int, int] | None:
    """Side and stride of a convolution whose padding keeps a map's size, depthwise or of all channels; else None."""
    given = _arguments(layer.convolution)
    outputs, inputs, *sides = given["weight"].meta["val"].shape
    stride, padding, dilation = ((list(given[name]) * 2)[:2] for name in ("stride", "padding", "dilation"))
    side = sides[0]
    fits = sides == [side, side] and padding == [side // 2] * 2 and dilation == [1, 1] and stride[0] == stride[1]
    if depthwise:
        fits = fits and inputs == 1 and given["groups"] == outputs
    elif given["groups"] != 1:
        return None
    return (side, stride[0]) if fits else None


def _block(node: fx.Node, constants: _Constants) -> Block | None:
    """The block whose projection is this node."""
    if not _is_call(node, _aten.conv2d.default):
        return None
    project = _layer(node, constants)
    depthwise = _layer(node.args[0], constants)
    if not project or not depthwise or not depthwise.activation or len(project.input.users) != 1:
        return None
    side, stride = _kernel(depthwise, depthwise=True) or (0, 0)
    if _kernel(project, depthwise=False) != (1, 1) or side not in _KERNELS or stride not in (1, 2):
        return None
    expand = _layer(depthwise.input, constants)
    if expand and not (
        expand.activation == depthwise.activation
        and _kernel(expand, depthwise=False) == (1, 1)
        and len(depthwise.input.users) == 1
    ):
        expand = None
    last = node
    user = _only_user(last)
    if user is not None and _norm(user, constants) and user.args[0] is last:
        project.norm = last = user
        project.nodes.insert(0, user)
    found = Block(expand, depthwise, project, False, last)
    user = _only_user(last)
    if user is not None and _adds(user, found):
        found.residual, found.last = True, user
        project.nodes.insert(0, user)
    user = _only_user(found.last)
    if user is not None and _activation(user):
        return None  # it would be a node of its own, and is part of the convolution in other runtimes
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _adds(node: fx.Node, block: Block) -> bool:
    """Whether a node adds a block's input to its result."""
    if not _is_call(node, _aten.add.Tensor, _aten.add_.Tensor) or _arguments(node)["alpha"] != 1:
        return False
    one, other = node.args[:2]
    if other is block.last and not _is_call(node, _aten.add_.Tensor):
        one, other = other, one
    if one is not block.last or other is not block.input:
        return False
    before, after = (value.meta["val"].shape for value in (block.input, block.last))
    stride = _kernel(block.depthwise, depthwise=True)
    return list(before) == list(after) and stride is not None and stride[1] == 1


class _Changes:
    """What a graph changes in place, also through views."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._values = Values(module)
        self._place = {node: number for number, node in enumerate(module.graph.nodes)}
        self._written = [(node, self._memory(value)) for node in module.graph.nodes for value in _written(node)]

    def _memory(self, node: fx.Node) -> int | None:
        return memory_of(self._values.of[node])

    def meet(self, block: Block) -> bool:
        """Whether anything but the block changes its weights, or between its first and its last call what it reads."""
        own = {node for layer in block.layers for node in layer.nodes}
        read = {each for node in own for each in node.all_input_nodes}
        constants = {self._memory(node) for node in read if node.op == "placeholder"}
        values = {self._memory(node) for node in read | own}
        first, last = self._place[block.layers[-1].convolution], self._place[block.last]
        return any(
            node not in own and (memory in constants or (memory in values and first < self._place[node] < last))
            for node, memory in self._written
        )


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    given = _arguments(node)
    written = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    several = [value if isinstance(value, (list, tuple)) else [value] for value in written]
    return [value for values in several for value in values if isinstance(value, fx.Node)]


# ---- a node instead ----


def _folded(layer: _Layer, constants: _Constants) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the norm in them."""
    given = _arguments(layer.convolution)
    weight = constants[given["weight"]].double()
    bias = weight.new_zeros(len(weight)) if given["bias"] is None else constants[given["bias"]].double()
    if layer.norm is not None:
        norm = _arguments(layer.norm)
        scale = (constants[norm["running_var"]].double() + norm["eps"]).rsqrt()
        if norm["weight"] is not None:
            scale = scale * constants[norm["weight"]].double()
        weight, bias = weight * scale[:, None, None, None], (bias - constants[norm["running_mean"]].double()) * scale
        if norm["bias"] is not None:
            bias = bias + constants[norm["bias"]].double()
    return weight.detach().float(), bias.detach().float()


def _replace(program: ExportedProgram, block: Block, number: int) -> None:
    constants = _Constants(program)
    weights: list[fx.Node] = []
    for name, layer in (("expand", block.expand), ("depthwise", block.depthwise), ("project", block.project)):
        for kind, tensor in zip(("weight", "bias"), _folded(layer, constants) if layer else ()):
            weights.append(_add_constant(program, f"{DOMAIN}_block_{number}_{name}_{kind}", tensor))
    stride = _kernel(block.depthwise, depthwise=True)[1]  # type: ignore[index]
    attributes = {
        "stride": stride,
        "activation": CODES[block.depthwise.activation],
        "residual": int(block.residual),
    }
    out = block.last.meta["val"]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        weights = given if block.expand else (None, None, *given)
        b, _, *sides = x.shape  # what may change has to come from the node's input
        found = torch.onnx.ops.symbolic(
            f"{DOMAIN}::inverted_residual",
            [x.permute(0, 2, 3, 1), *weights],
            attributes,
            dtype=out.dtype,
            shape=(b, *((side - 1) // stride + 1 for side in sides), int(out.shape[1])),
            version=VERSION,
        )
        return found.permute(0, 3, 1, 2)

    inputs = [block.input, *weights]
    values = [node.meta["val"] for node in inputs]
    with values[0].fake_mode, torch.no_grad():
        traced = make_fx(call)(*values)
    graph = program.graph_module.graph
    places = [node for node in traced.graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(block.layers[-1].convolution):
        result = graph.graph_copy(traced.graph, dict(zip(places, inputs)))
    assert isinstance(result, fx.Node)
    block.last.replace_all_uses_with(result)
    for layer in block.layers:
        for node in layer.nodes:
            graph.erase_node(node)


def _add_constant(program: ExportedProgram, name: str, tensor: Tensor) -> fx.Node:
    """A further constant of a program, which becomes an initializer."""
    signature, graph = program.graph_signature, program.graph_module.graph
    places = [node for node in graph.nodes if node.op == "placeholder"]
    at = next(i for i, spec in enumerate(signature.input_specs) if spec.kind == InputKind.USER_INPUT)
    with graph.inserting_before(places[at]):
        node = graph.placeholder(name)
    node.meta["val"] = places[at].meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
    spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name)
    signature.input_specs.insert(at, spec)
    program.constants[name] = tensor
    return node
