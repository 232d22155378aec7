"""What the tests of the ops for inference share: their arguments, maps of any strides, and packed weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import mvkernels
from mvkernels import testing
from mvkernels.dispatch.registry import OPS, Op
from tests.ops import bridges
from tests.ops.bridges import INSTRUCTION_SETS

Arguments = dict[str, Any]

NAMES = [name for name, op in OPS.items() if not op.has_backward("cpp")]
STRIDES = (*testing.STRIDES, "some channels")
CHANNELS = st.one_of(st.integers(1, 170), st.sampled_from([8, 16, 24, 32, 48, 64, 80, 96, 128, 160]))
SIDES = st.one_of(st.integers(1, 20), st.integers(1, 20), st.integers(21, 40))
SEEDS = st.integers(0, 2**31)

needs_cpp = bridges.needs_cpp(NAMES[0])


def everywhere(test: Any) -> Any:
    """Under every instruction set that is built and runs here."""
    return needs_cpp(pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)(test))


def make_map(shape: Iterable[int], kind: str, generator: torch.Generator | None = None) -> Tensor:
    """As testing.make_map, or a slice of the channels of a larger channels-last map."""
    shape = tuple(shape)
    if kind != "some channels":
        return testing.make_map(shape, kind, generator=generator)
    b, c, height, width = shape
    room = torch.full((b, height, width, c + 8), float("nan"))[..., 3 : 3 + c].permute(0, 3, 1, 2)
    return room.copy_(torch.randn(shape, generator=generator))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of a layer that keeps the variance of a map."""
    return torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5


