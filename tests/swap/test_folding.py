"""Batch norms folded into convolutions."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mvkernels
from mvkernels.swap.engine import unswap


def randomised(model, seed=0):
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def small():
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, stride=2), nn.BatchNorm2d(8, affine=False)),
            nn.Conv2d(8, 4, 1),
            nn.ReLU(),
            nn.BatchNorm2d(4),
        )
    )


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def timm_model(name):
    timm = pytest.importorskip("timm")
    return randomised(timm.create_model(name, num_classes=10))


@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientvit_b0", "coatnet_nano_rw_224", "efficientformer_l1"])
def test_whole_models(name):
    model = timm_model(name)
    x = torch.randn(1, 3, 224, 224)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(x)
        report = mvkernels.swap(model, fold_norms=True)
        norms = sum(type(m).__name__.startswith("BatchNorm") for m in model.modules())
        folded = sum(type(m).__name__.startswith("FoldedBatchNorm") for m in model.modules())
        assert folded == report.folded > 2 * norms / 3 - folded
        assert f"{folded} norms folded" in str(report) or not report.count
        close(model(x), wanted)
        assert list(state) == list(model.state_dict())
        report.restore()
        assert not any("mvk" in name for m in model.modules() for name in m.__dict__)
        assert torch.equal(model(x), wanted)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32])
    model = randomised(transformers.MobileViTModel(config))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x).last_hidden_state
        assert mvkernels.swap(model, fold_norms=True).folded
        close(model(x).last_hidden_state, wanted)


def test_only_what_follows_a_convolution_and_only_at_rest():
    model, x = small(), torch.randn(2, 3, 9, 7)
    original = copy.deepcopy(model)
    report = mvkernels.swap(model, fold_norms=True)
    assert report.folded == 2 and report.count == 0
    assert mvkernels.swap(model, fold_norms=True).folded == 0
    with torch.no_grad():
        close(model(x), original(x))
    assert torch.equal(model(x), original(x))  # a gradient is recorded: as it was
    for m in (model, original):
        m.train()(x).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), original.parameters()))
    model.eval(), original.eval()
    with torch.no_grad():
        close(model(x), original(x))  # with the statistics of the training step
    unswap(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


@torch.no_grad()
def test_folded_weights_follow_the_parameters():
    model, x = small(), torch.randn(2, 3, 9, 7)
    mvkernels.swap(model, fold_norms=True)
    model(x)
    other = small()
    for module in other.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) and module.bias is not None:
            module.bias.add_(1)
    model.load_state_dict(other.state_dict())
    close(model(x), other(x))
    model[0].weight.mul_(2), other[0].weight.mul_(2)
    close(model(x), other(x))
    model[1].running_var.add_(1), other[1].running_var.add_(1)
    close(model(x), other(x))
    close(model.double()(x.double()), other.double()(x.double()))


@torch.no_grad()
def test_copies_pickles_and_compiles():
    model, x = small(), torch.randn(2, 3, 9, 7)
    wanted = model(x)
    mvkernels.swap(model, fold_norms=True)
    model(x)
    copied = copy.deepcopy(model)
    assert copied[0].mvk_norm is copied[1] and copied[1].mvk_conv is copied[0]
    model[0].weight.zero_()
    close(copied(x), wanted)
    close(pickle.loads(pickle.dumps(copied))(x), wanted)
    close(torch.compile(copied, fullgraph=True, backend="aot_eager")(x), wanted)
    with torch.inference_mode():
        close(copied(x), wanted)


@torch.no_grad()
def test_who_listens_hears_the_same():
    model, x = small(), torch.randn(2, 3, 9, 7)
    heard = []
    handle = model[0].register_forward_hook(lambda m, i, o: heard.append(o))
    model(x)
    mvkernels.swap(model, fold_norms=True)
    assert type(model[0]) is nn.Conv2d  # there was a hook already
    handle.remove()
    mvkernels.swap(model, fold_norms=True)
    model[0].register_forward_hook(lambda m, i, o: heard.append(o))
    model(x)
    assert torch.equal(*heard)


def test_a_module_that_stands_twice_is_left_alone():
    conv = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.ReLU()).eval()
    assert mvkernels.swap(model, fold_norms=True).folded == 0
