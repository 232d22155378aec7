"""Blocks of CoAtNet, Mobile-Former and DC-AE on packed weights: swap(model, inference=True)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mvmodels
from mvkernels.dispatch import extension
from mvkernels.nn import DownsampleMobile, Mobile
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.packing import plans
from mvmodels import coatnet
from mvmodels.mobile_former import FirstBlock, Head, Stem
from tests.swap import linear_attention
from tests.swap.conftest import randomise

pytestmark = pytest.mark.skipif(extension.module is None, reason=extension.reason)
Given = tuple[torch.Tensor, ...]


def timm_block(inputs: int, outputs: int, stride: int, **settings: Any) -> nn.Module:
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    config = maxxvit.MaxxVitConvCfg(**{"stride_mode": "dw", **settings})
    block: nn.Module = maxxvit.MbConvBlock(inputs, outputs, stride, cfg=config)
    return block


def diffusers_block(name: str, *settings: Any) -> nn.Module:
    pytest.importorskip("diffusers")
    from diffusers.models import attention_processor, autoencoders
    from diffusers.models.transformers import sana_transformer

    files = (autoencoders.autoencoder_dc, sana_transformer, attention_processor)
    kind: Any = next(getattr(file, name) for file in files if hasattr(file, name))
    return kind(*settings)  # type: ignore[no-any-return]


def dc_ae(norm: str, adds: bool = True) -> nn.Module:
    """The attention, with one scale."""
    return diffusers_block("SanaMultiscaleLinearAttention", 16, 16, None, 8, 1.0, norm, (5,), 1e-15, adds)


# A module, the channels of its map, and the axes of the tensor beside it.
CASES: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "timm": (lambda: timm_block(20, 20, 1), 20, ""),
    "timm halves": (lambda: timm_block(12, 20, 2), 12, ""),
    "timm without a gate": (lambda: timm_block(12, 12, 1, attn_layer=""), 12, ""),
    "coatnet": (lambda: coatnet.MBConv(20, 20, 1, 0.1, "avg", "depthwise"), 20, ""),
    "coatnet halves": (lambda: coatnet.MBConv(12, 20, 2, 0.0, "max", "depthwise"), 12, ""),
    "mobile": (lambda: Mobile(12, 12, 3, 16, drop_path=0.1), 12, "token"),
    "mobile widens": (lambda: Mobile(12, 20, 2, 16), 12, "token"),
    "downsample": (lambda: DownsampleMobile(12, 20, (6, 4), 16), 12, "token"),
    "downsample copies": (lambda: DownsampleMobile(56, 50, (2, 3), 16), 56, "token"),
    "downsample keeps": (lambda: DownsampleMobile(56, 20, (1, 1), 16), 56, "token"),
    "first": (lambda: FirstBlock(12, 12, 2, 1, 1), 12, "tokens"),
    "first halves": (lambda: FirstBlock(8, 12, 3, 2, 1), 8, "tokens"),
    "stem": (lambda: Stem(3, 12, 2), 3, ""),
    "head": (lambda: Head(24, 16, 40, 10, 1, 0.1), 24, "token"),
    "dc-ae residual": (lambda: diffusers_block("ResBlock", 20, 20, "rms_norm", "silu"), 20, ""),
    "dc-ae residual, batch norm": (lambda: diffusers_block("ResBlock", 20, 20, "batch_norm", "relu"), 20, ""),
    "dc-ae feed-forward": (lambda: diffusers_block("GLUMBConv", 12, 12, 4, "rms_norm"), 12, ""),
    "dc-ae feed-forward, large": (lambda: diffusers_block("GLUMBConv", 256, 12, 8, "rms_norm", False), 256, ""),
    "sana feed-forward": (lambda: diffusers_block("GLUMBConv", 12, 20, 2.5, None, False), 12, ""),
    "dc-ae block": (lambda: diffusers_block("EfficientViTBlock", 16, 1.0, 8, (5,), "rms_norm"), 16, ""),
    "dc-ae attention": (lambda: dc_ae("batch_norm"), 16, ""),
    "dc-ae attention alone": (lambda: dc_ae("rms_norm", False), 16, ""),
    "dc-ae halves": (lambda: diffusers_block("DCDownBlock2d", 12, 24), 12, ""),
    "dc-ae doubles": (lambda: diffusers_block("DCUpBlock2d", 24, 12, True), 24, ""),
    "dc-ae doubles, as many": (lambda: diffusers_block("DCUpBlock2d", 20, 20, True), 20, ""),
    "dc-ae shuffles": (lambda: diffusers_block("DCUpBlock2d", 24, 12), 24, ""),
}
BESIDE = {"": [], "token": [(16,)], "tokens": [(3, 16)]}


def make(case: str, batch: int = 2, kind: str = "normal") -> tuple[nn.Module, Given]:
    torch.manual_seed(0)
    build, channels, beside = CASES[case]
    module = randomise(build())
    sides = (8, 10) if case in ("timm halves", "dc-ae halves") else (7, 9)  # the shortcuts are for even sides
    x = torch.randn(batch, channels, *sides)
    if kind == "constant":
        x = torch.full_like(x, 0.7)
    if kind == "peaked":
        x[..., 3, 4] = 300.0
    return module, (x, *(torch.randn(batch, *shape) for shape in BESIDE[beside]))


def call(module: nn.Module, given: Given) -> torch.Tensor:
    with torch.no_grad():
        out = module(*given)
    return out[0] if isinstance(out, tuple) else out


def exact(module: nn.Module, given: Given) -> torch.Tensor:
    """In float64, in which no weights are packed."""
    return call(copy.deepcopy(module).double(), tuple(t.double() for t in given))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=2e-6 * float(wanted.abs().max()))


class Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def convolutions(module: nn.Module, given: Given) -> int:
    with Convolutions() as mode:
        call(module, given)
    return mode.count


@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "constant"])
def test_results_are_as_exact_as_the_originals(case, kind):
    for batch in (1, 3):
        module, given = make(case, batch, kind)
        wanted, plain = exact(module, given), call(module, given)
        names, attributes = list(module.state_dict()), [sorted(m.__dict__) for m in module.modules()]
        report = swap(module, inference=True)
        assert report.folded or report.count
        for layout in (torch.contiguous_format, torch.channels_last):
            found = call(module, (given[0].contiguous(memory_format=layout), *given[1:]))
            assert found.shape == plain.shape and found.dtype == torch.float32
            assert (found - wanted).abs().max() <= 4 * (plain - wanted).abs().max() + 1e-6 * wanted.abs().max()
        assert convolutions(module, given) == 0 and plans.size(module) > 0
        assert list(module.state_dict()) == names and [sorted(m.__dict__) for m in module.modules()] == attributes


@pytest.mark.parametrize("case", CASES)
def test_changes_are_followed(case):
    module, given = make(case)
    original = copy.deepcopy(module)
    swap(module, inference=True)
    before = call(module, given)
    for change in (weights, statistics, epsilon):
        for each in (module, original):
            change(each)
        found = call(module, given)
        close(found, exact(original, given))
        assert not torch.equal(found, before)


def weights(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.2).add_(0.01)


def statistics(module):
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean += 0.1
            part.running_var.mul_(1.3)


def epsilon(module):
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.eps = 0.1


@pytest.mark.parametrize("case", CASES)
def test_hooks_and_replaced_forwards_of_parts_are_called(case):
    module, given = make(case)
    wanted = call(module, given)
    swap(module, inference=True)
    packed = call(module, given)
    for name, part in module.named_modules():
        if not name or type(part).__name__ in ("Identity", "DropPath", "Dropout", "Dropout2d", "ModuleList"):
            continue
        seen = []
        with part.register_forward_hook(lambda m, given, out, seen=seen: seen.append(out)):
            close(call(module, given), wanted)
        assert seen, name
        part.forward = lambda *a, part=part, seen=seen: (seen.append(part), type(part).forward(part, *a))[1]
        close(call(module, given), wanted)
        assert seen[-1] is part, name
        del part.forward
    assert torch.equal(call(module, given), packed)


@pytest.mark.parametrize("case", ["timm", "coatnet", "mobile", "downsample", "first", "head"])
def test_a_parametrized_part_and_a_replaced_class_are_followed(case, monkeypatch):
    module, given = make(case)
    swap(module, inference=True)
    call(module, given)
    conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    torch.nn.utils.parametrizations.weight_norm(conv)
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(1.5)
    close(call(module, given), exact(module, given))
    other, given = make(case)
    swap(other, inference=True)
    call(other, given)
    monkeypatch.setattr(type(other).mvk_original, "forward", lambda self, *given: given[0] * 2)
    assert torch.equal(call(other, given), given[0] * 2)


@pytest.mark.parametrize("case", CASES)
def test_gradients_training_autocast_and_other_dtypes_take_the_original(case):
    module, given = make(case)
    original = copy.deepcopy(module)
    swap(module, inference=True)

    def same(of):
        torch.manual_seed(1)
        found = of(module)
        torch.manual_seed(1)
        wanted = of(original)
        assert found.dtype == wanted.dtype
        close(found, wanted)

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    def gradient(m):
        m.zero_grad()
        first(m(*given)).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

    def trained(m):
        m.train()
        out = call(m, given)
        m.eval()
        return out

    same(gradient)
    same(trained)  # which changes running statistics
    same(lambda m: call(m, given))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(call(module, given), call(original, given), rtol=0.1, atol=0.1)
    same(lambda m: call(m.double(), tuple(t.double() for t in given)))


def check_copies_and_restore(module, given, call):
    """Copies and pickles pack anew and give the same; restored, the module is what it was."""
    kinds, plain = [type(m) for m in module.modules()], call(module, given)
    report = swap(module, inference=True)
    packed = call(module, given)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert plans.size(other) == 0
        assert torch.equal(call(other, given), packed) and plans.size(other) > 0
    report.restore()
    assert [type(m) for m in module.modules()] == kinds and plans.size(module) == 0
    assert torch.equal(call(module, given), plain)


@pytest.mark.parametrize("case", CASES)
def test_copies_pickles_and_restored_modules(case):
    check_copies_and_restore(*make(case), call)


@pytest.mark.parametrize("case", CASES)
def test_exports_and_compiled_calls(case):
    module, given = make(case)
    wanted = call(module, given)
    swap(module, inference=True)
    seen = []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        exported = torch.export.export(module, given)
    assert not [n for n in exported.graph.nodes if "mvkernels" in str(n.target)]
    close(call(exported.module(), given), wanted)
    torch._dynamo.reset()
    close(call(torch.compile(module, backend=note, fullgraph=True), given), wanted)
    assert any("packed" in target for target in seen) == (not case.startswith("first"))  # which gives a tuple


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm_block(12, 12, 1, attn_early=True),
        lambda: timm_block(12, 20, 2, stride_mode="pool"),
        lambda: timm_block(12, 12, 1, attn_layer="eca"),
        lambda: timm_block(12, 12, 1, padding="same"),
        lambda: timm_block(12, 12, 1, pre_norm_act=True),
    ],
    ids=["early gate", "pooled", "another gate", "padding", "activation before"],
)
def test_blocks_that_are_more_keep_their_parts(build):
    module, x = randomise(build()), torch.randn(2, 12, 8, 10)
    wanted = exact(module, (x,))
    swap(module, inference=True)
    close(call(module, (x,)), wanted)
    assert plans.size(module) > 0  # its 1 x 1 convolutions


@pytest.mark.parametrize(
    "module", [Mobile(8, 8, 3, 16, groups=4), FirstBlock(8, 8, 3, 1, 4), Head(8, 16, 8, 5, 4, 0.0)]
)
def test_convolutions_with_groups_stay(module):
    kind = type(module)
    swap(module, inference=True)
    assert type(module) is kind


def test_tensors_that_are_not_of_one_batch_take_the_original():
    module, (x, token) = make("mobile")
    wanted = call(module, (x, token[:1]))
    swap(module, inference=True)
    assert torch.equal(call(module, (x, token[:1])), wanted)
    with pytest.raises(RuntimeError):
        call(module, (x[:, 1:], token))


@pytest.mark.parametrize("name", ["mobile_former_52m", "coatnet_0"])
def test_whole_models(name):
    model = randomise(mvmodels.create_model(name, num_classes=5))
    swap(model, inference=True)
    result = verify_swap(model, torch.randn(1, 3, 64, 64))
    assert result.ok, str(result)


def test_maps_stay_channels_last_between_the_blocks():
    model = randomise(mvmodels.create_model("mobile_former_52m", num_classes=5))
    swap(model, inference=True)
    seen = []
    for name, part in model.named_modules():
        if name.endswith((".mobile", ".former_to_mobile")):
            part.register_forward_hook(lambda m, given, out: seen.append((*given, out)))
    call(model, (torch.randn(1, 3, 64, 64),))
    maps = [t for each in seen for t in each if t.dim() == 4]
    assert len(maps) > 20 and all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert convolutions(model, (torch.randn(1, 3, 64, 64),)) == 0


@pytest.mark.parametrize("upsampling", ["pixel_shuffle", "interpolate"])
def test_maps_of_dc_ae_stay_channels_last_from_its_first_convolution_on(upsampling):
    model = linear_attention.dc_ae_model(upsample_block_type=upsampling)
    swap(model, inference=True)
    seen = []

    class Maps(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func).startswith("mvkernels_cpp.") and "pack" not in str(func):
                seen.append(args[0])
            return func(*args, **(kwargs or {}))

    with Maps(), torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(seen) > 30 and all(m.is_contiguous(memory_format=torch.channels_last) for m in seen[1:])


@pytest.mark.parametrize("inside", [False, True])
def test_another_processor_of_dc_ae_is_called(inside, monkeypatch):
    module, given = make("dc-ae block" if inside else "dc-ae attention")
    attention: Any = module.attn if inside else module
    swap(module, inference=True)
    before, kind = call(module, given), type(attention.processor)
    seen = []
    original = kind.__call__
    with monkeypatch.context() as patched:
        patched.setattr(kind, "__call__", lambda self, *given: (seen.append(self), original(self, *given))[1])
        close(call(module, given), before)
    assert seen == [attention.processor] and torch.equal(call(module, given), before)

    class Other(kind):
        def __call__(self, attn, x):
            return 2 * x

    attention.processor = Other()
    if not inside:
        assert torch.equal(call(module, given), 2 * given[0])
    assert not torch.equal(call(module, given), before)
