"""Inverted residuals as single nodes of an ONNX graph: the op, which blocks of a graph are found, and their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mvmodels
from mvkernels import export, testing
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS
from mvkernels.export import convolutions, nodes
from mvkernels.ops.common.activations import CODES
from tests.ops.bridges import INSTRUCTION_SETS, assert_ok
from tests.swap.conftest import randomise

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(extension.module is None, reason="the C++ kernels are not built")

if extension.module is not None:
    from tests.export.onnx_nodes import model_of, poisoned, session

OP = OPS["inverted_residual"]
NAMES = ("expand", "expand_bias", "depthwise", "depthwise_bias", "project", "project_bias")


def block_of(weights: dict[str, Tensor | None], attributes: dict[str, int], given: tuple[str, ...] = ()) -> Any:
    """A graph with the node alone. Weights are initializers, those named in ``given`` are inputs."""
    values = {name: weight.numpy() for name, weight in weights.items() if weight is not None}
    names = ["x", *(name if name in values else "" for name in NAMES)]
    inputs = {"x": None, **{name: values.pop(name) for name in given}}
    return model_of("inverted_residual", inputs, names, attributes, values)


def through_onnx(threads: int) -> Any:
    """The op's own function, but run by ONNX Runtime: for :func:`mvkernels.testing.check`."""

    def function(backend: str, x: Tensor, stride: int, activation: str | None, residual: bool, **pairs: Any) -> Tensor:
        weights = dict(zip(NAMES, (t for name in NAMES[::2] for t in pairs[name] or (None, None))))
        attributes = {"stride": stride, "activation": CODES[activation], "residual": int(residual)}
        run = session(block_of(weights, attributes), threads).run
        (out,) = run(None, {"x": x.permute(0, 2, 3, 1).contiguous().numpy()})
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    return function


def weights_of(inputs: int, hidden: int, outputs: int, side: int = 3, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        fan_in = sizes[1] * sizes[-1] ** 2 if len(sizes) == 4 else 1
        return torch.randn(sizes, generator=generator) / fan_in**0.5

    shapes = (
        (hidden, inputs, 1, 1),
        (hidden,),
        (hidden, 1, side, side),
        (hidden,),
        (outputs, hidden, 1, 1),
        (outputs,),
    )
    return dict(zip(NAMES, (normal(*shape) for shape in shapes)))


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    inputs, hidden, outputs = (draw(st.integers(1, 40)) for _ in range(3))
    stride, residual, expands = draw(st.sampled_from([1, 2])), draw(st.booleans()), draw(st.booleans())
    if residual:
        stride, outputs = 1, inputs
    found = weights_of(
        inputs, hidden if expands else inputs, outputs, draw(st.sampled_from([3, 5])), draw(st.integers(0, 9))
    )
    pairs = {name: (found[name], found[f"{name}_bias"] if draw(st.booleans()) else None) for name in NAMES[::2]}
    if not expands:
        pairs["expand"] = None  # type: ignore[assignment]
    shape = (draw(st.integers(1, 3)), inputs, draw(st.integers(1, 19)), draw(st.integers(1, 19)))
    x = draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return {"x": x, **pairs, "stride": stride, "activation": draw(st.sampled_from([*CODES])), "residual": residual}


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems(), threads=st.sampled_from([1, 2]))
def test_values_of_the_op(instruction_set: str, problem: dict[str, Any], threads: int) -> None:
    """On poisoned buffers, against float64."""
    with poisoned(instruction_set):
        assert_ok(testing.check(OP, problem, "cpp", backward=False, function=through_onnx(threads)))


LARGE = torch.randn(1, 24, 24, 48, generator=torch.Generator().manual_seed(0)).numpy()
SETTINGS = {"stride": 1, "activation": CODES["silu"], "residual": 1}


