"""EfficientViT of timm and of MIT, DC-AE and Sana: swapped against original."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
from torch import nn

import mvkernels
from mvkernels import third_party
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.report import original_of
from mvkernels.testing import BACKWARD_FACTOR, FORWARD_FACTOR, compare, rms_error

from . import linear_attention
from .conftest import compiles_for_all_sizes
from .linear_attention import FAMILIES, Family, mit_attention, run, spy


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(params=[name for name in FAMILIES if name != "sana"])
def multiscale(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def gradients(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], cotangent)
    return {"out": out.detach(), **dict(zip(["x", *parameters], grads))}


def test_the_whole_model(family, monkeypatch):
    model, inputs = family.model(), family.inputs()
    with torch.no_grad():
        expected = run(model, inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    types = [type(m) for m in model.modules()]
    processors = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    report = swap(model)
    assert {e.name for e in report.entries if e.swapped} == set(family.names)
    assert {e.module_class for e in report.entries if e.swapped} == {family.class_name}
    assert report.count == len(family.names)
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    seen = spy(family, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == len(family.names)
    second = swap(model)
    assert second.count == 0 and {e.reason for e in second.entries if e.swapped} == {"already swapped"}
    report.restore()
    assert [type(m) for m in model.modules()] == types
    assert {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")} == processors
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(run(model, inputs), expected)
    assert len(seen) == len(family.names)
    assert not any("mvk_backend" in m.__dict__ for m in model.modules())


def test_verify_swap(family):
    result = verify_swap(family.model(), family.inputs())
    assert result.ok, str(result)
    assert result.swapped == len(family.names)
    assert all(any(row.name.startswith(f"{name}: d parameter") for row in result.rows) for name in family.names)


def test_a_wrong_kernel_is_found(family, monkeypatch):
    model = family.model()
    swap(model)
    adapter = importlib.import_module(f"mvkernels.swap.{family.fused[0]}")
    original = getattr(adapter, family.fused[1])

    def wrong(*args, **kwargs):
        out = original(*args, **kwargs)
        return out + 0.01 * out.flip(-1)  # a factor would go unnoticed before DC-AE's norm

    monkeypatch.setattr(adapter, family.fused[1], wrong)
    assert not verify_swap(model, family.inputs()).ok


@pytest.mark.core
@pytest.mark.parametrize("scales", [(), (5,), (3, 7)], ids=str)
@pytest.mark.parametrize("size", [(5, 7), (1, 8), (1, 9), (2, 3), (1, 1)], ids=str)
def test_values_and_gradients(multiscale, scales, size):
    """On maps of more, as many and fewer pixels than a head has channels: the quadratic form is on the latter."""
    module = multiscale.attention(scales=scales)
    x = multiscale.example(*size)
    expected, before = gradients(module, x), x.clone()
    assert swap(module).count == 1
    actual = gradients(module, x)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=1e-4,
            atol=1e-4 * max(1.0, float(value.abs().max())),
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [(5, 7), (2, 3)], ids=str)
def test_exactly_in_float64(size):
    """Only MIT's code computes in float64 what is float64; the others' attention is float32 whatever comes."""
    module = mit_attention(scales=(3, 5)).double()
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    expected = gradients(module, x)
    assert swap(module).count == 1
    for name, value in gradients(module, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_layouts(multiscale, channels_last):
    module = multiscale.attention()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = module.to(memory_format=layout)
    whole = multiscale.example(6, 10).contiguous(memory_format=layout)
    sliced = torch.randn(2, 32, 9, 17)[:, ::2, 1:, 1::2]
    for x in (whole, sliced):
        expected = module(x)
        report = swap(module)
        out = module(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        report.restore()
    swap(module)
    if channels_last:
        assert module(whole).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(9, 8), (2, 3)], ids=["linear", "quadratic"])
def test_bfloat16_is_at_least_as_near_to_float32(family, size):
    """Pooled over draws. What both compute alike (the projections) hides part of the difference."""
    errors: list[list[float]] = [[], []]
    for seed in range(6):
        torch.manual_seed(seed)
        module = family.attention()
        third_party.randomise(module, seed)
        module.bfloat16()
        x = family.example(*size, dtype=torch.bfloat16)
        exact = copy.deepcopy(module).float()(x.float())
        baseline = module(x)
        assert swap(module).count == 1
        actual = module(x)
        assert actual.dtype == baseline.dtype == torch.bfloat16
        for out, found in zip((baseline, actual), errors):
            found.append(rms_error(out, exact) / float(exact.square().mean().sqrt()))
    baseline_error, error = (sum(e * e for e in found) ** 0.5 for found in errors)
    assert error <= 1.05 * baseline_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision(family, dtype):
    module = family.attention().to(dtype)
    x = family.example(7, 9, dtype=dtype)
    exact = gradients(copy.deepcopy(module).float(), x.float())
    baseline = gradients(module, x)
    swap(module)
    errors = {name: [0.0, 0.0] for name in ("out", "gradients")}
    for name, value in gradients(module, x).items():
        size = float(exact[name].square().mean().sqrt()) + 1e-6
        for i, found in enumerate((baseline[name], value)):
            errors["out" if name == "out" else "gradients"][i] += (rms_error(found, exact[name]) / size) ** 2
    for name, (before, after) in errors.items():
        factor = FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR
        assert after**0.5 <= factor * before**0.5, name


@pytest.mark.parametrize("magnitude", [1.0, 60.0])
def test_float16_stays_finite(family, magnitude):
    """The sums pass what float16 holds; and 1e-15, its smallest numbers."""
    module = family.attention().half()
    x = magnitude * family.example(24, 24, batch=1, dtype=torch.float16)
    x[..., :2, :] = 0
    exact = copy.deepcopy(module).float()(x.float())
    baseline = module(x)
    swap(module)
    row = compare("out", module(x), exact, baseline)
    assert module(x).isfinite().all() and row.ok, str(row)


def test_zero_queries(multiscale):
    """All of q (and k) below zero: exactly zero, not NaN, in both forms."""
    module = multiscale.attention(scales=())
    projections = [module.qkv.conv] if hasattr(module, "qkv") else [module.to_q, module.to_k, module.to_v]
    for projection in projections:
        projection.weight.data.copy_(-projection.weight.data.abs())
    swap(module)
    seen = []
    module.get_submodule("proj.conv" if hasattr(module, "proj") else "to_out").register_forward_pre_hook(
        lambda m, given: seen.append(given[0])
    )
    for size in ((5, 7), (1, 3)):
        x = multiscale.example(*size).abs()
        torch.testing.assert_close(module(x), original_of(module).forward(module, x))
    assert seen and not any(s.count_nonzero() for s in seen)


@pytest.mark.parametrize("eps", [1e-5, 1e-15, 1e-2])
def test_eps_is_the_modules(multiscale, eps):
    """With activations of a thousandth the normalizer is as small as timm's 1e-5."""
    module = multiscale.attention(eps=eps)
    for name, parameter in module.named_parameters():
        if name.startswith(("qkv.", "to_q.", "to_k.", "to_v.")):
            parameter.data *= 1e-3
        elif name.startswith(("proj.conv.", "to_out.")):
            parameter.data *= 1e3
    x = multiscale.example(5, 7)
    expected = module(x)
    swap(module)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    module.eps = 10 * eps + 1e-3
    changed = original_of(module).forward(module, x)
    torch.testing.assert_close(module(x), changed, rtol=1e-4, atol=1e-5)
    assert float((changed - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_batch_statistics(training):
    """The last norm is called, not folded."""
    for family in (FAMILIES["timm"], FAMILIES["mit"]):
        module = family.attention().train(training)
        twin = copy.deepcopy(module)
        assert swap(module).count == 1
        x = family.example(6, 5, batch=3)
        torch.testing.assert_close(module(x), twin(x), rtol=1e-4, atol=1e-4)
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_copy_and_pickle(family):
    model, inputs = family.model(), family.inputs()
    swap(model, backend="reference")
    with torch.no_grad():
        expected = run(model, inputs)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
        for other in copies:
            assert swap(other).count == 0
            assert torch.equal(run(other, inputs), expected)
            assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
            for p in other.parameters():
                p.zero_()
            assert torch.equal(run(model, inputs), expected)


def test_load_state_dict_and_moves(family):
    module = family.attention()
    swap(module)
    other = family.attention()
    third_party.randomise(other, seed=3)
    module.load_state_dict(other.state_dict())
    x = family.example(5, 7)
    torch.testing.assert_close(module(x), other(x), rtol=1e-4, atol=1e-4)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert module.double()(x.double()).dtype == torch.float64


def test_backend_and_only(family):
    model = family.model()
    report = swap(model, only=family.names[0], backend="cuda")
    assert report.count == 1
    with pytest.raises(mvkernels.BackendUnavailable):
        run(model, family.inputs())
    report.restore()
    with torch.no_grad():
        run(model, family.inputs())
    assert verify_swap(model, family.inputs(), backend="reference").ok


def test_autocast(family):
    module = family.attention()
    x = family.example(7, 9)
    exact = copy.deepcopy(module)(x)
    with torch.autocast("cpu", torch.bfloat16):
        baseline = module(x)
        swap(module)
        actual = module(x)
    actual.float().square().mean().backward()
    assert actual.dtype == baseline.dtype
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())
    assert rms_error(actual, exact) <= 1.1 * rms_error(baseline, exact)


def test_compiles_and_exports(family):
    module = family.attention()
    x = family.example(5, 7)
    expected = module(x)
    swap(module)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    sizes = ((5, 7, 2), (6, 9, 3), (10, 4, 5))
    compiles_for_all_sizes(module.double(), [family.example(*s, batch=b, dtype=torch.float64) for *s, b in sizes])
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("mvkernels") for name in namespaces), namespaces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_photograph_through_dc_ae(dtype):
    """A real picture, coded and decoded with random weights: the same, but for rounding."""
    pytest.importorskip("sklearn")
    model = linear_attention.dc_ae_model().to(dtype)
    picture, source = third_party.picture(None, 128)
    assert "photograph" in source
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(picture).sample
        expected = model(picture.to(dtype)).sample
        assert swap(model).count == 4
        actual = model(picture.to(dtype)).sample
    assert actual.shape == picture.shape and actual.dtype == dtype
    assert float(exact.std()) > 0.1  # an answer to compare
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    else:
        assert rms_error(actual, exact) <= 1.1 * rms_error(expected, exact)


def test_microsofts_efficientvit_is_another():
    timm = pytest.importorskip("timm")
    model = timm.create_model("efficientvit_m0").eval()
    types = [type(m) for m in model.modules()]
    report = swap(model)
    assert report.count == 0 and not any(e.swapped for e in report.entries)
    assert [type(m) for m in model.modules()] == types


def test_this_librarys_own_is_not_a_third_partys():
    assert swap(mvkernels.nn.EfficientViTBlock(32, head_dim=8)).entries == []
