"""What every model promises: its published size, pictures of any size, two backends that agree, whole checkpoints."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mvkernels
import mvmodels
from mvkernels import third_party
from mvkernels.dispatch import backend as backend_module
from mvkernels.dispatch import extension
from mvkernels.testing import BACKWARD_FACTOR, FLOOR, FORWARD_FACTOR, Comparison, compare, max_error
from mvmodels import coatnet, efficientformer, layers

# The smallest of each family, the one whose tests run it, and a scaled-down size that its stages divide.
SMALLEST = {
    "mobilevit_xxs": 64,
    "mobilevit_xxs_deeplabv3": 64,
    "mobilevit_xxs_ssdlite": 96,
    "mobile_former_26m": 64,
    "poolformer_s12": 64,
    "efficientformer_l1": 64,
    "coatnet_0": 64,
}
# Networks of the same parts with few and narrow blocks, for what takes long: the tests of each family have the others.
TINY = {
    "coatnet_0": (coatnet.CoAtNet, coatnet.Size(8, (1, 1, 2, 1), (16, 16, 32, 64))),
    "efficientformer_l1": (efficientformer.EfficientFormer, efficientformer.Size((8, 16, 16, 24), (1, 1, 1, 3), 2)),
}
# Random weights magnify rounding errors, and not those of two computations in step: as in verify_swap.
WHOLE_MODEL = 4.0


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name: str, **settings) -> nn.Module:
    """Random weights that hide nothing."""
    settings = {"num_classes": 5, **settings}
    if name in TINY:
        kind, size = TINY[name]
        model = kind(size, **settings)
    else:
        model = mvmodels.create_model(name, **settings)
    third_party.randomise(model)
    return model


def tensors(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if t.requires_grad]


def run(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the picture and of all parameters."""
    x = x.clone().requires_grad_()
    outs = tensors(model(x))
    cotangents = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype) for o in outs]
    leaves = [x, *model.parameters()]
    grads = torch.autograd.grad(outs, leaves, cotangents, allow_unused=True)
    return [o.detach() for o in outs], [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads)]


@pytest.mark.skipif(extension.module is None, reason=extension.reason)
@pytest.mark.parametrize("name", [*SMALLEST, "efficientvit_b0"])
def test_flops_are_counted_whatever_the_backend(name):
    """Of the forward alone and with the backward; no attention is counted as nothing."""
    model, x = make(name).eval(), torch.randn(1, 3, SMALLEST.get(name, 64), SMALLEST.get(name, 64))
    counts = []
    for backend in ("cpp", "reference"):
        for recorded in (False, True):
            model.requires_grad_(recorded)
            with mvkernels.use_backend(backend), FlopCounterMode(display=False) as counter:
                outs = model(x)
                if recorded:
                    outs = tensors(outs)
                    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
            counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:] and 0 < counts[0] < counts[1]


@pytest.mark.parametrize("name", [n for n in mvmodels.list_models() if not n.startswith("mobile_former")])
def test_size_of_every_model(name):
    info = mvmodels.model_info(name)
    with torch.device("meta"):
        model = mvmodels.create_model(name, num_classes=info.num_classes)
        picture = torch.empty(1, 3, info.input_size, info.input_size)
    assert sum(p.numel() for p in model.parameters()) == info.params
    assert round(mvmodels.count_macs(model, picture) / 1e6, 1) == info.macs
    assert "arXiv" in info.paper
    if info.published_params:
        # Printed with a digit or two, and cut off rather than rounded in places.
        assert info.params / 1e6 == pytest.approx(float(info.published_params.rstrip("M")), rel=0.03, abs=0.06)


