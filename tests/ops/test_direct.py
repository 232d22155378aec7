"""Calls that go straight to a C++ operator, and those that take the long way: nobody can tell which it was.

The first ask in Python only what the operator cannot see.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import mvkernels
from mvkernels.dispatch import backend as backends
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
MODULES = {name: importlib.import_module(f"mvkernels.ops.{name}") for name in OPS}
DIRECT = [name for name, module in MODULES.items() if hasattr(module, "direct")]


class Subclass(torch.Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def plain(name: str, batch=2, heads=2, dim=4, height=4, width=6, count=3, value_dim=4, kernel=3) -> dict[str, Any]:
    """Arguments that are in order, unless a size is not."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    a, b = (draw(batch, heads, dim, height, width) for _ in range(2))
    c = draw(batch, heads, value_dim if name in ("patch_attention", "window_attention") else dim, height, width)
    tokens, more = draw(batch, heads, count, dim), draw(batch, heads, count, dim)
    channels = 3 * heads * dim
    weights = {
        "depthwise": [draw(channels, 1, k, k) for k in (kernel, 3)],
        "pointwise": [draw(channels, dim, 1, 1) for _ in range(2)],
    }
    return {
        "patch_attention": {"query": a, "key": b, "value": c, "patch_size": 2, "bias": None, "scale": None},
        "window_attention": {
            "query": a, "key": b, "value": c, "window_size": (2, 3), "shift": 1, "bias": None, "scale": None,
        },
        "mobile_to_former": {"query": tokens, "x": a, "scale": None},
        "former_to_mobile": {"x": a, "key": tokens, "value": more, "scale": None, "residual": True},
        "relu_linear_attention": {"query": a, "key": b, "value": c, "eps": 1e-5},
        "multiscale_linear_attention": {
            "qkv": draw(batch, channels, height, width), **weights, "head_dim": dim, "eps": 1e-5,
            "depthwise_bias": None, "pointwise_bias": [None, None],
        },
    }[name]  # fmt: skip


def resized(axis: int, size: int) -> Any:
    """To another size along an axis, wherever the tensor has it."""

    def change(t: torch.Tensor) -> torch.Tensor:
        shape = list(t.shape)
        shape[axis % t.dim()] = size
        return torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape).to(t.dtype)

    return change


SIZES = (0, 1, 2, 3, 5, 7, 24, 257)
CHANGES = {
    **{f"axis {axis} of {size}": resized(axis, size) for axis in range(5) for size in SIZES},
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in (
        torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)},
    "meta": lambda t: t.to("meta"), "sparse": lambda t: t.to_sparse(), "mkldnn": lambda t: t.to_mkldnn(),
    "an axis less": lambda t: t[0], "an axis more": lambda t: t[None], "a number": lambda t: t.flatten()[0],
    "a view": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "backwards": lambda t: t.mT.contiguous().mT,
    "one element": lambda t: t.flatten()[:1].expand_as(t), "not a number": lambda t: t / 0 * 0,
    "a subclass": lambda t: t.as_subclass(Subclass), "a parameter": torch.nn.Parameter,
    "recording": lambda t: t.detach().requires_grad_(), "nothing": lambda t: None, "an array": lambda t: t.numpy(),
    "a list": lambda t: [t], "text": lambda t: "query",
}  # fmt: skip
NUMBERS = (None, 0.5, 0.0, -1.0, float("nan"), 1, True, "1", np.float32(0.5), 10**400, 1e-15)
PATCHES = (1, 3, 6, 0, -2, True, 2.0, (2, 3), (1, 9), [2, 2], (2,), (2, 2, 2), (2, 0), (True, 2), {2: 0, 3: 0}, "22",
           None, np.int64(2), (np.int64(2), 2), 2**31, 2**40, (2**63 - 1, 2), 2**70, torch.tensor(2))  # fmt: skip
