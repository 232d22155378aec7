"""MobileViT's layer as one op: the reference against its definition, the Triton kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mvkernels
from mvkernels import testing, tune
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.patch_transformer_layer import suite
from mvkernels.ops.patch_transformer_layer.autograd import TENSORS
from mvkernels.triton import configs
from tests.ops import inference
from tests.ops.bridges import DEVICE, assert_ok, interpreter
from tests.ops.inference import SEEDS, STRIDES, everywhere, needs_cpp
from tests.ops.test_contract_all import example

OP = OPS["patch_transformer_layer"]
PHASES = (Phase.explicit, Phase.generate)  # to shrink a failure takes the interpreter minutes
DTYPES = (torch.float32, torch.float16) + (() if DEVICE == "cpu" else (torch.bfloat16,))
on_triton = interpreter if DEVICE == "cpu" else lambda test: test
CONFIGS = ("linear_rows", "norm_ffn", "ffn_backward", "norm_backward")


def arguments_of(
    heads: int = 2,
    head_dim: int = 6,
    hidden: int = 20,
    size: tuple[int, int] = (4, 6),
    patch: tuple[int, int] = (2, 2),
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    kind: str = "channels_last",
    bias: bool = True,
    seed: int = 0,
    device: str = DEVICE,
) -> dict[str, Any]:
    c, generator = heads * head_dim, torch.Generator().manual_seed(seed)
    arguments = suite._make({"channels": c, "height": 1, "width": 1, "patch": 2}, 1, dtype, seed=seed)
    arguments |= {
        "x": testing.make_map((batch, c, *size), kind, dtype, device, generator),
        "fc1_weight": (torch.randn(hidden, c, generator=generator) * c**-0.5).to(dtype),
        "fc1_bias": (torch.randn(hidden, generator=generator) * 0.1).to(dtype),
        "fc2_weight": (torch.randn(c, hidden, generator=generator) * hidden**-0.5).to(dtype),
        "heads": heads,
        "patch_size": patch,
    }
    arguments = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    return arguments if bias else arguments | {"qkv_bias": None}


def by_definition(a: dict[str, Any]) -> torch.Tensor:
    """Group by group and head by head, from lists of pixels."""
    x, heads = a["x"], a["heads"]
    c, dim, eps = x.shape[1], x.shape[1] // heads, a.get("eps", 1e-5)

    def norm(rows: torch.Tensor, which: str) -> torch.Tensor:
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt()
        return rows * a[f"{which}_weight"] + a[f"{which}_bias"]

    out = torch.empty_like(x)
    ph, pw = a["patch_size"]
    for gy in range(min(ph, x.shape[2])):
        for gx in range(min(pw, x.shape[3])):
            inside = (slice(None), slice(None), slice(gy, None, ph), slice(gx, None, pw))
            rows = x[inside].flatten(2).transpose(1, 2)
            packed = norm(rows, "norm1") @ a["qkv_weight"].T + (0 if a["qkv_bias"] is None else a["qkv_bias"])
            parts = []
            for head in range(heads):
                q, k, v = (packed[..., i * c + head * dim : i * c + (head + 1) * dim] for i in range(3))
                scale = dim**-0.5 if a.get("scale") is None else a["scale"]
                parts.append((q @ k.transpose(1, 2) * scale).softmax(-1) @ v)
            rows = rows + torch.cat(parts, -1) @ a["proj_weight"].T + a["proj_bias"]
            hidden = norm(rows, "norm2") @ a["fc1_weight"].T + a["fc1_bias"]
            rows = rows + (hidden * hidden.sigmoid()) @ a["fc2_weight"].T + a["fc2_bias"]
            out[inside] = rows.transpose(1, 2).reshape(out[inside].shape)
    return out


@pytest.mark.parametrize(
    "more", [{}, {"scale": 0.3, "eps": 0.1}, {"qkv_bias": None}], ids=["plain", "numbers", "no bias"]
)
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)], ids=str)
def test_the_reference_is_the_definition(size, more):
    arguments = arguments_of(size=size, dtype=torch.float64) | more
    torch.testing.assert_close(OP.reference(**arguments), by_definition(arguments), rtol=1e-12, atol=1e-12)


def assert_bad_values_stay_in_their_group(size: tuple[int, int], backend: str) -> None:
    arguments = arguments_of(size=size)
    clean = mvkernels.patch_transformer_layer(**arguments, backend=backend)
    for bad in (float("nan"), float("inf")):
        x = arguments["x"].clone()
        x[0, 1, -1, -1] = bad
        found = mvkernels.patch_transformer_layer(**arguments | {"x": x}, backend=backend)
        y, z = (size[0] - 1) % 2, (size[1] - 1) % 2
        assert found[0, :, y::2, z::2].isnan().all()
        rest = torch.ones(found.shape, dtype=torch.bool, device=DEVICE)
        rest[0, :, y::2, z::2] = False
        assert torch.equal(found[rest], clean[rest])


@pytest.mark.parametrize("peer", [*OP.peers, "composed"])
def test_peers_do_the_same(peer):
    arguments = arguments_of(dtype=torch.float64)
    assert OP.composed is not None
    call = OP.composed.function if peer == "composed" else OP.peers[peer]
    for more in ({}, {"scale": 0.3, "eps": 0.1}, {"qkv_bias": None}):
        torch.testing.assert_close(call(**arguments | more), OP.reference(**arguments | more), rtol=1e-10, atol=1e-10)


@st.composite
def layers(draw):
    """Arguments of a layer for the C++ kernels: C is often no whole vector, and no patch need divide the map."""
    heads, head_dim = draw(st.integers(1, 5)), draw(st.one_of(st.integers(1, 40), st.sampled_from([16, 36, 48, 60])))
    hidden = draw(st.one_of(st.integers(1, 170), st.just(2 * heads * head_dim)))
    patch = draw(st.sampled_from([(1, 1), (2, 2), (2, 2), (3, 2), (4, 4), (7, 20)]))
    sides, lie = st.integers(1, 17), draw(st.sampled_from(STRIDES))
    arguments = inference.patch_transformer_layer(
        draw(st.integers(1, 3)), (draw(sides), draw(sides)), heads, head_dim, hidden, patch, draw(st.booleans()),
        lie, draw(SEEDS),
    )  # fmt: skip
    if draw(st.booleans()):
        arguments |= {"scale": draw(st.sampled_from([0.3, -0.4, 3.0])), "eps": draw(st.sampled_from([1e-3, 0.1]))}
    kind = draw(st.sampled_from(["plain", "plain", "constant", "peaked", "far"]))
    if kind == "peaked":
        arguments["qkv_weight"][: 2 * heads * head_dim] *= 8
    elif lie == "expanded":  # all channels are equal as it is
        pass
    elif kind == "constant":
        arguments["x"][:, :, ::2] = draw(st.sampled_from([0.0, 3.0, 3.3, 12345.7]))
    elif kind == "far":
        arguments["x"].add_(draw(st.sampled_from([100, 12345.7])))
    return arguments


@pytest.mark.core
@everywhere
@settings(max_examples=200, deadline=None, derandomize=True)
@given(arguments=layers(), packs=st.booleans())
def test_cpp_on_any_shape_and_strides(instruction_set, arguments, packs):
    packed = {"packed": inference.pack(OP.name, arguments)} if packs else {}
    assert_ok(testing.check(OP, arguments | packed, "cpp"))


@everywhere
@settings(max_examples=30, deadline=None, derandomize=True)
@given(arguments=layers())
def test_cpp_is_the_same_on_threads_in_batches_and_packed(instruction_set, arguments):
    inference.assert_the_same_on_threads_in_batches_and_packed(OP, arguments)


@needs_cpp
@pytest.mark.parametrize("size", [(4, 4), (12, 13)])
def test_nan_and_inf_stay_in_their_group_on_cpp(size):
    assert_bad_values_stay_in_their_group(size, "cpp")


@needs_cpp
def test_what_cpp_does_not_take():
    arguments = inference.patch_transformer_layer(heads=1, head_dim=257)
    inference.assert_takes_the_reference(OP, arguments, "head_dim is 257, value_dim 257, want at most 256")
    able, reason = mvkernels.can_run(OP.name, "cpp", **arguments_of(device="meta"))
    assert not able and "run on CPU tensors" in reason


@needs_cpp
@pytest.mark.parametrize("recorded", [False, True])
def test_the_function_takes_no_kernel_without_a_backward(recorded):
    """Not even where no gradient is wanted: inside of it none is recorded, so the call cannot tell."""
    arguments = inference.patch_transformer_layer()
    arguments["x"].requires_grad_(recorded)
    packed = inference.pack(OP.name, arguments)
    given_ = (*OP.check(**arguments)[:-1], packed)
    out = mvkernels.PatchTransformerLayerFunction.apply(*given_)
    assert torch.equal(out, OP.reference(**arguments))
    if recorded:
        out.sum().backward()
        assert arguments["x"].grad.isfinite().all()
    with pytest.raises(mvkernels.BackendUnavailable, match="backend cpp cannot run this: its kernel has no backward"):
        mvkernels.PatchTransformerLayerFunction.apply(*given_, "cpp")


@on_triton
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([5, 8, 20, 36]),
    hidden=st.sampled_from([11, 16, 40]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    patch=st.sampled_from([(1, 1), (2, 2), (3, 2), (7, 20)]),
    batch=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(testing.STRIDES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(**problem):
    assert_ok(testing.check(OP, arguments_of(**problem), "triton"))


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "size"),
    [(4, 36, (2, 4)), (2, 40, (10, 8)), (1, 12, (9, 8))],
    ids=["144 channels, groups of 2", "80 channels, groups of 40", "12 channels, a group of 72"],
)
def test_groups_of_each_size(heads, head_dim, size, dtype):
    patch = (1, 1) if size == (9, 8) else (2, 1) if size == (10, 8) else (2, 2)
    assert_ok(testing.check(OP, arguments_of(heads, head_dim, 24, size, patch, 1, dtype), "triton"))


@on_triton
@pytest.mark.parametrize("channels", [12, 80])
def test_the_configurations_of_exact_products(channels, monkeypatch):
    """Rows in chunks, several programs to a block of rows."""
    changes = {"CHUNK": 16, "STEPS": 2, "BLOCK_N": 16, "BLOCK_F": 16, "ROWS": 8}
    for kernel in CONFIGS:
        usual = configs._HEURISTICS[OP.name, kernel]

        def changed(key, usual=usual):
            return (config := usual(key)) | {name: value for name, value in changes.items() if name in config}

        monkeypatch.setitem(configs._HEURISTICS, (OP.name, kernel), changed)
    configs.forget()
    try:
        assert_ok(testing.check(OP, arguments_of(4, channels // 4, 36, (3, 4)), "triton"))
    finally:
        monkeypatch.undo()
        configs.forget()


@on_triton
@pytest.mark.parametrize("size", [(4, 4), (12, 13)], ids=["packed", "rows"])
def test_nan_and_inf_stay_in_their_group(size):
    assert_bad_values_stay_in_their_group(size, "triton")


@on_triton
def test_rows_of_one_value_and_an_epsilon_of_0():
    """Their deviation is 0: what the reference makes of them, and nothing of it in the rows of a block outside."""
    arguments = arguments_of(size=(3, 3)) | {"eps": 0.0}
    assert_ok(testing.check(OP, arguments, "triton"))


@on_triton
@pytest.mark.parametrize(
    ("kind", "save", "bias"), [("channels_last", True, True), ("sliced", True, False), ("channels_last", False, True)]
)
def test_opcheck(kind, save, bias):
    namespace, settings_ = torch.ops.mvkernels_triton, (2, 2, 2, 1e-5, 0.4)
    given_ = arguments_of(kind=kind, bias=bias, size=(3, 2))
    tensors = list(given_.values())[:TENSORS]
    torch.library.opcheck(namespace.patch_transformer_layer_forward, (*tensors, *settings_, save))
    if save:
        out, *saved = namespace.patch_transformer_layer_forward(*tensors, *settings_, True)
        grad = testing.make_map(out.shape, kind, device=DEVICE)
        torch.library.opcheck(namespace.patch_transformer_layer_backward, (grad, *saved, *tensors, *settings_))


@on_triton
@pytest.mark.parametrize("asked", [("x",), ("fc2_weight",), ("norm1_weight", "qkv_bias")], ids=str)
def test_some_gradients_alone(asked):
    grads = []
    for backend in ("triton", "reference"):
        given_ = arguments_of()
        leaves = [given_[name].requires_grad_() for name in asked]
        out = mvkernels.patch_transformer_layer(**given_, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


BAD = {
    "heads": (ValueError, {"heads": 5}),
    "heads of 0": (ValueError, {"heads": 0}),
    "heads as text": (TypeError, {"heads": "2"}),
    "activation": (ValueError, {"activation": "relu"}),
    "patch_size": (ValueError, {"patch_size": 0}),
    "eps": (TypeError, {"eps": "small"}),
    "scale": (TypeError, {"scale": torch.ones(())}),
    "x": (ValueError, {"x": torch.randn(2, 12, 0, 4)}),
    "qkv_weight": (ValueError, {"qkv_weight": torch.randn(12, 12)}),
    "qkv_bias": (ValueError, {"qkv_bias": torch.randn(12)}),
    "fc2_weight": (ValueError, {"fc2_weight": torch.randn(20, 12)}),
    "fc1_weight": (ValueError, {"fc1_weight": torch.randn(0, 12)}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what):
    error, change = BAD[what]
    with pytest.raises(error, match=f"patch_transformer_layer: {what.split()[0]}") as caught:
        mvkernels.patch_transformer_layer(**arguments_of(device="cpu") | change)
    assert "\n" not in str(caught.value)


@on_triton
def test_what_triton_does_not_take():
    able, reason = mvkernels.can_run(OP.name, "triton", **arguments_of(heads=2, head_dim=129))
    assert not able and "258 channels" in reason
    able, reason = mvkernels.can_run(OP.name, "triton", **arguments_of(dtype=torch.float64))
    assert not able and "float64" in reason


@on_triton
@pytest.mark.parametrize("times", [(3.0, 2.0), (2.0, 3.0)], ids=["faster", "slower"])
def test_tuning_notes_where_the_layer_is_faster_fused(times, monkeypatch, tmp_path):
    arguments = arguments_of(size=(2, 2), batch=1)
    medians = dict(zip(("composed", "fused"), times))
    monkeypatch.setattr(
        tune.timing, "interleave", lambda calls, *a, **kw: {n: tune.timing.Times((medians[n],)) for n in calls}
    )
    done: set[tuple[str, str]] = set()
    findings = tune.tune_choice(OP, arguments, DEVICE, done)
    assert [f.best for f in findings] == [{"FUSED": 1} if times[1] < times[0] else {}] * 2
    assert all(f.refused == 0 for f in findings) and tune.tune_choice(OP, arguments, DEVICE, done) == []

    kernels = pytest.importorskip("mvkernels.ops.patch_transformer_layer.triton.plan")
    described = kernels.problem_of(arguments["x"], 20, 2, (2, 2))
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    tune.save(configs.file_of(described.device.name), OP.name, findings, described.device)
    configs.forget()
    try:
        for grad in (False, True):
            assert kernels.measured_faster(described, grad) == (times[1] < times[0])
    finally:
        monkeypatch.undo()
        configs.forget()


@needs_cpp  # the attention of the reference has a graph more: for maps that the patch divides
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_compiling_for_many_sizes_takes_no_minutes(recorded, dynamic):
    """Few operators in two graphs at most, whether or not the patch divides the map; no time is measured.

    They are those of the C++ kernels, or where a gradient is recorded of the composed layer."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph

    arguments = example("patch_transformer_layer")

    def layer(x):
        return mvkernels.patch_transformer_layer(**(arguments | {"x": x}))

    compiled = torch.compile(layer, backend=keep, fullgraph=True, dynamic=dynamic)
    for batch, size in ((2, (4, 6)), (3, (5, 7)), (6, (12, 9))):
        x = torch.randn(batch, arguments["x"].shape[1], *size, requires_grad=recorded)
        out, expected = compiled(x), layer(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert out.stride() == expected.stride() and out.requires_grad == recorded
    assert len(graphs) <= 2 and max(graphs) < 120, graphs
    torch._dynamo.reset()