def _pair(shape: tuple[int, ...], has_bias: bool, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    return _weight(shape, generator), torch.randn(shape[0], generator=generator) if has_bias else None


def inverted_residual(
    batch: int = 2,
    size: tuple[int, int] = (6, 7),
    inputs: int = 8,
    hidden: int = 24,
    outputs: int = 8,
    kernel: int = 3,
    expands: bool = True,
    biases: Iterable[bool] = (True,) * 3,
    kind: str = "channels_last",
    seed: int = 0,
) -> Arguments:
    generator = _generator(seed)
    shapes = (hidden, inputs, 1, 1), (hidden, 1, kernel, kernel), (outputs, hidden, 1, 1)
    names = "expand", "depthwise", "project"
    pairs: Arguments = {name: _pair(shape, has_bias, generator) for name, shape, has_bias in zip(names, shapes, biases)}
    if not expands:
        pairs["expand"] = None
    return {"x": make_map((batch, inputs if expands else hidden, *size), kind, generator), **pairs}


def conv3x3(
    batch: int = 2,
    size: tuple[int, int] = (6, 7),
    inputs: int = 16,
    beside: int = 0,
    outputs: int = 16,
    stride: int = 1,
    bias: bool = True,
    residual: str | None = None,
    kind: str = "channels_last",
    beside_kind: str = "channels_last",
    seed: int = 0,
) -> Arguments:
    """``inputs`` are the channels of x, ``residual`` is the kind of its strides."""
    generator = _generator(seed)
    weight, term = _pair((outputs, inputs + beside, 3, 3), bias, generator)
    found: Arguments = {"x": make_map((batch, inputs, *size), kind, generator), "weight": weight, "stride": stride}
    if bias:
        found["bias"] = term
    if beside:
        found["beside"] = make_map((batch, beside, *size), beside_kind, generator)
    if residual:
        after = ((side - 1) // stride + 1 for side in size)
        found["residual"] = make_map((batch, outputs, *after), residual, generator)
    return found


def pointwise(
    batch: int = 2,
    size: tuple[int, int] = (6, 7),
    inputs: int = 16,
    outputs: int = 24,
    bias: bool = True,
    norm: tuple[bool, bool] | None = (True, True),
    residual: str | None = None,
    kind: str = "channels_last",
    seed: int = 0,
) -> Arguments:
    """``norm``: whether it has a weight, and a bias; ``residual`` is the kind of its strides."""
    generator = _generator(seed)
    weight, term = _pair((outputs, inputs), bias, generator)
    found: Arguments = {"x": make_map((batch, inputs, *size), kind, generator), "weight": weight}
    if bias:
        found["bias"] = term
    if norm is not None:
        factor, shift = 1 + torch.randn(2, inputs, generator=generator) * 0.3
        found["norm"] = factor if norm[0] else None, shift - 1 if norm[1] else None
    if residual:
        found["residual"] = make_map((batch, outputs, *size), residual, generator)
    return found


def patch_transformer_layer(
    batch: int = 2,
    size: tuple[int, int] = (6, 7),
    heads: int = 2,
    head_dim: int = 6,
    hidden: int = 20,
    patch: tuple[int, int] = (2, 2),
    bias: bool = True,
    kind: str = "channels_last",
    seed: int = 0,
) -> Arguments:
    """``bias``: whether the queries, keys and values have one."""
    generator, c = _generator(seed), heads * head_dim
    found: Arguments = {"x": make_map((batch, c, *size), kind, generator)}
    layers = {"norm1": (c,), "qkv": (3 * c, c), "proj": (c, c), "norm2": (c,), "fc1": (hidden, c), "fc2": (c, hidden)}
    for name, shape in layers.items():
        normal = torch.randn(2, c, generator=generator) * 0.3 if len(shape) == 1 else None
        weight, term = _pair(shape, True, generator) if normal is None else (1 + normal[0], normal[1])
        found |= {f"{name}_weight": weight, f"{name}_bias": term}
    return found | {"heads": heads, "patch_size": patch} | ({} if bias else {"qkv_bias": None})


_EXAMPLES: dict[str, Callable[..., Arguments]] = {
    "inverted_residual": inverted_residual,
    "conv3x3": conv3x3,
    "pointwise": pointwise,
    "patch_transformer_layer": patch_transformer_layer,
}


def example(name: str, **sizes: Any) -> Arguments:
    """Arguments of an op, of these sizes."""
    return _EXAMPLES[name](**sizes)


def full(name: str, **sizes: Any) -> Arguments:
    """Arguments with all the tensors that an op takes."""
    more = {"conv3x3": {"beside": 5, "residual": "channels_last"}, "pointwise": {"residual": "channels_last"}}
    return example(name, **more.get(name, {}), **sizes)


def weights_of(name: str, arguments: Arguments) -> Arguments:
    """What ``pack_<op>`` takes of the op's arguments."""
    if name == "inverted_residual":
        return {each: arguments[each] for each in ("expand", "depthwise", "project")}
    if name == "patch_transformer_layer":
        return {each: value for each, value in arguments.items() if each.endswith(("_weight", "_bias"))}
    found = {each: arguments[each] for each in ("weight", "bias", "norm", "stride") if each in arguments}
    return found | ({"size": tuple(arguments["x"].shape[2:])} if name == "conv3x3" else {})


def pack(name: str, arguments: Arguments) -> Tensor:
    packed: Tensor = getattr(mvkernels, f"pack_{name}")(**weights_of(name, arguments))
    return packed


def picture(op: Op, arguments: Arguments, index: int) -> Arguments:
    """The arguments for one map of a batch."""
    maps = {key: arguments[key][index : index + 1] for key in op.maps if arguments.get(key) is not None}
    return testing.with_tensors(arguments, maps)


def assert_the_same_on_threads_in_batches_and_packed(op: Op, arguments: Arguments) -> None:
    packed = pack(op.name, arguments)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with testing.poisoned():
                found += [op.function(**arguments, packed=given, backend="cpp") for given in (None, packed)]
                alone = (picture(op, arguments, i) for i in range(len(arguments["x"])))
                found.append(torch.cat([op.function(**each, packed=packed, backend="cpp") for each in alone]))
    finally:
        torch.set_num_threads(before)
    assert found[0].isfinite().all()
    for other in found[1:]:
        assert torch.equal(other, found[0])


def assert_takes_the_reference(op: Op, arguments: Arguments, reason: str) -> None:
    assert torch.equal(op.function(**arguments), op.reference(**arguments))
    with pytest.raises(mvkernels.BackendUnavailable, match=reason):
        op.function(**arguments, backend="cpp")


def assert_refused(op: Op, arguments: Arguments, change: Arguments, error: type[Exception], message: str) -> None:
    """The arguments with this change are, in one line that has the message."""
    with pytest.raises(error, match=re.escape(message)) as caught:
        op.function(**arguments | change)
    assert str(caught.value).startswith(f"{op.name}: ") and "\n" not in str(caught.value)
    assert not mvkernels.can_run(op.name, "cpp", **arguments | change)[0]