def test_however_many_threads_a_call_has_its_values_are_the_same() -> None:
    """A kernel stops to split a picture when it has seen that no other thread helps, and tries it again later."""
    model = block_of(weights_of(48, 192, 48), SETTINGS)
    results = []
    for threads in (1, 2):
        run = session(model, threads).run
        results += [run(None, {"x": LARGE})[0] for _ in range(70)]
    assert np.isfinite(results[0]).all() and all((found == results[0]).all() for found in results)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_no_initializer_is_refused(name: str) -> None:
    """Those that may be left out when it is run."""
    weights = weights_of(48, 16, 48)
    with pytest.raises(Exception, match=f"mvkernels: inverted_residual: {name} is not an initializer"):
        session(block_of(weights, SETTINGS, (name,))).run(None, {"x": LARGE, name: weights[name].numpy()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 3}, "neither 1 nor 2"),
        ({"activation": 7}, "no such activation"),
        ({"activation": -1}, "no such activation"),
        ({"residual": None}, "residual is missing"),
        ({"stride": 2}, "no residual fits"),
        ({"expand": torch.zeros(16, 47, 1, 1)}, "do not fit"),
        ({"expand": torch.zeros(15, 48, 1, 1)}, "not float32 of the size wanted"),
        ({"expand": None, "expand_bias": None}, "do not fit"),
        ({"depthwise": torch.zeros(16, 1, 4, 4)}, "neither 3 nor 5"),
        ({"project_bias": torch.zeros(47)}, "not float32 of the size wanted"),
        ({"project": torch.zeros(48, 16)}, "weights of convolutions are wanted"),
    ],
)
def test_a_node_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    weights = weights_of(48, 16, 48)
    given = {**weights, **SETTINGS, **change}
    attributes = {name: given[name] for name in SETTINGS if given[name] is not None}
    with pytest.raises(Exception, match=message) as raised:
        session(block_of({name: given[name] for name in weights}, attributes)).run(None, {"x": LARGE})
    assert "mvkernels: inverted_residual: " in str(raised.value)


def test_a_map_of_another_rank_is_refused_and_a_batch_of_nothing_is_not() -> None:
    run = session(block_of(weights_of(48, 16, 48), SETTINGS)).run
    with pytest.raises(Exception, match=r"x is not a map \(B, H, W, C\)"):
        run(None, {"x": LARGE[0]})
    assert run(None, {"x": LARGE[:0]})[0].shape == (0, 24, 24, 48)


# ---- the blocks of a graph ----