SETTINGS: dict[str, tuple[Any, ...]] = {
    "patch_size": PATCHES, "window_size": PATCHES, "shift": (0, (0, 1), (1, 2), (0, 3), -1, *PATCHES),
    "scale": NUMBERS, "eps": NUMBERS, "residual": (False, 0, 1, None, np.bool_(True)),
    "head_dim": (2, 8, 0, -4, 3, 257, True, 4.0, None, np.int64(4), 2**70),
    "bias": (torch.zeros(2, 6, 6), torch.zeros(2, 6, 5), torch.zeros(2, 6, 6).double(), torch.zeros(0), "bias",
             torch.ones(2, 6, 6, requires_grad=True), torch.zeros(6, 6), torch.nn.Parameter(torch.ones(2, 24, 24))),
    "backend": ("cpp", "auto", "reference", "triton", "gpu", 3),
}  # fmt: skip
LISTS = {
    "a tuple": tuple, "one less": lambda v: v[1:], "one more": lambda v: [*v, v[0]], "none": lambda v: [],
    "a tensor": lambda v: v[0], "with nothing": lambda v: [None, *v[1:]],
    "a ParameterList": torch.nn.ParameterList, "text": lambda v: "weights",
    "three times": lambda v: [*v, *v, *v],
}  # fmt: skip
BIASES = (
    None, [None, None], (None, None), [None], [], "no", [torch.ones(24), None], [torch.ones(0), torch.ones(0)],
    [torch.ones(24), torch.ones(23)], torch.ones(2, 24), [torch.ones(24), torch.ones(24, requires_grad=True)],
)  # fmt: skip


def choices(key: str, value: Any) -> list[Any]:
    """What may stand in the place of an argument: callables are to be called with it."""
    if key in SETTINGS:
        return list(SETTINGS[key])
    if key.endswith("_bias"):
        return list(BIASES)
    if isinstance(value, torch.Tensor):
        return list(CHANGES.values())
    if isinstance(value, list):
        return [*LISTS.values(), *(lambda v, change=change: [change(v[0]), *v[1:]] for change in CHANGES.values())]
    return []


def replaced(arguments: dict[str, Any], key: str, choice: Any) -> dict[str, Any]:
    with suppress(Exception):  # of a second change that the first leaves no room for
        return {**arguments, key: choice(arguments[key]) if callable(choice) else choice}
    return arguments


