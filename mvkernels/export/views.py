"""Which tensors of an exported graph are views of which, and where a map lies in the tensor that it is a view of.

A runtime without strides cannot be given a view. What it can be given is the whole tensor, and numbers that say which
part of it the view is.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher


def is_higher_order(node: fx.Node) -> bool:
    """Whether a node calls another graph, which may change what it is given, though fx takes it for pure."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def drop_dead_code(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(lambda node: node.is_impure() or is_higher_order(node))


class Place(NamedTuple):
    """Which channels of a tensor (B, C, H, W) or (B, H, W, C) are a map (B, heads, dim, H, W)."""

    channels_last: int
    heads: int
    dim: int
    first: int
    """The channel of the first dim of the first head."""
    next_head: int
    """Channels from one head to the next."""
    next: int
    """Channels from one dim of a head to the next."""


class Values(fx.Interpreter):
    """The values of a graph's nodes as fake tensors, with the strides and the shared memory of the real ones.

    Those that an exported program keeps for its nodes share no memory.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.of: dict[fx.Node, Any] = {}
        inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        self.mode = next(value.fake_mode for value in inputs if hasattr(value, "fake_mode"))
        # Without it PyTorch's own decompositions take no symbolic sizes.
        # Sizes that depend on data become symbols of this run alone.
        fresh = self.mode.shape_env.ignore_fresh_unbacked_symbols() if self.mode.shape_env else nullcontext()
        with self.mode, torch.no_grad(), enable_python_dispatcher(), fresh:
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        self.of[n] = super().run_node(n)
        return self.of[n]

    def source(self, node: fx.Node) -> fx.Node:
        """The tensor that this one is a view of; itself if none. Nodes that came into the graph later are no source."""
        memory = memory_of(self.of[node])
        while True:
            inputs = [n for one in node.all_input_nodes for n in _unpacked(one)]
            before = next((n for n in inputs if memory_of(self.of.get(n)) == memory), None)
            if before is None:
                return node
            node = before


def _unpacked(node: fx.Node) -> list[fx.Node]:
    """The node; of a tuple what it was made of."""
    return [node] if isinstance(node.meta.get("val"), Tensor) else list(node.all_input_nodes)


def memory_of(value: Any) -> int | None:
    """The memory that a tensor lies in, as a number; None of what is no tensor."""
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def numbers(sizes: Any) -> list[int]:
    """Sizes or strides as numbers: those of the example for what may change."""
    return [size if isinstance(size, int) else int(size.node.hint) for size in sizes]


def is_dense(value: Tensor) -> bool:
    """Whether a tensor is all of its memory, in the order of its axes."""
    sizes, step = numbers(value.shape), 1
    for size, stride in zip(reversed(sizes), reversed(numbers(value.stride()))):
        if size != 1 and stride != step:
            return False
        step *= size
    (offset, memory) = numbers([value.storage_offset(), value.untyped_storage().nbytes()])
    return offset == 0 and memory == step * value.element_size()


def place(value: Tensor, base: Tensor) -> Place | None:
    """Where a map (B, heads, dim, H, W) lies in a dense tensor of any axes that it is a view of; None if the tensor is
    neither (B, C, H, W) nor (B, H, W, C)."""
    if any(not isinstance(size, int) and size.node.hint == 1 for size in value.shape):
        return None  # its strides in the example say nothing of other sizes
    b, heads, dim, height, width = numbers(value.shape)
    strides = dict(zip("bhdyx", numbers(value.stride())))
    (offset,) = numbers([value.storage_offset()])
    channels, rest = divmod(math.prod(numbers(base.shape)), b * height * width)
    if rest:
        return None
    pixels = height * width
    for last, unit, steps in (
        (1, 1, {"x": channels, "y": width * channels}),
        (0, pixels, {"x": 1, "y": width}),
    ):
        steps["b"] = channels * pixels
        counts = {"b": b, "y": height, "x": width}
        if any(counts[axis] != 1 and strides[axis] != step for axis, step in steps.items()):
            continue
        found = [offset, strides["h"] if heads > 1 else 0, strides["d"] if dim > 1 else unit]
        if any(number % unit for number in found):
            continue
        first, next_head, following = (number // unit for number in found)
        if first + (heads - 1) * next_head + (dim - 1) * following < channels:
            return Place(last, heads, dim, first, next_head, following)
    return None