class Block(nn.Module):
    """An inverted residual, or what nearly is one."""

    def __init__(
        self,
        side: int = 3,
        stride: int = 1,
        activation: Any = nn.Hardswish,
        *,
        second: Any = None,
        norm: Any = nn.BatchNorm2d,
        bias: bool = False,
        outputs: int = 8,
        expands: bool = True,
        residual: str = "",
        groups: tuple[int, int, int] = (1, 24, 1),
        project: int = 1,
        **depthwise: Any,
    ) -> None:
        super().__init__()
        self.residual, hidden = residual, 24 if expands else 8
        depthwise = {"padding": side // 2, "stride": stride, **depthwise}
        groups = groups if expands else (1, 8, 1)
        layers: list[nn.Module] = []
        if expands:
            layers += [nn.Conv2d(8, hidden, 1, groups=groups[0], bias=bias), norm(hidden), activation()]
        layers += [nn.Conv2d(hidden, hidden, side, groups=groups[1], bias=bias, **depthwise), norm(hidden)]
        layers += [(second or activation)()]
        layers += [nn.Conv2d(hidden, outputs, project, groups=groups[2], padding=project // 2, bias=bias)]
        self.layers = nn.Sequential(*layers, norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if self.residual == "twice":  # the hidden map is read a second time
            hidden = self.layers[:3](x)
            return self.layers[3:](hidden) + hidden.mean()
        out = self.layers(x)
        if self.residual == "in place":
            out += x
        elif self.residual:
            out = SUMS[self.residual](out, x)
        return out


SUMS = {
    "after": lambda out, x: out + x,
    "before": lambda out, x: x + out,
    "doubled": lambda out, x: torch.add(out, x, alpha=2),
    "mean": lambda out, x: out + x.mean(),
}


class Norm(nn.BatchNorm2d):
    """A norm that stays one of training."""

    def train(self, mode: bool = True) -> Norm:
        return super().train(True)


def found_in(module: nn.Module, image: Tensor) -> list[convolutions.Block]:
    return convolutions.find_blocks(export.program(module, image))


def small(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(**settings)).eval()


IMAGE = torch.rand(2, 3, 13, 9, generator=torch.Generator().manual_seed(0))
INPLACE = {
    name: lambda make=make: make(inplace=True)
    for name, make in {"silu": nn.SiLU, "hardswish": nn.Hardswish, "relu": nn.ReLU, "relu6": nn.ReLU6}.items()
}
GELUS = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh")}
MATCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "stride": ({"stride": 2}, {"stride": 2}),
    "side": ({"side": 5}, {}),
    "side and stride": ({"side": 5, "stride": 2}, {"stride": 2}),
    "biases": ({"bias": True}, {}),
    "no norms": ({"norm": lambda _: nn.Identity(), "bias": True}, {}),
    "no norms, no biases": ({"norm": lambda _: nn.Identity()}, {}),
    "norms without weights": ({"norm": lambda channels: nn.BatchNorm2d(channels, affine=False)}, {}),
    "no expansion": ({"expands": False}, {"expands": False}),
    "no expansion, residual": ({"expands": False, "residual": "after"}, {"expands": False, "residual": True}),
    "dropouts": ({"activation": lambda: nn.Sequential(nn.Hardswish(), nn.Dropout(0.5))}, {}),
    "residual": ({"residual": "after"}, {"residual": True}),
    "residual first": ({"residual": "before"}, {"residual": True}),
    "residual in place": ({"residual": "in place"}, {"residual": True}),
    "twice the residual": ({"residual": "doubled"}, {}),
    "another summand": ({"residual": "mean"}, {}),
    "wider": ({"outputs": 11}, {}),
    **{name: ({"activation": make}, {"activation": name}) for name, make in GELUS.items()},
    **{f"{name} in place": ({"activation": make}, {"activation": name}) for name, make in INPLACE.items()},
    "silu": ({"activation": nn.SiLU}, {"activation": "silu"}),
}


@pytest.mark.parametrize("name", MATCHES)
def test_a_block_becomes_a_node(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its weights as initializers, and the same values."""
    settings, wanted = MATCHES[name]
    monkeypatch.setattr(convolutions, "faster", lambda *_: True)
    found = export.export_model(randomise(small(**settings)), IMAGE, "onnx", tmp_path / "m.onnx", fused=True)
    graph = onnx.load(tmp_path / "m.onnx").graph
    (node,) = [node for node in graph.node if node.domain == nodes.DOMAIN]
    constants = {constant.name for constant in graph.initializer}
    assert found.ok and found.details["fused_nodes"] == 1 and node.op_type == "inverted_residual"
    given = [each for each in node.input[1:] if each]
    assert len(given) == (6 if wanted.get("expands", True) else 4) and constants.issuperset(given)
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    activation = CODES[wanted.get("activation", "hardswish")]
    expected = {"stride": wanted.get("stride", 1), "activation": activation, "residual": wanted.get("residual", 0)}
    assert attributes == expected
    read = {name for each in graph.node for name in each.input}
    assert sum(each.op_type == "Conv" for each in graph.node) == 1 and constants <= read


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "hidden map read twice": {"residual": "twice"},
    "groups of the expansion": {"groups": (2, 24, 1)},
    "groups of the projection": {"groups": (1, 24, 2)},
    "not depthwise": {"groups": (1, 12, 1)},
    "dilation": {"dilation": 2, "padding": 2},
    "no padding": {"padding": 0},
    "padding of another side": {"side": 5, "padding": 1},
    "uneven stride": {"stride": (1, 2)},
    "stride of 3": {"stride": 3},
    "side of 7": {"side": 7},
    "projection of 3 x 3": {"project": 3},
    "two activations": {"second": nn.ReLU},
    "no activation": {"activation": nn.Identity},
    "another activation": {"activation": nn.ELU},
    "a clamp at 5": {"activation": lambda: nn.Hardtanh(0, 5)},
    "a norm of training": {"norm": Norm},
    "a norm without statistics": {"norm": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)},
}
# Their depthwise convolution and projection are a block without an expansion.
PARTS = {"hidden map read twice", "groups of the expansion", "two activations"}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_nearly_a_block_stays(name: str) -> None:
    """Or has a block without an expansion in it."""
    found = found_in(small(**NEAR_MISSES[name]), IMAGE)
    assert len(found) == (name in PARTS) and all(block.expand is None for block in found)


def test_what_changes_the_input_before_it_is_added() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            out = self.block(x)
            x.relu_()
            return out + x

    (block,) = found_in(randomise(Changed()).eval(), torch.rand(1, 8, 5, 5))
    assert block.expand is not None and not block.residual


def test_a_weight_of_two_blocks_and_blocks_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay channels-last, for any size."""
    monkeypatch.setattr(convolutions, "faster", lambda *_: True)
    torch.manual_seed(0)
    first, second = Block(residual="after"), Block()
    second.layers[0].weight = first.layers[0].weight
    third = nn.Sequential(Block(stride=2, side=5), Block(stride=2))
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), first, second, third, nn.Conv2d(8, 4, 1)))
    found = export.export_model(model, IMAGE, "onnx", tmp_path / "m.onnx", fused=True, dynamic=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert found.ok and len(found.checked) == 2 and found.details["fused_nodes"] == 4
    assert kinds.count("inverted_residual") == 4 and kinds.count("Transpose") == 2 and kinds.count("Conv") == 2


def test_sums_between_blocks_are_channels_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.mixed = Block(), Block(), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.mixed(x))

    monkeypatch.setattr(convolutions, "faster", lambda *_: True)
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), Between()))
    found = export.export_model(model, IMAGE, "onnx", tmp_path / "m.onnx", fused=True)
    made_by = {name: node for node in onnx.load(tmp_path / "m.onnx").graph.node for name in node.output}
    (add,) = (node for node in made_by.values() if node.op_type == "Add")
    assert found.ok and {made_by[name].op_type for name in add.input} == {"inverted_residual", "Transpose"}


