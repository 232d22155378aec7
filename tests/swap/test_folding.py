"""Batch norms folded into convolutions."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mvkernels
from mvkernels.swap.engine import unswap
from mvkernels.third_party import randomise


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def of_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10)
    randomise(model)
    return model.eval()


def of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32])
    model = transformers.MobileViTForImageClassification(config)
    randomise(model)
    return model.eval()


def run(model, x):
    out = model(x)
    return getattr(out, "logits", out)


@pytest.fixture
def small():
    """A caller of each kind of norm: plain, with activation, with dropout before, without a norm; a norm alone."""
    pytest.importorskip("timm")
    from timm.layers import BatchNormAct2d, ConvNormAct
    from timm.models import efficientformer, efficientvit_mit

    model = nn.Sequential(
        ConvNormAct(3, 8, 3, act_layer=nn.SiLU),
        ConvNormAct(8, 8, 1, bias=True, apply_act=False),
        efficientvit_mit.ConvNormAct(8, 8, 5, groups=8, dropout=0.5, act_layer=nn.Hardswish),
        efficientvit_mit.ConvNormAct(8, 8, 1, norm_layer=None),
        efficientformer.Downsample(8, 12),
        efficientformer.ConvMlpWithNorm(12, 24, drop=0.5),
        efficientformer.Pooling(),
        BatchNormAct2d(12, act_layer=nn.GELU),
        BatchNormAct2d(12, apply_act=False),
    )
    torch.manual_seed(0)
    randomise(model)
    return model.eval()


IMAGE = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientvit_b0", "efficientformer_l1", "transformers"])
def test_whole_models(name):
    model = of_transformers() if name == "transformers" else of_timm(name)
    x = torch.randn(1, 3, 224, 224)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        wanted = run(model, x)
        norms = []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda m, i, o: norms.append(m))
        run(model, x)
        before = len(norms)
        for module in model.modules():
            module._forward_hooks.clear()
        report = mvkernels.swap(model, fold_norms=True)
        assert report.count and report.folded > before / 3
        assert f"; norms folded in {report.folded} modules" in str(report)
        close(run(model, x), wanted)
        assert list(state) == list(model.state_dict())
        assert mvkernels.swap(model, fold_norms=True).folded == 0
        report.restore()
        assert not any("mvk" in name for m in model.modules() for name in m.__dict__)
        assert torch.equal(run(model, x), wanted)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_only_at_rest_and_without_gradients(small):
    original = copy.deepcopy(small)
    report = mvkernels.swap(small, fold_norms=True)
    assert report.folded == 7 and report.count == 0
    with torch.no_grad():
        out, wanted = small(IMAGE), original(IMAGE)
        close(out, wanted)
        assert not torch.equal(out, wanted)
    assert torch.equal(small(IMAGE), wanted)  # a gradient is recorded: as it was
    for model in (small, original):
        torch.manual_seed(2)
        model.train()(IMAGE).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(small.parameters(), original.parameters()))
    with torch.no_grad():
        close(small.eval()(IMAGE), original.eval()(IMAGE))  # with the statistics of the training step
    unswap(small)
    assert [type(m) for m in small.modules()] == [type(m) for m in original.modules()]


@torch.no_grad()
def test_edits_of_any_kind_are_seen(small):
    original = copy.deepcopy(small)
    mvkernels.swap(small, fold_norms=True)
    for change in (
        lambda m: m[0].conv.weight.data.mul_(2),
        lambda m: m[0].bn.running_var.add_(1),
        lambda m: setattr(m[1].bn, "eps", 0.5),
        lambda m: setattr(m[4], "norm", nn.BatchNorm2d(12, affine=False).eval()),
        lambda m: setattr(m[4], "norm", nn.Identity()),
        lambda m: setattr(m[4], "conv", nn.Sequential(m[4].conv, nn.ReLU())),
        lambda m: m[2].norm.train(),
        lambda m: setattr(m[6], "pool", nn.AvgPool2d(5, 1, 2)),
        lambda m: m[7].weight.data.add_(1),
        lambda m: m[7].train(),
        lambda m: setattr(m[7], "act", nn.Tanh()),
        lambda m: setattr(m[0].conv, "_conv_forward", lambda *of: 2 * nn.Conv2d._conv_forward(m[0].conv, *of)),
        lambda m: m.double(),
    ):
        for model in (small, original):
            change(model)
        x = IMAGE.to(next(small.parameters()).dtype)
        close(small(x), original(x))


@torch.no_grad()
def test_either_module_alone_is_what_it_was(small):
    original = copy.deepcopy(small)
    mvkernels.swap(small, fold_norms=True)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(small[0].conv(x), original[0].conv(x))
    assert torch.equal(small[0].bn(small[0].conv(x)), original[0].bn(original[0].conv(x)))


@torch.no_grad()
def test_who_listens_hears_the_same(small):
    heard = []
    original = copy.deepcopy(small)
    mvkernels.swap(small, fold_norms=True)
    for model in (small, original):
        model[0].conv.register_forward_hook(lambda m, i, o: heard.append(o))
        model[0].bn.register_forward_pre_hook(lambda m, i: heard.append(i[0]))
        model(IMAGE)
    assert len(heard) == 4 and torch.equal(heard[0], heard[2]) and torch.equal(heard[1], heard[3])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast_are_left_to_the_original(small, dtype):
    original = copy.deepcopy(small)
    mvkernels.swap(small, fold_norms=True)
    with torch.autocast("cpu", dtype):
        assert torch.equal(small(IMAGE), original(IMAGE))
    assert torch.equal(small.to(dtype)(IMAGE.to(dtype)), original.to(dtype)(IMAGE.to(dtype)))


@torch.no_grad()
def test_copies_pickles_compiles_and_exports(small):
    wanted = small(IMAGE)
    mvkernels.swap(small, fold_norms=True)
    copied = copy.deepcopy(small)
    small[0].conv.weight.zero_()
    close(copied(IMAGE), wanted)
    close(pickle.loads(pickle.dumps(copied))(IMAGE), wanted)
    close(torch.compile(copied, fullgraph=True, backend="aot_eager")(IMAGE), wanted)
    exported = torch.export.export(copied, (IMAGE,)).module()(IMAGE)
    assert torch.equal(exported, wanted)
    with torch.inference_mode():
        close(copied(IMAGE), wanted)
    close(torch.func.vmap(copied)(IMAGE[None])[0], wanted)
    close(torch.jit.trace(copied, IMAGE)(IMAGE), wanted)


@torch.no_grad()
def test_the_reference_and_other_layouts(small):
    original = copy.deepcopy(small)
    mvkernels.swap(small, fold_norms=True)
    for x in (IMAGE.contiguous(memory_format=torch.channels_last), IMAGE[..., ::2], IMAGE.expand(2, 3, 9, 7)):
        close(small(x), original(x))
    norm, pool, x = small[7], small[6], torch.randn(2, 12, 5, 12)
    for view in (x[..., ::2], x.transpose(1, 3), x[:1].expand(3, -1, -1, -1), x[:0]):
        close(pool(view), original[6](view)) if view.numel() else None
        close(norm(view), original[7](view)) if view.numel() else None
        assert norm(view).shape == view.shape
    with mvkernels.use_backend("reference"):
        assert torch.equal(norm(x), original[7](x)) and torch.equal(pool(x), original[6](x))
    assert not torch.equal(norm(x), original[7](x)) or mvkernels.dispatch.extension.module is None


@torch.no_grad()
def test_what_the_convolution_wrote_is_all_that_changes(small):
    mvkernels.swap(small, fold_norms=True)
    x, state = IMAGE.clone(), {name: t.clone() for name, t in small.state_dict().items()}
    small(x)
    small[7](small[6](x.new_ones(1, 12, 4, 4)))
    assert torch.equal(x, IMAGE) and all(torch.equal(t, state[name]) for name, t in small.state_dict().items())


@torch.no_grad()
def test_a_class_that_somebody_changes_later(small, monkeypatch):
    from timm.models.efficientformer import ConvMlpWithNorm

    original = copy.deepcopy(small)
    mvkernels.swap(small, fold_norms=True)
    monkeypatch.setattr(ConvMlpWithNorm, "forward", lambda self, x: x + 1)
    assert torch.equal(small[5](IMAGE.new_ones(1, 12, 4, 4)), original[5](IMAGE.new_ones(1, 12, 4, 4)))


@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientvit_b0"])
def test_what_a_later_swap_needs_is_left_alone(name):
    model = of_timm(name)
    assert mvkernels.swap(model, only=lambda name, module: False, fold_norms=True).folded
    report = mvkernels.swap(model)
    assert report.count and report.count == len(report.entries)


@torch.no_grad()
def test_norms_that_the_operator_refuses(small):
    original = copy.deepcopy(small)
    mvkernels.swap(small, fold_norms=True)

    def expand(norm):
        norm.weight = nn.Parameter(torch.full((1,), 2.0).expand(norm.num_features))

    def interleave(norm):
        norm.running_mean = torch.stack([norm.running_mean, norm.running_var], 1)[:, 0]

    for change in (expand, interleave):
        for model in (small, original):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    change(module)
        close(small(IMAGE), original(IMAGE))
    for name in ("weight", "running_mean"):
        for model in (small, original):
            setattr(model[0].bn, name, None if name == "weight" else model[0].bn.running_mean[:1])
    for model in (small, original):
        with pytest.raises(RuntimeError, match="should contain 8 elements"):
            model(IMAGE)


@torch.no_grad()
def test_on_the_meta_device(small):
    wanted = small(IMAGE)
    mvkernels.swap(small, fold_norms=True)
    out = small.to("meta")(IMAGE.to("meta"))
    assert out.is_meta and out.shape == wanted.shape and out.stride() == wanted.stride()


@torch.no_grad()
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("index", [0, 7])
def test_a_setting_left_on_the_meta_device_is_an_error(small, index, name):
    original = copy.deepcopy(small)
    mvkernels.swap(small, fold_norms=True)
    for model in (small, original):
        norm = getattr(model[index], "bn", model[index])
        value = getattr(norm, name)
        setattr(norm, name, nn.Parameter(value.to("meta")) if isinstance(value, nn.Parameter) else value.to("meta"))
        with pytest.raises(RuntimeError, match="meta"):
            model(IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dispatch", "function"])
def test_what_a_mode_keeps_stays_as_it_was(small, kind):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    kept = []

    def keep(func, args, kwargs):
        out = func(*args, **(kwargs or {}))
        if "conv" in str(func):
            kept.append((out, out.clone()))
        return out

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return keep(func, args, kwargs)

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return keep(func, args, kwargs)

    wanted = small(IMAGE)
    mvkernels.swap(small, fold_norms=True)
    with Dispatch() if kind == "dispatch" else Function():
        close(small(IMAGE), wanted)
    assert len(kept) >= 6
    # Where there is no norm, the activation in place is the model's own.
    assert [torch.equal(out, copied) for out, copied in kept] == [i != 3 for i in range(len(kept))]
