"""swap(model, inference=True) on the models of mvmodels and the modules of mvkernels.nn."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import mvmodels
from mvkernels.dispatch import extension
from mvkernels.nn import ConvNormAct, LiteMLA, MBConv, PatchTransformer, Residual
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.engine import unswap
from mvkernels.swap.packing import plans
from mvmodels import coatnet, efficientformer, efficientvit, layers, mobilevit, poolformer, vit
from tests.swap.conftest import randomise

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)

WIDTHS = (16, 32, 32, 64)
MAKE = {
    "mobilevit": lambda: mobilevit.MobileViT(mobilevit.Size((16, 16, 24, 24, 32), (32, 32, 48), 2, 64), 10),
    "efficientvit": lambda: mvmodels.create_model("efficientvit_b0", 10),
    "efficientvit, large": lambda: efficientvit.EfficientViT(
        efficientvit.Size((8, 16, 16, 16, 32), (1, 1, 1, 1, 1), (32, 48), 16, True), 10
    ),
    "efficientvit, no depthwise": lambda: mvmodels.create_model("efficientvit_b0", 10, dw_in_ffn=False),
    "efficientformer": lambda: efficientformer.EfficientFormer(
        efficientformer.Size(WIDTHS, (1, 1, 1, 2), 1), 10, image_size=64, distilled=False
    ),
    "coatnet": lambda: coatnet.CoAtNet(coatnet.Size(16, (1, 1, 2, 2), WIDTHS), 10, image_size=64),
    "poolformer": lambda: poolformer.PoolFormer(poolformer.Size((1, 1, 1, 1), WIDTHS, 0.1), 10),
    "vit, convolutions": lambda: vit.VisionTransformer(vit.Size(48, 2, 3, 2, (8, 16, 24, 32)), True, 10, image_size=64),
    "vit, patches": lambda: vit.VisionTransformer(vit.Size(48, 2, 3, 2, ()), False, 10, image_size=64),
}
ATTENTION = {
    "mobilevit": "patch_attention",
    "efficientvit": "multiscale_linear_attention",
    "efficientformer": "patch_attention",
    "coatnet": "patch_attention",
    "vit, patches": "patch_attention",
}
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(MAKE[name]()).eval()


@pytest.fixture(params=MAKE)
def model(request):
    return make(request.param)


def logits(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def plain(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    unswap(other)
    return other


def test_as_exact_as_the_original_and_restored(model):
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    before = logits(model)
    report = swap(model, inference=True)
    found = logits(model)
    assert report.packed_bytes > 0 and not torch.equal(found, before)
    result = verify_swap(model, X)
    assert result.ok, str(result)
    assert any(row.name.startswith("inference: output") for row in result.rows)
    assert list(model.state_dict()) == names
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert plans.size(other) == 0 and torch.equal(logits(other), found) and plans.size(other) > 0
    report.restore()
    assert [type(module) for module in model.modules()] == kinds
    assert plans.size(model) == 0 and torch.equal(logits(model), before)


@pytest.mark.parametrize("size", [(60, 96), (72, 40)])
def test_other_sizes(model, size):
    """Of which a patch does not divide the maps, and position biases are resized."""
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    wanted = logits(model, x)
    swap(model, inference=True)
    near(logits(model, x), wanted)


def test_changes_of_weights_and_statistics_are_followed(model):
    swap(model, inference=True)
    before = logits(model)
    with torch.no_grad():
        for p in model.parameters():
            p.lerp_(torch.ones_like(p), 0.02)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.mul_(1.3)
    found = logits(model)
    near(found, logits(plain(model)))
    assert not torch.allclose(found, before, rtol=1e-3)
    with mock.patch.object(plans, "note", side_effect=AssertionError):
        assert torch.equal(logits(model), found)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Of maps, not of a bias or of the tokens that a classifier takes.
        if len(args) and isinstance(args[0], torch.Tensor) and (args[0].dim() != 4 or args[0].numel() > 1000):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_runs_fused_and_no_product_is_left(name):
    model = make(name)
    swap(model, inference=True)
    logits(model)
    with Operators() as operators:
        logits(model)
    assert any(ATTENTION[name] in op for op in operators.seen)
    # CoAtNet's gates are products of one row a picture.
    products = ("softmax", "aten.mm", "aten.bmm") if name == "coatnet" else ("softmax", "addmm", "aten.mm", "aten.bmm")
    assert not [op for op in operators.seen if any(product in op for product in products)]


@pytest.mark.parametrize("name", ["mobilevit", "efficientvit", "efficientvit, no depthwise", "poolformer"])
def test_maps_flow_channels_last_without_copies(name):
    model = make(name)
    swap(model, inference=True)
    x = X.contiguous(memory_format=torch.channels_last)
    logits(model, x)
    with Operators() as operators:
        logits(model, x)
    copies = [op for op in operators.seen if "clone" in op or "copy" in op or "aten.cat" in op]
    assert not copies


def test_a_gradient_training_autocast_other_types_and_exports_take_the_originals(model):
    original = copy.deepcopy(model)
    swap(model, inference=True)

    def autocast(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(X)

    with mock.patch.object(plans, "Plan", side_effect=AssertionError):
        assert torch.equal(model(X), original(X))
        assert torch.equal(autocast(model), autocast(original))
        with torch.no_grad():
            exported = torch.export.export(model, (X,))
        assert not [n for n in exported.graph.nodes if "packed" in str(n.target)]
        model.double(), original.double()
        near(logits(model, X.double()), logits(original, X.double()))
    # In training without a gradient a Linear may run on packed weights, a norm with its statistics may not.
    model.float().train(), original.float().train()
    near(logits(model), logits(original))
    for p, q in zip(model.buffers(), original.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


DROPS = {
    "mobilevit": lambda: mvmodels.create_model("mobilevit_xxs", 10, dropout=0.5).backbone.stages_of_blocks[2][1],
    "PatchTransformer": lambda: PatchTransformer(48, 1, 2, dropout=0.5),
    "Mlp": lambda: layers.Mlp(64, 2, 0.5),
    "ConvMlp": lambda: efficientformer.ConvMlp(48, 0.5),
    "MB4D": lambda: efficientformer.MB4D(48, 0.0, 0.5),
    "MB3D": lambda: efficientformer.MB3D(64, 48, 0.0, 0.5, None),
    "PoolFormerBlock": lambda: poolformer.PoolFormerBlock(48, 1.0, 0.0, 0.5),
    "TransformerBlock": lambda: coatnet.TransformerBlock(64, 64, 1, (48, 64), 0.5, 0.0, "avg", None),
}


@pytest.mark.parametrize("name", DROPS)
def test_what_drops_in_training_drops_without_a_gradient_too(name):
    module = randomise(DROPS[name]()).train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    swap(module, inference=True)
    x = torch.randn(4, 48, 8, 64)
    assert not torch.equal(logits(module, x), logits(module, x))
    module.eval()
    assert torch.equal(logits(module, x), logits(module, x))
    assert plans.size(module) > 0


def called(model):
    """The names of the layers of PyTorch that a call runs as modules; each has a hook meanwhile."""
    names, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.GELU, nn.SiLU, nn.Hardswish, nn.Dropout, nn.LayerNorm)):
            handles.append(module.register_forward_hook(lambda *_, name=name: names.append(name)))
    out = logits(model)
    for handle in handles:
        handle.remove()
    return names, out


def test_hooks_are_called_and_parametrizations_followed(model):
    swap(model, inference=True)
    before = logits(model)
    names, out = called(model)
    assert names == called(plain(model))[0]
    near(out, before)
    assert torch.equal(logits(model), before)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
            with torch.no_grad():
                module.parametrizations.weight.original0.mul_(1.1)
    wanted = logits(plain(model))
    near(logits(model), wanted)
    assert not torch.allclose(wanted, before, rtol=1e-3)


def targets(model):
    seen = []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=note, fullgraph=True)
    logits(compiled)
    return seen, compiled


@pytest.mark.parametrize("name", ["mobilevit", "efficientvit", "efficientformer", "poolformer"])
def test_compiled_the_graph_calls_what_an_eager_call_does(name):
    model = make(name)
    swap(model, inference=True)
    seen, compiled = targets(model)
    assert len([t for t in seen if "packed" in t]) > 3
    near(logits(compiled), logits(model))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    near(logits(compiled), logits(plain(model)))


ALONE = {
    "ConvNormAct": (lambda: ConvNormAct(3, 8, 3, 2, act=nn.SiLU), 3),
    "without a norm": (lambda: ConvNormAct(8, 16, bias=True, norm=False, act=nn.ReLU), 8),
    "another activation": (lambda: ConvNormAct(8, 16, act=nn.ELU), 8),
    "MBConv": (lambda: MBConv(8, 16, 2, fewer_norm=True), 8),
    "MBConv, 1 x 1": (lambda: MBConv(8, 16, kernel_size=None), 8),
    "Residual": (lambda: Residual(MBConv(8, 8)), 8),
    "LiteMLA": (lambda: LiteMLA(16, head_dim=8, scales=(3, 5)), 16),
    "PatchTransformer": (lambda: PatchTransformer(16, 2, 2, activation=nn.GELU), 16),
    "no final norm": (lambda: PatchTransformer(16, 1, 2, final_norm=False), 16),
    "ToChannelsLast": (lambda: layers.ToChannelsLast(8, 16), 8),
    "ToChannelsFirst": (lambda: layers.ToChannelsFirst(8, 16), 8),
    "PoolMixer": (layers.PoolMixer, 8),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("channels_last", [True, False])
def test_modules_alone(name, channels_last):
    torch.manual_seed(0)
    build, channels = ALONE[name]
    module = randomise(build()).eval()
    x = torch.randn(2, channels, 9, 10)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    wanted = logits(module, x)
    assert swap(module, inference=True).folded > 0
    with torch.no_grad():
        run = plans.run_of(module, x)
    assert run is not None
    found = logits(module, x)
    near(found, wanted)
    if name != "PoolMixer":
        assert plans.size(module) > 0
        with pytest.raises((ValueError, RuntimeError)):
            logits(module, x[:, :2])
    if name in ("PatchTransformer", "LiteMLA"):
        with pytest.raises(ValueError, match="want \\(B, 16, H, W\\)"):
            logits(module, x[:, :2])


def test_a_module_of_another_backend_keeps_it():
    transformer = PatchTransformer(16, 1, 2, backend="reference").eval()
    swap(transformer, inference=True)
    x = torch.randn(1, 16, 4, 4)
    logits(transformer, x)
    with Operators() as operators:
        logits(transformer, x)
    assert not any("patch_attention" in op for op in operators.seen)
