"""When the modules of a transformer layer run as one op: with what, and with what not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from mvkernels.nn import PatchTransformer, fused_layer, fused_layers, patch_transformer_layer
from mvkernels.swap import swap
from tests.ops.bridges import DEVICE, INTERPRETER, interpreter
from tests.ops.inference import needs_cpp
from tests.swap.conftest import randomise, timm_block, transformers_block

on_triton = interpreter if DEVICE == "cpu" else lambda test: test


@pytest.fixture
def taken(monkeypatch):
    """Grows by one whenever the fused op is called."""
    seen: list[str] = []
    original = fused_layer.patch_transformer_layer

    def spy(*args, **kwargs):
        seen.append(kwargs["backend"])
        return original(*args, **kwargs)

    monkeypatch.setattr(fused_layer, "patch_transformer_layer", spy)
    return seen


def stack(**more):
    torch.manual_seed(0)
    return randomise(PatchTransformer(12, depth=2, heads=2, **{"backend": "triton", **more})).to(DEVICE)


def picture(size=(4, 6)):
    return torch.randn(2, 12, *size, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))


@on_triton
@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=str)
def test_the_same_values_and_gradients(taken, size):
    model, x = stack(), picture(size).requires_grad_()
    leaves = [x, *model.parameters()]
    plain = model(x)
    wanted = torch.autograd.grad(plain.square().sum(), leaves)
    assert not taken
    with fused_layers():
        out = model(x)
    assert taken == ["triton"] * 2
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), wanted):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@on_triton
@pytest.mark.parametrize("family", ["timm", "transformers"])
def test_a_swapped_block(taken, family):
    if family == "timm":
        layer = pytest.importorskip("timm.models.byobnet").LayerFn(act=nn.SiLU)
        block = timm_block(layers=layer)
    else:
        block = transformers_block()
    block.eval().to(DEVICE)
    swap(block, backend="triton")
    x = picture((8, 8))
    with torch.no_grad():
        plain = block(x)
        with fused_layers():
            torch.testing.assert_close(block(x), plain, rtol=1e-4, atol=1e-4)
    assert taken == ["triton"] * 2


def hook(model):
    model.layers[0].fc1.register_forward_hook(lambda *a: None)


def bias_gone(model):
    model.layers[0].proj.bias = None


def another_forward(model):
    model.layers[0].norm2.forward = lambda x: x


class Mine(nn.Linear):
    pass


NOT = {
    "hook": hook,
    "no bias": bias_gone,
    "forward replaced": another_forward,
    "subclass": lambda m: setattr(m.layers[0], "fc2", Mine(24, 12)),
    "epsilons": lambda m: setattr(m.layers[0].norm1, "eps", 0.5),
    "activation": lambda m: setattr(m.layers[0], "activation", nn.GELU()),
    "active dropout": lambda m: setattr(m.layers[0].dropout, "p", 0.5),
}


@on_triton
@pytest.mark.parametrize("change", NOT)
def test_what_is_not_plain_stays_composed(taken, change):
    model = stack().train()
    NOT[change](model)
    model.to(DEVICE)
    with torch.no_grad(), fused_layers():
        model(picture())
    assert len(taken) == 1  # the other layer is as it was


@on_triton
def test_dropout_that_is_idle_is_none(taken):
    model = stack(dropout=0.5).eval()
    with torch.no_grad(), fused_layers():
        model(picture())
    assert len(taken) == 2


@on_triton
def test_where_it_is_not_asked_for_or_cannot_run(taken):
    model, x = stack(), picture()
    with torch.no_grad():
        with fused_layers(), fused_layers(False):
            model(x)
        with fused_layers(), torch.autocast(DEVICE, dtype=torch.float16):
            model(x)
        with fused_layers():
            model.double()
            with pytest.raises(RuntimeError, match="patch_attention: backend triton cannot run this"):
                model(x.double())  # what the composed layer has to say
            stack(backend="reference")(x)
            handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
            try:
                stack()(x)
            finally:
                handle.remove()
    assert not taken


@on_triton
def test_three_projections_are_joined(taken):
    model, x = stack(), picture().permute(0, 2, 3, 1).contiguous()
    layer = model.layers[0]
    parts = []
    for weight, bias in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)):
        parts.append(nn.Linear(12, 12).to(DEVICE))
        parts[-1].load_state_dict({"weight": weight, "bias": bias})
    names = ("norm1", "proj", "norm2", "fc1", "activation", "fc2")
    modules = {name: getattr(layer, name) for name in names} | {"heads": 2, "backend": "triton"}
    with torch.no_grad(), fused_layers():
        one, three = (patch_transformer_layer(x, qkv=qkv, **modules) for qkv in (layer.qkv, tuple(parts)))
    assert len(taken) == 2
    torch.testing.assert_close(one, three)


def elsewhere(monkeypatch, backend):
    """A layer on rows that are asked for as those on a device that is no CPU."""
    model, x = stack(), picture()
    arguments = (*(getattr(model.layers[0], n) for n in ("norm1", "qkv", "proj", "norm2", "fc1", "activation", "fc2")),)

    class Elsewhere(torch.Tensor):
        is_cpu = False

    monkeypatch.setattr(fused_layer, "_DENSE", (*fused_layer._DENSE, Elsewhere))
    rows = x.permute(0, 2, 3, 1).contiguous()
    if DEVICE == "cpu":
        rows = rows.as_subclass(Elsewhere)
    with torch.no_grad():
        return fused_layer.fused_layer(rows, *arguments, 2, (2, 2), None, (), backend)


@on_triton
@pytest.mark.parametrize("fused", [0, 1])
def test_what_was_measured_decides(taken, fused, monkeypatch):
    """As a device that is no CPU is asked; the CPU itself never is."""
    monkeypatch.setattr(
        "mvkernels.ops.patch_transformer_layer.triton.plan.measured_faster", lambda problem, grad: bool(fused)
    )
    out = elsewhere(monkeypatch, "triton")
    assert (out is not None) == bool(fused) and len(taken) == fused


@on_triton
def test_on_a_gpu_the_op_chooses_between_triton_and_cuda(taken, monkeypatch):
    with fused_layers():
        assert elsewhere(monkeypatch, None) is not None
    assert taken == ["auto"]


def test_a_cpu_is_as_it_was(taken, monkeypatch):
    """Not even asked: one look at a thread's setting and at the device is all that a call pays."""

    def never(*_, **__):
        raise AssertionError("asked")

    model = stack(backend=None).cpu()
    if DEVICE == "cpu":
        monkeypatch.setattr("mvkernels.nn.patch_transformer.fused_layer", never)
        model(picture())
    assert not taken