def outcome(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What a call comes to: the result and gradients as they lie, or the exception."""
    try:
        out = getattr(mvkernels, name)(**arguments)
    except Exception as error:
        return type(error), str(error), repr(error.__cause__), repr(error.__context__)
    found = (type(out), out.dtype, out.device, out.shape, out.stride(), out.requires_grad)
    if out.device.type != "cpu":
        return found
    lists = (list, tuple, torch.nn.ParameterList)
    tensors = [t for v in arguments.values() for t in (v if isinstance(v, lists) else [v])]
    leaves = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out)) if out.requires_grad else ()
    return *found, *(t.detach().double().numpy().tobytes() for t in (out, *grads))


def assert_both_ways_alike(name: str, arguments: dict[str, Any]) -> None:
    found = outcome(name, arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_PLAIN", frozenset())
        wanted = outcome(name, arguments)
    assert found == wanted


def test_every_op_with_a_backward_on_cpp_has_the_short_way() -> None:
    assert set(DIRECT) == {name for name, op in OPS.items() if "cpp" in op.why_not and op.has_backward("cpp")}


@pytest.mark.parametrize("name", DIRECT)
def test_both_ways_accept_the_same_and_say_the_same(name: str) -> None:
    arguments = {"backend": None, **plain(name)}
    for key, value in arguments.items():
        for choice in choices(key, value):
            assert_both_ways_alike(name, replaced(arguments, key, choice))


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("axis", ["batch", "heads", "dim", "height", "width", "count", "value_dim", "kernel"])
def test_both_ways_are_alike_for_sizes_that_fit(name: str, axis: str) -> None:
    for size in (0, 1, 256, 257) if "dim" in axis else (0, 1, 2):
        assert_both_ways_alike(name, plain(name, **{axis: size}))


def test_both_ways_are_alike_where_weights_could_be_of_either_list() -> None:
    one = torch.randn(6, 1, 1, 1)
    for first, second in ((3, 1), (1, 3), (2, 2), (0, 4), (1, 2)):
        arguments = {
            "qkv": torch.randn(1, 6, 4, 4),
            "depthwise": [one] * first,
            "pointwise": [one] * second,
            "head_dim": 1,
        }
        assert_both_ways_alike("multiscale_linear_attention", arguments)


@pytest.mark.parametrize("name", DIRECT)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_both_ways_are_alike_for_some_changes_at_once(name: str, data: st.DataObject) -> None:
    arguments = {"backend": None, **plain(name)}
    for _ in range(data.draw(st.integers(2, 3))):
        key = data.draw(st.sampled_from(sorted(arguments)))
        if some := choices(key, arguments[key]):
            arguments = replaced(arguments, key, some[data.draw(st.integers(0, len(some) - 1))])
    assert_both_ways_alike(name, arguments)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that were checked: those of calls that took the long way."""
    seen: list[str] = []
    for name in DIRECT:
        op = OPS[name]
        monkeypatch.setattr(
            MODULES[name], "_check", lambda *a, name=name, check=op.check: (seen.append(name), check(*a))[1]
        )
    monkeypatch.delenv("MVKERNELS_BACKEND", raising=False)
    return seen


@pytest.mark.parametrize("backend", [None, "cpp"])
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", DIRECT)
def test_the_usual_call_goes_straight_to_the_operator(name, recording, backend, checked):
    arguments = plain(name)
    first = next(iter(arguments))
    arguments[first].requires_grad_(recording)
    out = OPS[name].function(**arguments, backend=backend)
    assert out.requires_grad == recording and not checked
    if recording:
        with torch.no_grad():
            torch.testing.assert_close(OPS[name].function(**arguments), out, rtol=0, atol=0)
        assert torch.autograd.grad(out.sum(), arguments[first])[0].shape == arguments[first].shape and not checked


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", DIRECT)
def test_what_changes_a_call_takes_the_long_way(name, checked, monkeypatch):
    op, arguments = OPS[name], plain(name)
    first = next(iter(arguments))
    around = {
        "autocast": torch.autocast("cpu", torch.bfloat16), "a mode": Mode(),
        "a backend": mvkernels.use_backend("reference"), "forward mode": forward_ad.dual_level(),
        "nothing": nullcontext(),
    }  # fmt: skip
    for what, context in around.items():
        checked.clear()
        with context:
            out = op.function(**arguments)
        assert checked == ([name] if what != "nothing" else []), what
        assert out.dtype == (torch.bfloat16 if what == "autocast" else torch.float32)
    for run in (
        lambda: torch.func.grad(lambda x: op.function(**{**arguments, first: x}).sum())(arguments[first]),
        lambda: torch.jit.trace(lambda x: op.function(**{**arguments, first: x}), arguments[first], check_trace=False),
        lambda: op.function(**{**arguments, first: arguments[first].as_subclass(Subclass)}),
        lambda: op.function(**arguments, backend="reference"),
    ):
        checked.clear()
        run()
        assert checked == [name]
    checked.clear()
    monkeypatch.setenv("MVKERNELS_BACKEND", "reference")
    op.function(**arguments)
    monkeypatch.delenv("MVKERNELS_BACKEND")
    monkeypatch.setattr(extension, "module", None)
    op.function(**arguments)
    assert checked == [name] * 2


class Ended(Exception):
    """As torch.utils.checkpoint ends a recomputation."""


@pytest.mark.parametrize("name", DIRECT)
def test_an_exception_of_a_hook_is_not_the_operators(name):
    arguments, calls = plain(name), []
    first = next(iter(arguments))
    arguments[first].requires_grad_()

    def pack(tensor):
        calls.append(tensor)
        raise Ended

    with pytest.raises(Ended), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        OPS[name].function(**arguments)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["relu_linear_attention", "multiscale_linear_attention"])
def test_the_operator_that_keeps_nothing(name):
    """It is the first output of the one that keeps what the backward needs, and its fake says how it lies."""
    namespace, arguments = torch.ops.mvkernels_cpp, plain(name)
    given = {
        "relu_linear_attention": lambda query, key, value, **_: (query, key, value, 1e-5),
        "multiscale_linear_attention": lambda qkv, depthwise, pointwise, **_: (qkv, [*depthwise, *pointwise], 4, 1e-5),
    }[name](**arguments)
    keeps = getattr(namespace, f"{name}_forward").default
    alone = getattr(namespace, name).default
    assert torch.equal(alone(*given), keeps(*given)[0])
    torch.library.opcheck(alone, given)
