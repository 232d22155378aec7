"""Modules recognised by structure that compute the known formula most of the time: what the rest of the time costs."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from mvkernels.swap import swap
from tests import cvnets_layout, efficientvit_layout
from tests import mobile_former_layout as layout
from tests.swap.linear_attention import mit_attention, randomised
from tests.swap.test_mobile_former import bridge, inputs, model


def attend(self, x, change):
    """The bridge's forward with the scores, before or after the softmax, changed."""
    features, tokens = x
    pixels = features.unflatten(1, (self.num_heads, -1)).flatten(3)
    query = self.q(tokens).unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
    scores = self.scale * (query @ pixels)
    seen = (change(scores) @ pixels.mT).permute(2, 0, 1, 3).flatten(2)
    seen = seen * (self.alpha_scale * self.alpha(tokens))
    tokens = self.layer_norm(tokens + self.drop_path(self.proj(seen)))
    return tokens, scores.unflatten(-1, features.shape[-2:])


class Same(layout.Local2Global):
    def forward(self, x):
        return attend(self, x, lambda scores: scores.softmax(-1))


class DropsAttention(layout.Local2Global):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.attn_drop = nn.Dropout(0.5)

    def forward(self, x):
        return attend(self, x, lambda scores: self.attn_drop(scores.softmax(-1)))


class DropsByFunction(layout.Local2Global):
    def forward(self, x):
        return attend(self, x, lambda s: nn.functional.dropout(s.softmax(-1), 0.1, self.training))


class ClampsScores(layout.Local2Global):
    def forward(self, x):
        return attend(self, x, lambda scores: scores.clamp(-50, 50).softmax(-1))


class DoubledInTraining(layout.Global2Local):
    def forward(self, x):
        out = super().forward(x)
        return out * 2 if self.training else out


class OtherScores(layout.Local2Global):
    def forward(self, x):
        tokens, scores = super().forward(x)
        return tokens, scores.softmax(-1)


class NoScores(layout.Local2Global):
    def forward(self, x):
        return super().forward(x)[0], None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kind, reason",
    [
        (DropsAttention, "it has a child attn_drop, a torch.nn.Dropout, that the known formula does not contain"),
        (DropsByFunction, "computes something other than the known formula in training mode"),
        (DoubledInTraining, "computes something other than the known formula in training mode"),
        (ClampsScores, "computes something other than the known formula$"),
        (OtherScores, "computes something other than the known formula$"),
        (NoScores, "does not return a tensor of the shape"),
    ],
)
def test_bridges(kind, reason, training):
    module = bridge(kind).train(training)
    (entry,) = swap(module).entries
    assert not entry.swapped and type(module) is kind
    assert re.search(reason, entry.reason), entry.reason


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", [{}, {"drop_path": 0.2}, {"heads": 3}, {"dynamic": True}], ids=str)
@pytest.mark.parametrize("kind", [layout.Local2Global, layout.Global2Local, Same])
def test_bridges_that_compute_the_same(kind, settings, training):
    """And asking them changes nothing, nor draws from the global generator."""
    module = bridge(kind, **settings).train(training)
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    (entry,) = swap(module).entries
    assert torch.equal(torch.get_rng_state(), state) and module.training is training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert entry.swapped, entry.reason


@pytest.mark.parametrize("kind", [layout.Local2Global, layout.Global2Local])
@pytest.mark.parametrize("channels, token_dim, tokens", [(8, 128, 3), (88, 128, 4), (176, 192, 6), (240, 192, 6)])
def test_the_sizes_of_published_bridges(kind, channels, token_dim, tokens):
    """Large numbers make sharp decisions; those of the probe do not hang on rounding."""
    (entry,) = swap(kind(channels, token_dim, tokens).train()).entries
    assert entry.swapped, entry.reason


class LiteMLADropsQkv(efficientvit_layout.LiteMLA):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.drop = nn.Dropout(0.0)


class LiteMLADoubles(efficientvit_layout.LiteMLA):
    def forward(self, x):
        out = super().forward(x)
        return 2 * out if self.training else out


class LiteMLAClamps(efficientvit_layout.LiteMLA):
    def relu_linear_att(self, qkv):
        return super().relu_linear_att(qkv.clamp(-100, 100))


@pytest.mark.parametrize(
    "kind, reason",
    [
        (LiteMLADropsQkv, "it has a child drop, a torch.nn.Dropout"),
        (LiteMLADoubles, "something other than the known formula in training mode"),
        (LiteMLAClamps, "something other than the known formula$"),
        (efficientvit_layout.LiteMLA, ""),
    ],
)
def test_lite_mla(kind, reason):
    module = mit_attention() if kind is efficientvit_layout.LiteMLA else randomised(kind(16, 16))
    (entry,) = swap(module.train()).entries
    assert entry.swapped is not bool(reason) and re.search(reason, entry.reason), entry.reason


class Attention(cvnets_layout.MultiHeadAttention):
    def change(self, scores):
        return scores

    def forward(self, x_q, x_kv=None):
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv_proj(x_q).chunk(3, dim=-1))
        scores = self.change(torch.einsum("bihd,bjhd->bhij", query * self.scaling, key))
        seen = torch.einsum("bhij,bjhd->bihd", self.attn_dropout(scores.softmax(-1)), value)
        return self.out_proj(seen.flatten(2))


class ClampingAttention(Attention):
    def change(self, scores):
        return scores.clamp(-50, 50)


class NoisyAttention(Attention):
    def change(self, scores):
        return scores + torch.randn_like(scores) if self.training else scores


class HoldingAttention(Attention):
    def __init__(self, *args):
        super().__init__(*args)
        self.logits_drop = nn.Dropout(0.1)

    def change(self, scores):
        return self.logits_drop(scores)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kind, reason",
    [
        (ClampingAttention, "something other than the known formula$"),
        (NoisyAttention, "something other than the known formula in training mode"),
        (HoldingAttention, "its attention has a child logits_drop, a torch.nn.Dropout"),
        (Attention, ""),
    ],
)
def test_mobilevit_blocks(kind, reason, training, monkeypatch):
    monkeypatch.setattr(cvnets_layout, "MultiHeadAttention", kind)
    module = cvnets_layout.MobileViTBlock(dropout=0.1).train(training)
    (entry,) = swap(module).entries
    assert entry.swapped is not bool(reason) and re.search(reason, entry.reason), entry.reason


def test_gradients_in_training_mode():
    """In float64, through batch norms of two pictures: what differs in float32 is rounding that these amplify.

    Some gradients are exactly zero (biases before a norm, or of keys), so that errors are held against the largest.
    """
    network = model().double().train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for _ in range(2):
        gradients.append(torch.autograd.grad(network(x).square().sum(), [*network.parameters()]))
        swap(network)
    largest = max(float(g.abs().max()) for g in gradients[0])
    for (name, _), actual, expected in zip(network.named_parameters(), gradients[1], gradients[0]):
        assert float((actual - expected).abs().max()) <= 1e-9 * largest, name


def test_training_a_swapped_bridge_draws_as_before():
    """A drop path that drops is the original's, with the same draws."""
    module = bridge(drop_path=0.5)
    twin = copy.deepcopy(module).train()
    swap(module)
    x = inputs()
    outputs = []
    for each in (module.train(), twin):
        torch.manual_seed(0)
        outputs.append(each(x)[0])
    assert torch.equal(*outputs)