@needs_cpp
@pytest.mark.parametrize("backend", [None, "cpp"])
def test_on_a_cpu_where_it_is_asked_for_and_no_gradient_is_recorded(taken, backend):
    model, x = stack(backend=backend).cpu(), picture((5, 7)).cpu()
    plain = model(x)
    with fused_layers():
        assert torch.equal(model(x), plain) and not taken  # a gradient is recorded
        with torch.no_grad():
            found = model(x)
            assert taken == ["cpp"] * 2
            stack(backend="reference").cpu()(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(x)
            model.double()(x.double())
    assert len(taken) == 2
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@needs_cpp
def test_a_swapped_block_on_a_cpu(taken):
    block, x = transformers_block().eval(), picture((8, 8)).cpu()
    swap(block)
    with torch.no_grad():
        plain = block(x)
        with fused_layers():
            torch.testing.assert_close(block(x), plain, rtol=1e-4, atol=1e-4)
    assert taken == ["cpp"] * 2


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=INTERPRETER if DEVICE == "cpu" else ()),
                                     pytest.param("cpp", marks=needs_cpp)])  # fmt: skip
@pytest.mark.parametrize("asked", [None, True, False])
def test_inside_a_compiled_model_only_where_it_is_asked_for(taken, backend, asked):
    device = "cpu" if backend == "cpp" else DEVICE
    model, x = stack(backend=backend).to(device), picture().to(device)

    def run(x):
        if asked is None:
            return model(x)
        with fused_layers(asked):
            return model(x)

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(run, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert bool(taken) == bool(asked)


def test_an_export_is_of_plain_ops():
    model, x = stack(backend=None).eval().cpu(), picture().cpu()
    with fused_layers():
        exported = torch.export.export(model, (x,))
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]


def test_the_op_and_the_modules_agree():
    """The op's reference against the modules, whose formula is written elsewhere."""
    model, x = stack(backend="reference").double().cpu(), picture().double().cpu()
    layer = model.layers[0]
    rows = x.permute(0, 2, 3, 1).contiguous()
    parts = [getattr(layer, name) for name in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")]
    parameters = [p for part in parts for p in (part.weight, part.bias)]
    out = OPS["patch_transformer_layer"].function(x, *parameters, 2, backend="reference")
    assert testing.max_error(out.permute(0, 2, 3, 1), layer(rows)) < 1e-12
