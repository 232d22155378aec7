"""Swapped against original: values, gradients, layouts, dtypes, training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvkernels.swap import swap
from mvkernels.testing import BACKWARD_FACTOR, FORWARD_FACTOR, compare, rms_error

from .conftest import output


def gradients(module: nn.Module, x: torch.Tensor, cotangent: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """{"out": …, "x": …, and every parameter's gradient}."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = output(module(x))
    if cotangent is None:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], cotangent.to(out.dtype))
    return {"out": out.detach(), **dict(zip(["x", *parameters], grads))}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=tolerance,
            atol=tolerance * max(1.0, float(value.abs().max())),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.core
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (7, 7), (5, 8), (1, 1), (6, 14)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_block_in_float64(family, batch, size, channels_last):
    block = family.block().double()
    x = torch.randn(batch, 12, size[0] * family.scale, size[1] * family.scale, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = gradients(block, x)
    stride = block(x).stride()
    before = x.clone()
    assert swap(block).count == 1
    assert_close(gradients(block, x), expected, 1e-9)
    assert block(x).stride() == stride
    assert torch.equal(x, before)


def test_channels_last_model(family):
    block = family.block().double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 12, 8, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected, stride = gradients(block, x), block(x).stride()
    swap(block)
    assert_close(gradients(block, x), expected, 1e-9)
    assert block(x).stride() == stride


def test_sliced_input(family):
    block = family.block().double()
    x = torch.randn(2, 24, 9, 17, dtype=torch.float64)[:, ::2, 1:, 1::2]
    expected = block(x)
    swap(block)
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_block_in_lower_precision(family, dtype, size):
    """Against float64 the swapped block errs like the original: at most twice as much, gradients three times.

    Pooled over draws and parameters: on one tensor of one draw either of the two may be twenty times luckier.
    """
    errors: dict[str, list[list[float]]] = {"out": [[], []], "x": [[], []], "parameters": [[], []]}
    for seed in range(4):
        block = family.block().to(dtype)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 12, size[0] * family.scale, size[1] * family.scale, generator=generator).to(dtype)
        exact = gradients(copy.deepcopy(block).double(), x.double())
        runs = [gradients(block, x)]
        swap(block)
        runs.append(gradients(block, x))
        for name, value in exact.items():
            if "key.bias" in name:  # its exact gradient is 0
                continue
            for run, found in zip(runs, errors[name if name in errors else "parameters"]):
                assert run[name].dtype == dtype
                found.append(rms_error(run[name], value) / float(value.square().mean().sqrt()))
    for name, (baseline, actual) in errors.items():
        pooled = [sum(e * e for e in found) ** 0.5 for found in (baseline, actual)]
        assert pooled[1] <= (FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR) * pooled[0], name


def test_float16(family):
    block = family.block()
    x = torch.randn(1, 12, 8, 8)
    exact = block(x)
    block = block.half()
    baseline = block(x.half())
    swap(block)
    row = compare("out", block(x.half()), exact, baseline)
    assert row.ok, str(row)


def test_no_grad_is_the_same(family):
    block = family.block().double()
    swap(block)
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    expected = block(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [64, 96, 72, 112], ids=str)
def test_model_in_float64(family, size):
    """64 and 96 divide everywhere or not, 72 and 112 resize in some stages."""
    model = family.model().double()
    x = torch.randn(2, 3, size, size + 32, dtype=torch.float64)
    expected = output(model(x))
    assert swap(model).count == 3
    torch.testing.assert_close(output(model(x)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [256, 224])
def test_real_xxs_in_float64(size):
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(
        hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0
    )
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    for made in (timm.create_model("mobilevit_xxs"), transformers.MobileViTForImageClassification(config)):
        model = made.double().eval()
        with torch.no_grad():
            expected = output(model(x))
            assert swap(model).count == 3
            torch.testing.assert_close(output(model(x)), expected, rtol=1e-9, atol=1e-9)


def test_dilated_and_segmentation():
    """DeepLab's backbone has blocks with a dilated, stride-1 downsampling."""
    from .conftest import randomise, transformers_config

    config = transformers_config(output_stride=16)
    from transformers import MobileViTForSemanticSegmentation

    model = randomise(MobileViTForSemanticSegmentation(config)).double()
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = model(x).logits
    assert swap(model).count == 3
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [{"patch_size": (4, 2)}, {"patch_size": 1}, {"no_fusion": True}, {"num_heads": 2, "mlp_ratio": 3.0}, {"stride": 2}],
    ids=str,
)
def test_timm_variants(changes):
    from .conftest import timm_block

    if "stride" in changes:
        changes = {**changes, "no_fusion": True}
    block = timm_block(**changes).double()
    x = torch.randn(2, 12, 8, 10, dtype=torch.float64)
    expected = gradients(block, x)
    assert swap(block).count == 1
    assert_close(gradients(block, x), expected, 1e-9)


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"hidden_act": "gelu"}, {"patch_size": 4}], ids=str)
def test_transformers_variants(changes):
    from .conftest import transformers_block

    block = transformers_block(stride=1, **changes).double()
    x = torch.randn(2, 12, 8, 10, dtype=torch.float64)
    expected = gradients(block, x)
    assert swap(block).count == 1
    assert_close(gradients(block, x), expected, 1e-9)


