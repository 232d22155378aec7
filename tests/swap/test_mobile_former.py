"""The bridges of Mobile-Former as its authors lay it out: recognised by structure, swapped one by one."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from torch import nn

from mvkernels import third_party
from mvkernels.swap import swap, verify_swap
from mvkernels.swap.families import authors_mobile_former
from tests import mobile_former_layout as layout


def randomise(module: nn.Module) -> nn.Module:
    third_party.randomise(module)
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight)
    return module.eval()


def model(name="26m", **settings) -> nn.Module:
    return randomise(layout.MobileFormer(name, num_classes=5, **settings))


def bridge(kind=layout.Local2Global, **settings) -> nn.Module:
    return randomise(kind(12, token_dim=16, token_num=3, **settings))


def inputs(batch=2, size=(5, 7), dtype=torch.float32, tokens=3):
    return torch.randn(batch, 12, *size, dtype=dtype), torch.randn(tokens, batch, 16, dtype=dtype)


def tokens_or_map(result):
    return result[0] if isinstance(result, tuple) else result


KINDS = [layout.Local2Global, layout.Global2Local]
BRIDGES = [f"features.{i}.{name}" for i in range(1, 9) for name in ("local_global", "global_local")] + ["local_global"]


@pytest.fixture
def calls(monkeypatch):
    """The backends that the fused ops are called with."""
    seen: list[str | None] = []
    for name in ("mobile_to_former", "add_attention"):
        original = getattr(authors_mobile_former, name)

        def spy(*args, backend=None, original=original, **kwargs):
            seen.append(backend)
            return original(*args, backend=backend, **kwargs)

        monkeypatch.setattr(authors_mobile_former, name, spy)
    return seen


def known(report):
    """Entries of the bridges, and of other attention: that among the tokens."""
    others = [e for e in report.entries if e.reason == "no fused form of this class is known"]
    return [e for e in report.entries if e not in others], others


def test_every_bridge_is_found_and_swapped(calls):
    network = model()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = network.double()(x.double())
    keys = list(network.state_dict())
    parameters = list(network.parameters())
    report = swap(network)
    bridges, others = known(report)
    assert sorted(e.name for e in bridges) == sorted(BRIDGES)
    assert all(e.swapped for e in bridges) and report.count == 17
    assert {e.module_class for e in bridges} == {"Local2Global", "Global2Local"}
    assert [(e.module_class, e.swapped) for e in others] == [("GlobalBlock", False)] * 8
    assert list(network.state_dict()) == keys and all(a is b for a, b in zip(network.parameters(), parameters))
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(network(x.double()), expected, rtol=1e-9, atol=1e-9)
    assert len(calls) == 17
    second = swap(network)
    assert second.count == 0 and {e.reason for e in known(second)[0]} == {"already swapped"}
    report.restore()
    assert {type(m).__module__ for m in network.modules()} == {
        type(m).__module__ for m in layout.MobileFormer().modules()
    }
    with torch.no_grad():
        assert torch.equal(network(x.double()), expected)
    assert len(calls) == 17


@pytest.mark.parametrize("size", ["26m", "96m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_verify_swap(size, dtype):
    network = model(size).to(dtype)
    result = verify_swap(network, torch.randn(2, 3, 64, 64, dtype=dtype))
    assert result.ok, str(result)
    assert result.swapped == 17
    names = [row.name for row in result.rows]
    assert "features.1.local_global: output [0]" in names and "features.1.local_global: output [1]" not in names
    assert "features.1.local_global: d input 0[0]" in names and "features.1.global_local: d input 0[1]" in names
    assert not any(hasattr(type(m), "mvk_original") for m in network.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_verify_swap_of_a_bridge_itself(kind):
    result = verify_swap(bridge(kind), (inputs(),))
    assert result.ok and result.swapped == 1, str(result)


@pytest.mark.parametrize("name", ["mobile_to_former", "add_attention"])
def test_a_wrong_kernel_is_found(name, monkeypatch):
    network = model()
    swap(network)
    original = getattr(authors_mobile_former, name)
    monkeypatch.setattr(authors_mobile_former, name, lambda *a, scale, **kw: original(*a, scale=1.02 * scale, **kw))
    assert not verify_swap(network, torch.randn(1, 3, 64, 64)).ok


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_gradients(kind, dynamic, heads, channels_last):
    module = bridge(kind, dynamic=dynamic, heads=heads).double()
    x, tokens = inputs(batch=3, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), tokens.requires_grad_(), *module.parameters()]
    results = []
    for _ in range(2):
        out = tokens_or_map(module((x, tokens)))
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, cotangent)))
        assert swap(module).entries[0].swapped
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_maps_that_the_original_cannot_view(calls):
    """A map sliced in space is as good as any to the fused op."""
    module = bridge().double()
    swap(module)
    x, tokens = torch.randn(2, 12, 10, 15, dtype=torch.float64)[:, :, ::2, 1::2], inputs(dtype=torch.float64)[1]
    out, scores = module((x, tokens))
    expected = module.mvk_original.forward(module, (x.contiguous(), tokens))
    torch.testing.assert_close((out, scores.tensor), expected)


DECLINED = {
    "scores": (lambda: model(hyper_token_id=-1), "its scores are used", 9),
    "projections": (lambda: model(remove_proj_local=False), "it projects the map", 16),
    "mlp": (lambda: model(block="mlp+attn"), "block is 'mlp+attn', want 'attn'", 16),
}


@pytest.mark.parametrize("change", DECLINED)
def test_declined(change):
    make, reason, count = DECLINED[change]
    network = make()
    types = [type(m) for m in network.modules()]
    report = swap(network)
    bridges, _ = known(report)
    declined = [e for e in bridges if not e.swapped]
    assert len(declined) == count and len(bridges) == 17
    assert all(reason in e.reason for e in declined)
    assert report.count == 17 - count
    if change == "scores":  # the other direction has none
        assert {e.module_class for e in declined} == {"Local2Global"}
    report.restore()
    assert [type(m) for m in network.modules()] == types


def test_a_model_that_uses_its_scores_still_runs():
    network = model(hyper_token_id=-1).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        assert swap(network).count == 8
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


class NoScale(layout.Local2Global):
    def forward(self, x):
        self.scale = 1.0
        return super().forward(x)


class Interleaved(layout.Global2Local):
    """Channels split as (head_dim heads) instead of (heads head_dim)."""

    def forward(self, x):
        out, tokens = x
        order = torch.arange(out.shape[1]).view(self.num_heads, -1).t().flatten()
        back = order.argsort()
        return super().forward((out[:, order], tokens))[:, back]


class Extra(layout.Local2Global):
    def forward(self, x):
        tokens, scores = super().forward(x)
        return tokens + 1e-6, scores


class TokensOnly(layout.Local2Global):
    def forward(self, x):
        return super().forward(x)[0]


class Fails(layout.Global2Local):
    def forward(self, x):
        raise RuntimeError("not today\nnor tomorrow")


class MoreArguments(layout.Local2Global):
    def forward(self, x, mask=None):
        return super().forward(x)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Interleaved, "computes something other"),
        (NoScale, "computes something other"),
        (Extra, "computes something other"),
        (TokensOnly, r"does not return a tuple \(tokens, scores\)"),
        (Fails, "cannot be compared with the known formula: not today$"),
        (MoreArguments, "takes other arguments"),
    ],
)
def test_the_same_structure_that_computes_something_else(kind, reason):
    module = bridge(kind)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    report = swap(module)
    assert type(module) is kind and not report.entries[0].swapped
    assert re.search(reason, report.entries[0].reason)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_another_name_and_the_same_computation():
    """Structure and behaviour decide, not the class."""
    kind = type("Bridge", (layout.Local2Global,), {})
    assert swap(bridge(kind)).count == 1


def test_structure_alone_is_not_enough():
    module = bridge()
    del module.num_heads
    assert [e.reason for e in swap(module).entries] == ["no fused form of this class is known"]
    module = bridge()
    del module.scale
    entry = swap(module).entries[0]
    assert not entry.swapped and "scale" in entry.reason
    module = bridge()
    module.drop_path = nn.Dropout(0.1)
    assert "drop_path is a torch.nn.Dropout" in swap(module).entries[0].reason


@pytest.mark.parametrize("kind", KINDS)
def test_drop_path_in_training_is_left_to_the_original(kind, calls, caplog):
    module = bridge(kind, drop_path=0.5)
    twin = copy.deepcopy(module).train()
    assert swap(module).count == 1
    calls.clear()
    x = inputs(batch=8)
    module.train()
    outputs = []
    with caplog.at_level(logging.WARNING, logger="mvkernels"):
        for each in (module, twin, module):
            torch.manual_seed(3)
            outputs.append(tokens_or_map(each(x)))
    assert torch.equal(outputs[0], outputs[1]) and not calls
    assert ["drop path (p=0.5) is active" in r.getMessage() for r in caplog.records] == [True]
    module.drop_path.drop_prob = 0.0
    module(x)
    module.eval()
    module(x)
    assert len(calls) == 2


def test_hooks(calls):
    """Whoever listens to the bridge may want the scores; whoever listens to its parts is heard as before."""
    module = bridge()
    swap(module)
    calls.clear()
    seen = []
    handle = module.register_forward_hook(lambda m, i, o: seen.append(o[1].shape))
    module(inputs())
    assert seen == [(2, 2, 3, 5, 7)] and not calls
    handle.remove()
    module.q.register_forward_hook(lambda m, i, o: 2 * o)
    fused = module(inputs(dtype=torch.float32))[0]
    assert len(calls) == 1 and fused.isfinite().all()
    x = inputs()
    torch.testing.assert_close(module(x)[0], module.mvk_original.forward(module, x)[0], rtol=1e-5, atol=1e-5)
    module.drop_path.register_forward_hook(lambda m, i, o: 0 * o)
    assert torch.equal(module(x)[0], module.mvk_original.forward(module, x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_the_tokens_projections(kind, calls):
    """Projections are called and not read, so that more may be in them than a Linear."""

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.1 * x.mean()

    module = bridge(kind)
    adapter = Adapter(module.proj.in_features, module.proj.out_features)
    module.proj = adapter
    assert swap(module).count == 1
    calls.clear()
    x = inputs()
    expected = tokens_or_map(module.mvk_original.forward(module, x))
    torch.testing.assert_close(tokens_or_map(module(x)), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_odd_calls_go_to_the_original(kind, calls):
    module = bridge(kind)
    swap(module)
    calls.clear()
    x, tokens = inputs()
    with pytest.raises(TypeError):
        module((x, tokens), tokens)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        module(x)
    with pytest.raises((ValueError, RuntimeError)):
        module((x, tokens[:, 0]))
    assert not calls
    expected = tokens_or_map(module((x, tokens)))
    torch.testing.assert_close(tokens_or_map(module([x, tokens])), expected)
    assert len(calls) == 2


def test_backend_is_passed_on_and_only_chooses(calls):
    network = model()
    report = swap(network, only=["features.1.local_global", "features.1.global_local"], backend="reference")
    assert report.count == 2
    calls.clear()
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    assert calls == ["reference", "reference"]
    report.restore()
    assert not any("mvk_backend" in m.__dict__ for m in network.modules())