def comparisons(model: nn.Module, x: Tensor, dtype: torch.dtype, backend: str) -> list[Comparison]:
    """A row for each output and gradient: the backend's error against float64, beside the reference's."""
    exact = run(copy.deepcopy(model).double(), x.double())
    model = copy.deepcopy(model).to(dtype)
    with mvkernels.use_backend("reference"):
        baseline = run(model, x.to(dtype))
    with mvkernels.use_backend(backend):
        actual = run(model, x.to(dtype))
    rows = []
    for what, criterion, *tensors_of in zip(
        ("output", "gradient"), (FORWARD_FACTOR, BACKWARD_FACTOR), exact, baseline, actual
    ):
        factor = WHOLE_MODEL * criterion
        # Some gradients are zero but for the rounding of larger terms: the median says what is not luck.
        typical = size = 0.0
        if what == "gradient":
            typical = statistics.median(max_error(b, e) for e, b, _ in zip(*tensors_of))
            size = statistics.median(float(e.abs().max()) for e in tensors_of[0])
        for i, (e, b, a) in enumerate(zip(*tensors_of)):
            assert a.dtype == dtype and torch.isfinite(a).all()
            rounding = max(FLOOR, 4 * torch.finfo(dtype).eps)
            floor = rounding * max(float(e.abs().max()), size) + factor * typical
            rows.append(compare(f"{what} {i}", a, e, b, factor, floor))
    return rows