@pytest.mark.parametrize(
    ("settings", "side", "wanted"),
    [
        ({"activation": nn.Hardswish}, 8, True),
        ({"activation": nn.GELU}, 8, True),
        ({"activation": nn.SiLU}, 32, False),
        ({"activation": nn.SiLU}, 64, True),
        ({"activation": nn.SiLU, "stride": 2}, 64, True),
        ({"activation": nn.ReLU6}, 32, False),
        ({"activation": nn.ReLU6}, 64, True),
        ({"activation": nn.ReLU}, 64, False),
        ({"activation": nn.Hardswish, "expands": False}, 64, False),
    ],
)
def test_which_blocks_are_faster(settings: dict[str, Any], side: int, wanted: bool) -> None:
    """As measured: see the function."""
    (block,) = found_in(small(**settings), torch.rand(1, 3, side, side))
    assert convolutions.faster(block) is wanted


def test_without_an_expansion_a_block_is_faster_beside_another() -> None:
    image = torch.rand(1, 8, 64, 64)
    for activation, wanted in ((nn.Hardswish, True), (nn.SiLU, False)):
        for expands in ((True, False), (False, True)):
            parts = [Block(activation=activation, expands=each) for each in expands]
            blocks = found_in(nn.Sequential(*parts).eval(), image)
            separable, other = sorted(blocks, key=lambda block: block.expand is not None)
            assert separable.expand is None and convolutions.faster(other)
            assert not convolutions.faster(separable) and convolutions.faster(separable, [other]) is wanted


def test_models(tmp_path: Path) -> None:
    """Where the rule says so, and values are the model's."""
    torch.manual_seed(0)
    model = randomise(mvmodels.create_model("efficientvit_b0"))
    path = tmp_path / "model.onnx"
    found = export.export_model(model, torch.rand(1, 3, 128, 96), "onnx", path, fused=True)
    count = sum(node.op_type == "inverted_residual" for node in onnx.load(path).graph.node)
    assert found.ok and count > 5 and found.details["fused_nodes"] == count + 4
