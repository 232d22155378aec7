"""The Triton kernel of inverted_residual on CPU tensors, through Triton's interpreter, and when it is chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mvkernels
from mvkernels import testing, tune
from mvkernels.dispatch import backend as dispatch
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.common.activations import ACTIVATIONS
from mvkernels.testing import make_map
from mvkernels.triton import configs
from tests.devices import PRETENDED
from tests.ops.bridges import assert_ok, interpreter
from tests.ops.inference import STRIDES
from tests.ops.inference import inverted_residual as example

launcher = pytest.importorskip("mvkernels.ops.inverted_residual.triton.launcher")
plan = pytest.importorskip("mvkernels.ops.inverted_residual.triton.plan")
prediction = pytest.importorskip("mvkernels.ops.inverted_residual.triton.prediction")

OP = OPS["inverted_residual"]
CHANNELS = st.sampled_from([1, 3, 8, 16, 20, 24, 33, 40])
TILES = [(1, 1, 1), (2, 4, 2), (4, 4, 4), (8, 2, 1), (2, 16, 8), (4, 8, 2)]


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """The same values, rounded, x with strides of this kind."""
    tensors = {name: value.to(dtype) for name, value in testing.tensors_in(arguments).items()}
    tensors["x"] = make_map(tensors["x"].shape, kind, dtype)
    return testing.with_tensors(arguments, tensors)


def check(arguments: dict[str, Any]) -> None:
    assert_ok(testing.check(OP, arguments, "triton"))


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    """Any block, map, strides, activation and dtype."""
    expands, residual = draw(st.booleans()), draw(st.booleans())
    hidden = draw(CHANNELS)
    inputs = draw(CHANNELS) if expands else hidden
    kind = draw(st.sampled_from(STRIDES))
    arguments = example(
        batch=draw(st.integers(1, 3)),
        size=(draw(st.integers(1, 11)), draw(st.integers(1, 11))),
        inputs=inputs,
        hidden=hidden,
        outputs=inputs if residual else draw(CHANNELS),
        kernel=draw(st.sampled_from([3, 3, 5, 5, 1, 7])),
        expands=expands,
        biases=[draw(st.booleans()) for _ in range(3)],
        kind=kind,
        seed=draw(st.integers(0, 2**31)),
    )
    if kind in testing.STRIDES and draw(st.booleans()):
        arguments = in_dtype(arguments, torch.float16, kind)
    return {
        **arguments,
        "stride": 1 if residual else draw(st.sampled_from([1, 2])),
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "residual": residual,
    }


@interpreter
@pytest.mark.core
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(arguments=problems())
def test_any_block_map_and_strides(arguments):
    check(arguments)


@interpreter
@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    arguments=problems(),
    tile=st.sampled_from(TILES),
    chunk=st.sampled_from([16, 32]),
    blocks=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.sampled_from([16, 64])),
    programs=st.sampled_from([1, 3]),
)
def test_any_configuration(arguments, tile, chunk, blocks, programs):
    names = ("BLOCK_M", "BLOCK_H", "BLOCK_O")
    change = dict(zip(("TY", "TX", "SX"), tile)) | {"CHUNK": chunk, "PROGRAMS": programs} | dict(zip(names, blocks))
    problem = problem_of(arguments)
    with configs.trying(OP.name, "forward_tiles", configs.key_text(plan.key_of(problem)), change):
        check(arguments)


def problem_of(arguments: dict[str, Any], device: str = "") -> Any:
    """The description of a call, on the interpreter or a pretended GPU."""
    names = ("x", "expand", "depthwise", "project", "stride", "activation", "residual")
    found = launcher.problem_of(*(testing.normalised(OP, arguments)[name] for name in names))
    return replace(found, device=PRETENDED[device]) if device else found


@interpreter
@pytest.mark.parametrize(
    ("inputs", "hidden", "outputs", "kernel", "stride"),
    [(150, 40, 8, 3, 1), (130, 20, 8, 5, 2), (24, 70, 70, 3, 1), (24, 70, 136, 3, 2), (70, 40, 140, 3, 1)],
)
def test_more_channels_than_a_tile_takes_at_once(inputs, hidden, outputs, kernel, stride):
    """Of x in chunks or in two pieces, hidden ones in blocks, those of the result in several programs."""
    arguments = example(batch=1, size=(5, 6), inputs=inputs, hidden=hidden, outputs=outputs, kernel=kernel)
    check(arguments | {"stride": stride})


@interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_maps_outside_of_any_half_type_and_constant_ones(activation):
    arguments = example(size=(5, 4), hidden=20, kernel=5) | {"activation": activation, "residual": True}
    for factor in (1e-38, 1e-3, 30.0, 1e4, 1e18):
        for x in (arguments["x"] * factor, *(torch.full_like(arguments["x"], sign * factor) for sign in (1, -1))):
            check(arguments | {"x": x})
    zeros = testing.with_tensors(arguments, {k: v * 0 for k, v in testing.tensors_in(arguments).items()})
    assert not OP.function(**zeros, backend="triton").any()


@interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "stride", "expands"), [(3, 1, True), (5, 2, True), (3, 2, False)])
def test_what_is_not_finite_stays_where_it_belongs(value, activation, kernel, stride, expands):
    arguments = example(
        size=(9, 10), inputs=21, hidden=37 if expands else 21, outputs=19, kernel=kernel, expands=expands
    )
    arguments |= {"stride": stride, "activation": activation}
    arguments["x"][1, 5, 4, 6] = value
    check(arguments)
    out = OP.function(**arguments, backend="triton")
    for side, at, axis in ((out.shape[2], 4, 2), (out.shape[3], 6, 3)):
        for place in range(side):
            if abs(place * stride - at) > kernel // 2:
                assert out.select(axis, place).isfinite().all()
    assert out[0].isfinite().all()


@interpreter
def test_weights_of_any_strides_and_packed_ones_that_play_no_part():
    arguments = example(inputs=16, hidden=48, outputs=20, kernel=5)
    wanted = OP.function(**arguments, backend="triton")
    laid = {name: [weight.transpose(0, 1).contiguous().transpose(0, 1), torch.stack((bias, bias), 1)[:, 0]]
            for name, (weight, bias) in arguments.items() if name != "x"}  # fmt: skip
    laid["depthwise"][0] = arguments["depthwise"][0].mT.contiguous().mT
    assert torch.equal(OP.function(**arguments | laid, backend="triton"), wanted)
    if mvkernels.can_run(OP.name, "cpp", **arguments)[0]:
        packed = mvkernels.pack_inverted_residual(*(arguments[name] for name in ("expand", "depthwise", "project")))
        assert torch.equal(OP.function(**arguments, packed=packed, backend="triton"), wanted)


@interpreter
def test_the_result_does_not_depend_on_the_batch():
    arguments = example(batch=3, size=(5, 7), hidden=33)
    whole = OP.function(**arguments, backend="triton")
    alone = [OP.function(**arguments | {"x": x[None]}, backend="triton") for x in arguments["x"]]
    assert torch.equal(torch.cat(alone), whole)


@interpreter
@pytest.mark.parametrize(("strides", "stride"), [("channels_last", 1), ("contiguous", 2)])
def test_the_operator_keeps_to_what_it_says(strides, stride):
    arguments = example(kind=strides)
    pairs = [part for name in ("expand", "depthwise", "project") for part in arguments[name]]
    torch.library.opcheck(
        torch.ops.mvkernels_triton.inverted_residual.default, (arguments["x"], *pairs, stride, 2, False)
    )


@interpreter
def test_reasons_against_it():
    arguments = example(kernel=9)
    with pytest.raises(mvkernels.BackendUnavailable, match="a depthwise kernel wider than 7"):
        OP.function(**arguments, backend="triton")
    arguments = example()
    for dtype, reason in ((torch.float64, "dtype float64: want float32"), (torch.bfloat16, "interpreter")):
        assert reason in mvkernels.can_run(OP.name, "triton", **in_dtype(arguments, dtype, "channels_last"))[1]
    arguments["project"][1].requires_grad_()
    with pytest.raises(mvkernels.BackendUnavailable, match="the Triton kernel has no backward"):
        OP.function(**arguments, backend="triton")
    with torch.no_grad():
        OP.function(**arguments, backend="triton")


def block(sizes: tuple[int, ...], side: int, batch: int, device: str = "sm_90", act: str = "hardswish") -> Any:
    """The description of a call in bfloat16."""
    inputs, hidden, outputs, kernel, stride = sizes
    x = (batch, inputs, side, side), (side * side * inputs, 1, side * inputs, inputs)
    return plan.BlockProblem(
        x[0], (("x", x[1]),), torch.bfloat16, "ieee", PRETENDED[device], hidden, outputs, kernel, stride, act, True,
        stride == 1 and inputs == outputs, (True, True, True),
    )  # fmt: skip


def test_grids_and_offsets_of_large_maps():
    (launch,) = plan.forward_launches(block((64, 256, 64, 3, 1), 512, 256))
    tiles = launch.ints[-3]
    assert tiles == 256 * 512**2 // (launch.meta["TY"] * launch.meta["TX"]) and not launch.meta["WIDE"]
    assert launch.grid == 132 and launch.meta["HALO_Y"] and launch.meta["HALO_X"]
    # Inside of a tile offsets are 32-bit, unless it alone spans more.
    large = block((64, 256, 64, 3, 1), 6000, 1)
    assert not plan.forward_launches(large)[0].meta["WIDE"]
    apart = replace(large, strides=(("x", (1 << 40, 1, 1 << 27, 64)),))
    assert plan.forward_launches(apart)[0].meta["WIDE"]


@pytest.mark.parametrize("device", PRETENDED)
@pytest.mark.parametrize("case", OP.suite("full"), ids=lambda case: f"{case.model} {case.label}")
def test_what_programs_store_of_expanded_maps_fits_the_second_level_cache(case, device):
    """Half of it, so that a read of what was stored a moment ago needs no memory."""
    arguments = case.make(batch=128, dtype=torch.bfloat16, device="meta", layout="channels_last")
    names = ("x", "expand", "depthwise", "project", "stride", "activation", "residual")
    problem = launcher.problem_of(*(arguments[name] for name in names))
    (launch,) = plan.forward_launches(replace(problem, device=PRETENDED[device]))
    assert 2 * launch.grid * launch.meta["SLOT"] <= prediction.PEAKS[PRETENDED[device].arch].cache / 2


def test_where_it_is_predicted_to_be_faster():
    """Maps that three kernels move and few channels: yes. Many channels of small maps, which stay in the cache: no."""
    for device in PRETENDED:
        assert launcher.faster(block((16, 64, 32, 3, 2), 128, 128, device))
        assert not launcher.faster(block((256, 1024, 256, 3, 1), 8, 128, device))
    assert not launcher.faster(
        replace(block((16, 64, 32, 3, 2), 128, 128), device=configs.Device("other", "gfx942", 304))
    )


def test_the_prediction_follows_its_terms():
    peaks = prediction.PEAKS["sm_90"]
    key = launcher.block_key(block((32, 128, 64, 3, 1), 64, 128))
    config = {"TY": 8, "TX": 16, "SX": 4, "BLOCK_M": 64, "BLOCK_H": 64, "BLOCK_O": 64, "CHUNK": 32, "PROGRAMS": 2}
    three, one = prediction.three_kernels(key, peaks), prediction.one_kernel(key, config, peaks)
    # By hand: 4096 * 128 pixels over 132 processors, hidden maps of 128 channels written and read; all is bytes.
    pixels = 4096 * 128 / 132
    moved = 2 * pixels * (32 + 128 + 128 + 128 + 128 + 64) / peaks.bytes
    assert three == pytest.approx(moved + 3 * prediction.LAUNCH)
    # Tiles of 10 * 18 pixels with their borders take three blocks of 64; instructions decide.
    tiles = 4096 * 128 / 128 / 132
    instructions = 192 / 128 * (4 + prediction.OTHERS) + 1.2 * 6 * 3 / 4 + 9 + 4 + prediction.OTHERS
    busy = math.ceil(tiles) * 128 * 128 * instructions / 128 / prediction.REACHED
    waiting = prediction.WAITING * math.ceil(tiles / 2) * 2 * (2 + 3)
    assert one == pytest.approx(prediction.BUSY * busy + waiting + prediction.LAUNCH)
    assert prediction.three_kernels(key | {"n": 1}, peaks) == pytest.approx(3 * prediction.LAUNCH, rel=0.01)
    assert not prediction.worthwhile(key | {"arch": "gfx942"}, config)


@interpreter
def test_a_call_that_names_no_backend_takes_what_is_faster(monkeypatch):
    arguments = example(hidden=33)
    monkeypatch.setitem(dispatch._PREFERENCE, "cpu", ("triton",))
    taken = []
    operator = torch.ops.mvkernels_triton.inverted_residual.default
    monkeypatch.setattr(OP.function.__globals__["operators"], "forward_triton",
                        lambda *given: taken.append("kernel") or operator(*given))  # fmt: skip
    key = configs.key_text(launcher.block_key(problem_of(arguments)))
    for fused in (0, 1):
        with configs.trying(OP.name, "block", key, {"FUSED": fused}):
            out = OP.function(**arguments)
            assert taken == ["kernel"] * fused
            torch.testing.assert_close(out, OP.reference(**arguments), rtol=1e-4, atol=1e-4)
            OP.function(**arguments, backend="triton")
            assert taken.pop() == "kernel"
            with mvkernels.use_backend("triton"):
                OP.function(**arguments)
            assert taken.pop() == "kernel"
            taken.clear()


@pytest.mark.parametrize("kind", testing.STRIDES)
def test_the_composed_form_is_right_and_lies_as_the_kernel_lets_it(kind):
    arguments = example(kind=kind)
    for more in ({"stride": 2}, {"residual": True, "activation": "relu6"}, {"activation": None}):
        assert OP.composed is not None
        out = OP.composed.function(**arguments, **more)
        wanted = OP.reference(**arguments, **more)
        assert out.stride() == wanted.stride()
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


@interpreter
@pytest.mark.parametrize("default", [0, 1])
@pytest.mark.parametrize("times", [(3.0, 2.0), (2.0, 3.0)], ids=["faster", "slower"])
def test_tuning_notes_what_is_not_as_predicted(default, times, monkeypatch):
    medians = dict(zip(("composed", "fused"), times))
    monkeypatch.setitem(configs._HEURISTICS, (OP.name, "block"), lambda key: {"FUSED": default})
    monkeypatch.setattr(
        tune.timing, "interleave", lambda calls, *a, **kw: {n: tune.timing.Times((medians[n],)) for n in calls}
    )
    findings = tune.tune_choice(OP, testing.normalised(OP, example(batch=1, size=(2, 2))), "cpu", set())
    faster = times[1] < times[0]
    assert [f.best for f in findings] == [{} if faster == bool(default) else {"FUSED": int(faster)}]
    assert findings[0].default_us == medians["fused" if default else "composed"] * 1e6