@pytest.mark.core
@pytest.mark.skipif(extension.module is None, reason=extension.reason)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
@pytest.mark.parametrize("name", [n for n in SMALLEST if not n.startswith("poolformer")])
def test_backends_agree(name, odd, dtype):
    """cpp's error against float64 is within the criterion of the reference's in the same dtype, gradients included."""
    size = (SMALLEST[name] - 7, SMALLEST[name] + 11) if odd else (SMALLEST[name], SMALLEST[name])
    rows = comparisons(make(name).eval(), torch.randn(1, 3, *size), dtype, "cpp")
    wrong = [row for row in rows if not row.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("name", TINY)
def test_a_wrong_kernel_is_seen(name, monkeypatch):
    """The comparison of the test above can fail."""
    original = layers.patch_attention

    def wrong(*maps, bias, scale, backend):
        off = 1.02 * scale if backend_module.requested(None) == "cpp" else scale
        return original(*maps, bias=bias, scale=off, backend="reference")

    model, x = make(name).eval(), torch.randn(1, 3, 64, 64)
    assert all(row.ok for row in comparisons(model, x, torch.float32, "reference"))
    monkeypatch.setattr(layers, "patch_attention", wrong)
    assert not all(row.ok for row in comparisons(model, x, torch.float32, "cpp"))


@pytest.mark.parametrize("name", SMALLEST)
def test_pictures_of_any_size(name):
    """One pixel, a line, sides that no stage divides: the maps are those of the published strides, rounded up."""
    model = make(name, features_only=True).eval()
    for size in ((1, 1), (5, 97), (63, 33)):
        if name.startswith("poolformer") and min(size) < 3:
            continue
        with torch.no_grad():
            maps = model(torch.randn(1, 3, *size))
        assert [m.shape[1] for m in maps] == [channels for channels, _ in model.stages]
        if not name.startswith("poolformer"):  # whose 7×7 stem pads less than it reads
            wanted = [tuple(-(-side // reduction) for side in size) for _, reduction in model.stages]
            assert [tuple(m.shape[2:]) for m in maps] == wanted


@pytest.mark.parametrize("name", SMALLEST)
def test_no_pictures(name):
    """A batch of none has empty answers, of the shapes of others, and gradients of zero."""
    model = make(name).eval()
    x = torch.empty(0, 3, 64, 64, requires_grad=True)
    outs = tensors(model(x))
    assert [o.shape for o in outs] == [(0, *o.shape[1:]) for o in tensors(model(torch.randn(1, 3, 64, 64)))]
    sum(o.sum() for o in outs).backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", SMALLEST)
def test_common_settings(name):
    model = make(name, in_chans=1, num_classes=3, drop_rate=0.25).eval()
    out = model(torch.randn(2, 1, 64, 64))
    out = out if isinstance(out, Tensor) else out[0]
    assert out.shape[0] == 2 and 3 in out.shape[1:]
    rates = {m.p for m in model.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))}
    assert 0.25 in rates
    for settings, match in (
        ({"num_classes": 0}, "num_classes is 0, want at least 1"),
        ({"in_chans": 0}, "in_chans is 0, want at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            mvmodels.create_model(name, **settings)
    with pytest.raises(TypeError, match="flavour"):
        mvmodels.create_model(name, flavour="sweet")
    for shape in ((1, 3, 64, 64), (1, 64, 64)):
        with pytest.raises(ValueError, match=r"x is \(1, .*want \(B, 1, H, W\)"):
            model(torch.randn(shape))


@pytest.mark.parametrize("name", SMALLEST)
def test_every_parameter_learns(name):
    model = make(name, num_classes=3)
    outs = tensors(model(torch.randn(4, 3, 64, 64)))
    sum((o * torch.randn_like(o)).sum() for o in outs).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent


@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientformer_l1", "coatnet_0"])
def test_backend_reaches_every_attention(name):
    model = mvmodels.create_model(name, backend="cuda")
    with pytest.raises(mvkernels.BackendUnavailable):
        model(torch.randn(2, 3, 32, 32))
    chosen = [m.backend for m in model.modules() if hasattr(m, "backend")]
    assert len(chosen) >= 1 and set(chosen) == {"cuda"}
    with pytest.raises(ValueError, match="backend"):
        mvmodels.create_model(name, backend="fastest")


@pytest.mark.parametrize("name", ["mobilevit_xxs_deeplabv3", *TINY])
def test_exports(name):
    model = make(name).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert not any(space.startswith("mvkernels") for space in namespaces), namespaces


def test_mobilevit_exports_for_all_sizes():
    model = make("mobilevit_xxs").eval()
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(1, 3, 96, 128),), dynamic_shapes={"x": sides})
        for height, width in ((96, 128), (224, 288), (250, 130), (320, 65)):
            x = torch.randn(1, 3, height, width)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_compiles(name):
    model = make(name).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALLEST)
def test_weights_of_another_model_leave_all_as_it_was(name):
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sources = [*model.weight_sources, "mvmodels"]
    for source in dict.fromkeys(sources):
        with pytest.raises(ValueError, match="the weights do not fit") as caught:
            mvmodels.load_weights(model, nn.Sequential(nn.Linear(3, 3)).state_dict(), source=source)
        lines = str(caught.value).splitlines()
        assert len(lines) > 10 and any("is missing" in line for line in lines) and "more" in lines[-1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", SMALLEST)
def test_own_weights_with_and_without_a_head(name):
    model, twin = make(name), make(name)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    mvmodels.load_weights(twin, model.state_dict(), source="mvmodels")
    x = torch.randn(1, 3, 64, 64)
    for out, other in zip(tensors(model.eval()(x)), tensors(twin.eval()(x))):
        assert torch.equal(out, other)
    features = make(name, features_only=True).eval()
    mvmodels.load_weights(features, model.state_dict(), source="mvmodels")
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in features.state_dict().items())


@pytest.mark.parametrize(
    "unknown, near", [("mobilevit_xxxs", "mobilevit_xxs"), ("coatnet5", "coatnet_"), ("poolformer_s48", "poolformer_")]
)
def test_an_unknown_name_lists_near_matches(unknown, near):
    with pytest.raises(ValueError, match=rf"unknown model '{unknown}', did you mean .*{near}") as caught:
        mvmodels.create_model(unknown)
    assert "\n" not in str(caught.value)


def test_list_models_finds_families():
    assert mvmodels.list_models("poolformer_*") == [f"poolformer_{s}" for s in ("s12", "s24", "s36", "m36", "m48")]
    assert mvmodels.list_models("coatnet_*") == [f"coatnet_{i}" for i in range(5)]
    assert len(mvmodels.list_models("mobilevit_*")) == 9


HEADS = ("mobilevit_xxs_deeplabv3", "mobilevit_xxs_ssdlite")  # with norms of a single pixel, which do not train


@pytest.mark.parametrize(
    "name, training",
    [(n, t) for n in (*SMALLEST, "efficientvit_b0") for t in (False, True) if not (t and n in HEADS)],
)
def test_vectorized_gradients(name, training):
    """Of one picture: PyTorch's batch norm minds how the gradients lie in memory that it is given."""
    model = make(name).double().train(training)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.BatchNorm1d):  # which has one value a channel here
            part.eval()
    side = SMALLEST.get(name, 64)
    x = torch.randn(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    out = torch.cat([t.flatten() for t in tensors(model(x))])
    out = out[:: max(1, out.numel() // 50)]
    cotangents = torch.randn(2, *out.shape, dtype=torch.float64)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    batched = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True)
    for i, cotangent in enumerate(cotangents):
        single = torch.autograd.grad(out, leaves, cotangent, retain_graph=True, allow_unused=True)
        for expected, actual in zip(single, batched):
            if expected is not None:
                assert float((actual[i] - expected).abs().max()) <= 1e-8 * float(expected.abs().max()) + 1e-12