def test_training_without_dropout(family):
    """Batch statistics, running statistics and gradients are those of the original."""
    block = family.block(**{k: 0.0 for k in family.hidden_dropout}).double().train()
    twin = copy.deepcopy(block)
    assert swap(block).count == 1
    x = torch.randn(3, 12, 8, 8, dtype=torch.float64)
    assert_close(gradients(block, x), gradients(twin, x), 1e-9)
    assert_close(block.state_dict(), twin.state_dict(), 1e-9)


def test_five_optimizer_steps(family):
    block = family.block(**{k: 0.0 for k in family.hidden_dropout}).double().train()
    twin = copy.deepcopy(block)
    # the optimizer is made before the swap and goes on with the same parameters
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (block, twin)]
    swap(block)
    for step in range(5):
        x = torch.randn(2, 12, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        losses = []
        for module, optimizer in zip((block, twin), optimizers):
            optimizer.zero_grad()
            loss = module(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, value in twin.state_dict().items():
        # AdamW divides by the gradient's size: where the exact gradient is 0, rounding decides the sign
        if "key.bias" not in name and "qkv.bias" not in name:
            torch.testing.assert_close(
                block.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
            )


def test_dropout_has_the_same_distribution(family):
    """With p = 0.1 the mean and the variance of the output over many draws agree with the original's."""
    block = family.block(**family.hidden_dropout)
    twin = copy.deepcopy(block)
    swap(block)
    x = torch.randn(1, 12, 4 * family.scale, 4 * family.scale).expand(2000, -1, -1, -1)
    draws = []
    for module in (block, twin):
        for part in module.modules():  # batch norm must not see the noise
            part.train(isinstance(part, nn.Dropout))
        with torch.no_grad():
            draws.append(torch.cat([module(x[:500]) for _ in range(4)]).double())
    assert not torch.equal(*draws)
    (a, b), n = draws, 2000
    seen = torch.minimum(a.var(0), b.var(0)) > 1e-2  # some channels end in the flat part of SiLU
    assert seen.float().mean() > 0.3
    deviation = ((a.mean(0) - b.mean(0)).square() / ((a.var(0) + b.var(0)) / n))[seen]
    assert deviation.mean() == pytest.approx(1.0, abs=0.5)
    assert float((a.var(0)[seen] / b.var(0)[seen]).log().median().abs()) < 0.1


def test_dropout_is_in_the_same_places(family):
    """With one dropout at a time set to drop everything, training is deterministic, and as in the original."""
    block = family.block().double().train()
    places = [name for name, m in block.named_modules() if type(m) is nn.Dropout]
    x = torch.randn(2, 12, 8, 8, dtype=torch.float64)
    outputs = []
    for place in places:
        for name in places:
            block.get_submodule(name).p = 1.0 if name == place else 0.0
        expected = copy.deepcopy(block)(x)
        report = swap(block)
        assert torch.allclose(block(x), expected, rtol=1e-9, atol=1e-9), place
        outputs.append(expected)
        report.restore()
    assert len({float(o.detach().sum()) for o in outputs}) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_autocast(family, dtype):
    block = family.block()
    x = torch.randn(2, 12, 8, 8)
    exact = copy.deepcopy(block).double()(x.double())
    with torch.autocast("cpu", dtype):
        baseline = block(x)
        swap(block)
        actual = block(x)
        actual.float().square().mean().backward()
    assert actual.dtype == baseline.dtype
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in block.parameters())
    row = compare("out", actual, exact, baseline)
    assert row.ok, str(row)
