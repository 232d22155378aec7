"""Random models, random edits, before and after a swap: always the same as the model that was never swapped.

An edit is made to both, and what they compute is compared: outputs, gradients of inputs and parameters, buffers. Which
calls are fused and which are the original's is not asked here, but for models that nobody edited.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from mvkernels.swap import eligibility, swap
from mvkernels.swap.engine import FAMILIES, STRUCTURES, unswap
from mvkernels.swap.later import LaterTensor
from mvkernels.swap.report import original_of
from tests import cvnets_layout, efficientvit_layout, mobile_former_layout
from tests.swap.conftest import randomise, timm_block, transformers_config
from tests.swap.linear_attention import dc_ae_attention, sana_attention, timm_attention

Draw = Callable[[st.SearchStrategy], Any]


class Model(nn.Module):
    """A block after a layer and a norm, as models have it: the block's input has a gradient of its own."""

    def __init__(self, stem: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block = stem, block

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        x = self.stem(x)
        result = self.block((x, *more)) if more else self.block(x)
        if x.requires_grad and (original_of(self.block) is None or eligibility._logged):
            # PyTorch's batch norm is wrong on some layouts of the gradient of one sample, which the originals return.
            x.register_hook(lambda grad: grad.clone(memory_format=torch.contiguous_format))
        return result


@dataclass(repr=False)
class Drawn:
    """A block, the channels of its input, and the shapes of what goes in beside the batch."""

    block: nn.Module
    channels: int
    sides: tuple[int, ...]
    """Of the map, or one number of tokens."""
    tokens: tuple[int, int] | None = None
    """For bridges: number and width of the tokens that come with the map."""
    rounds: bool = False
    """Whether the original attends in float32, whatever the dtype."""

    def __repr__(self) -> str:
        settings = {n: v for n, v in self.block.__dict__.items() if isinstance(v, (int, float, str, tuple))}
        return f"{type(self.block).__name__}({settings}), {self.channels} channels, {self.sides}, tokens {self.tokens}"

    def model(self) -> Model:
        if len(self.sides) == 1:
            stem = nn.Sequential(nn.Linear(5, self.channels), nn.LayerNorm(self.channels))
        else:
            stem = nn.Sequential(nn.Conv2d(3, self.channels, 1, bias=False), nn.BatchNorm2d(self.channels))
        model = Model(stem, self.block)
        randomise(model)
        return model.double()

    def inputs(self, batch: int, dtype: torch.dtype, channels_last: bool, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        if len(self.sides) == 1:
            return [normal(batch, *self.sides, 5)]
        x = normal(batch, 3, *self.sides)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return [x] if self.tokens is None else [x, normal(self.tokens[0], batch, self.tokens[1])]


def sides(draw: Draw, least: int = 1) -> tuple[int, int]:
    return draw(st.integers(least, 8)), draw(st.integers(least, 8))


def transformers_mobilevit(draw: Draw) -> Drawn:
    config = transformers_config(
        num_attention_heads=draw(st.sampled_from((1, 2, 4))),
        qkv_bias=draw(st.booleans()),
        patch_size=draw(st.sampled_from((1, 2, 3))),
        attention_probs_dropout_prob=draw(st.sampled_from((0.0, 0.5))),
        hidden_dropout_prob=0.0,
        hidden_act=draw(st.sampled_from(("silu", "gelu"))),
    )
    from transformers.models.mobilevit.modeling_mobilevit import MobileViTLayer

    stride = draw(st.sampled_from((1, 2)))
    block = MobileViTLayer(config, in_channels=6, out_channels=6, stride=stride, hidden_size=8, num_stages=1)
    return Drawn(block, 6, sides(draw, stride))


def timm_mobilevit(draw: Draw) -> Drawn:
    pytest.importorskip("timm")
    from timm.layers import ConvNormAct
    from timm.models.byobnet import LayerFn

    activation = draw(st.sampled_from((nn.SiLU, nn.ReLU)))
    block = timm_block(
        in_chs=6,
        transformer_dim=8,
        transformer_depth=draw(st.integers(1, 2)),
        num_heads=draw(st.sampled_from((1, 2, 4))),
        patch_size=draw(st.sampled_from((1, 2, 3))),
        mlp_ratio=draw(st.sampled_from((1.0, 2.0))),
        no_fusion=draw(st.booleans()),
        drop_path_rate=draw(st.sampled_from((0.0, 0.5))),
        attn_drop=draw(st.sampled_from((0.0, 0.5))),
        layers=LayerFn(conv_norm_act=functools.partial(ConvNormAct, act_layer=activation), act=activation),
    )
    return Drawn(block, 6, sides(draw))


def timm_efficientvit(draw: Draw) -> Drawn:
    scales = draw(st.sampled_from(((), (3,), (5,), (3, 5))))
    return Drawn(timm_attention(scales), 16, sides(draw), rounds=True)


def timm_efficientformer(draw: Draw) -> Drawn:
    pytest.importorskip("timm")
    from timm.models.efficientformer import Attention

    resolution = sides(draw)
    heads, ratio = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2)))
    block = Attention(dim=8, key_dim=draw(st.integers(1, 6)), num_heads=heads, attn_ratio=ratio, resolution=resolution)
    return Drawn(block, 8, (resolution[0] * resolution[1],))


def timm_coatnet(draw: Draw) -> Drawn:
    pytest.importorskip("timm")
    from timm.layers import RelPosBias
    from timm.models.maxxvit import Attention2d

    size = sides(draw)
    position = (lambda **given: RelPosBias(window_size=size, **given)) if draw(st.booleans()) else None
    block = Attention2d(
        dim=8,
        dim_out=draw(st.sampled_from((8, 12))),
        dim_head=4,
        bias=draw(st.booleans()),
        head_first=draw(st.booleans()),
        rel_pos_cls=position,
        attn_drop=draw(st.sampled_from((0.0, 0.5))),
    )
    return Drawn(block, 8, size)


def diffusers_dc_ae(draw: Draw) -> Drawn:
    norm = draw(st.sampled_from(("rms_norm", "batch_norm")))
    scales = draw(st.sampled_from(((), (3,), (5,))))
    residual = draw(st.booleans())
    return Drawn(dc_ae_attention(scales, norm_type=norm, residual_connection=residual), 16, sides(draw), rounds=True)


def diffusers_sana(draw: Draw) -> Drawn:
    block = sana_attention(
        bias=draw(st.booleans()), kv_heads=2, qk_norm=draw(st.sampled_from((None, "rms_norm_across_heads")))
    )
    return Drawn(block, 16, (draw(st.integers(1, 40)),), rounds=True)


def authors_mobile_former(draw: Draw) -> Drawn:
    kind = draw(st.sampled_from((mobile_former_layout.Local2Global, mobile_former_layout.Global2Local)))
    tokens = draw(st.integers(1, 4)), draw(st.sampled_from((4, 6)))
    heads, dynamic, drop = draw(st.sampled_from((1, 2, 4))), draw(st.booleans()), draw(st.sampled_from((0.0, 0.5)))
    block = kind(8, tokens[1], tokens[0], heads=heads, dynamic=dynamic, drop_path=drop)
    return Drawn(block, 8, sides(draw), tokens)


def authors_efficientvit(draw: Draw) -> Drawn:
    scales = draw(st.sampled_from(((), (3,), (5,), (3, 5))))
    return Drawn(efficientvit_layout.LiteMLA(8, 8, dim=4, scales=scales), 8, sides(draw))


def cvnets_mobilevit(draw: Draw) -> Drawn:
    block = cvnets_layout.MobileViTBlock(
        channels=6,
        dim=8,
        ffn_dim=draw(st.sampled_from((8, 12))),
        layers=draw(st.integers(1, 2)),
        heads=draw(st.sampled_from((1, 2, 4))),
        patch=draw(st.sampled_from(((2, 2), (1, 2), (3, 3)))),
        no_fusion=draw(st.booleans()),
        attn_dropout=draw(st.sampled_from((0.0, 0.5))),
        stochastic=draw(st.sampled_from((0.0, 0.5))),
    )
    return Drawn(block, 6, sides(draw))


DRAW = {
    function.__name__: function
    for function in (
        transformers_mobilevit,
        timm_mobilevit,
        timm_efficientvit,
        timm_efficientformer,
        timm_coatnet,
        diffusers_dc_ae,
        diffusers_sana,
        authors_mobile_former,
        authors_efficientvit,
        cvnets_mobilevit,
    )
}


def test_every_family_is_drawn():
    assert {family.adapter for family in (*FAMILIES, *STRUCTURES)} == set(DRAW)


# Edits: of the model and a number that says where. They return the model, which a copy may have taken the place of.


class Adapter(nn.Module):
    """As LoRA: the layer itself, and a product of two small matrices beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.base = base
        self.down, self.up = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(base.weight.dtype))
            for shape in ((base.in_features, 2), (2, base.out_features))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


class Scaled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 1.5 * value


def scaled(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(scaled(item) for item in value)
    return 1.5 * value if isinstance(value, Tensor) else value


def after_forward(module: nn.Module, given: Any, result: Any) -> Any:
    return scaled(result)


def before_forward(module: nn.Module, given: Any) -> Any:
    return scaled(given)


def after_backward(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return scaled(grad_input)


def pick(model: Model, where: int, wanted: Callable[[nn.Module], bool] = lambda module: True) -> nn.Module:
    """One of the block's modules, the block among them."""
    parts = [
        m
        for m in model.block.modules()
        if wanted(m) and not isinstance(m, (nn.ModuleList, parametrize.ParametrizationList))
    ]
    return parts[where % len(parts)] if parts else reject()


def weighted(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d)) and not parametrize.is_parametrized(module)


def hook(model: Model, where: int) -> Model:
    pick(model, where).register_forward_hook(after_forward)
    return model


def pre_hook(model: Model, where: int) -> Model:
    pick(model, where).register_forward_pre_hook(before_forward)
    return model


def backward_hook(model: Model, where: int) -> Model:
    pick(model, where).register_full_backward_hook(after_backward)
    return model


def weight_norm(model: Model, where: int) -> Model:
    parametrizations.weight_norm(pick(model, where, weighted))
    return model


def parametrization(model: Model, where: int) -> Model:
    module = pick(model, where, lambda m: any(p is not None for p in m._parameters.values()))
    names = [name for name, value in module._parameters.items() if value is not None]
    parametrize.register_parametrization(module, names[where % len(names)], Scaled())
    return model


def no_bias(model: Model, where: int) -> Model:
    pick(model, where, lambda m: m._parameters.get("bias") is not None).bias = None
    return model


def adapter(model: Model, where: int) -> Model:
    linears = [(p, n) for p in model.block.modules() for n, m in p.named_children() if type(m) is nn.Linear]
    parent, name = linears[where % len(linears)] if linears else reject()
    setattr(parent, name, Adapter(getattr(parent, name)))
    return model


def a_copy(model: Model, where: int) -> Model:
    return copy.deepcopy(model)


def pickled(model: Model, where: int) -> Model:
    return pickle.loads(pickle.dumps(model))


def loaded(model: Model, where: int) -> Model:
    state = model.state_dict()
    model.load_state_dict({n: 0.9 * v if v.is_floating_point() else v for n, v in state.items()})
    return model


def frozen(model: Model, where: int) -> Model:
    pick(model, where).requires_grad_(False)
    return model


def rounded(model: Model, where: int) -> Model:
    """There and back: the numbers are another's."""
    return model.float().double()


def in_float32(model: Model, where: int) -> Model:
    return model.float()


def other_mode(model: Model, where: int) -> Model:
    pick(model, where).train(bool(where % 2))
    return model


EDITS = (
    hook,
    pre_hook,
    backward_hook,
    weight_norm,
    parametrization,
    no_bias,
    adapter,
    a_copy,
    pickled,
    loaded,
    frozen,
    rounded,
    in_float32,
    other_mode,
)
BEFORE, AFTER, USED = "before the swap", "after it", "after a call"


@dataclass
class Case:
    """A model, what it is given, and what happens to it."""

    drawn: Drawn
    batch: int
    channels_last: bool
    training: bool
    backend: str | None
    edits: list[tuple[str, Callable[[Model, int], Model], int]]
    shard: str | None
    """Whether fully_shard comes last: over the block, or over the model too."""

    @property
    def rounds(self) -> bool:
        """Whether anything is computed in float32."""
        return self.drawn.rounds or any(edit is in_float32 for _, edit, _ in self.edits)


@st.composite
def cases(draw: Draw, family: str, shards: bool = True, edits: bool = True) -> Case:
    count = draw(st.sampled_from((0, 1, 1, 1, 2))) if edits else 0
    edit = st.tuples(st.sampled_from((BEFORE, AFTER, USED, USED)), st.sampled_from(EDITS), st.integers(0, 40))
    return Case(
        DRAW[family](draw),
        draw(st.integers(1, 2)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from((None, "reference"))),
        draw(st.lists(edit, min_size=count, max_size=count)),
        draw(st.sampled_from((None, None, None, "block", "model"))) if shards else None,
    )


def full(value: Tensor) -> Tensor:
    return getattr(value, "full_tensor", lambda: value)()


def measure(model: Model, given: list[Tensor]) -> dict[str, Tensor | None]:
    """Outputs, gradients and buffers, by name."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in given]
    model.zero_grad()
    torch.manual_seed(3)
    eligibility._logged.clear()
    result = model(*leaves)
    results = [
        r.tensor if isinstance(r, LaterTensor) else r for r in (result if isinstance(result, tuple) else (result,))
    ]
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    torch.autograd.backward(results, cotangents)
    found: dict[str, Tensor | None] = {f"output {i}": r.detach() for i, r in enumerate(results)}
    found |= {f"d input {i}": x.grad for i, x in enumerate(leaves)}
    found |= {f"d {n}": None if p.grad is None else full(p.grad) for n, p in model.named_parameters()}
    return found | {n: b.detach().clone() for n, b in model.named_buffers()}


def assert_same(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], rounds: bool = False) -> None:
    assert actual.keys() == expected.keys()
    largest = {kind: 1.0 for kind in ("o", "d", "")}
    for name, value in expected.items():
        if value is not None and value.is_floating_point() and value.numel():
            kind = name[0] if name.startswith(("output", "d ")) else ""
            largest[kind] = max(largest[kind], float(value.abs().max()))
    for name, value in expected.items():
        ours = actual[name]
        assert (ours is None) == (value is None), f"{name} is {'' if ours is None else 'not '}None"
        if value is None or ours is None:
            continue
        kind = name[0] if name.startswith(("output", "d ")) else ""
        tolerance = 2e-4 if rounds or value.dtype == torch.float32 else 1e-9
        assert ours.dtype == value.dtype, name
        torch.testing.assert_close(
            ours, value, rtol=tolerance, atol=tolerance * largest[kind], msg=lambda m, name=name: f"{name}: {m}"
        )


def pair(case: Case, shard: Callable[[nn.Module], Any]) -> tuple[Model, Model, Any, list[Tensor]]:
    """The swapped and the never swapped model, both edited; the report if it still speaks of the model; an input."""
    note(str(case))
    plain = case.drawn.model().train(case.training)
    model = copy.deepcopy(plain)
    report: Any = None
    for stage in (BEFORE, AFTER, USED):
        if stage == AFTER:
            report = swap(model, backend=case.backend)
            if not case.training and not any(when == BEFORE for when, _, _ in case.edits):
                assert report.count == 1, str(report)
        if stage == USED and any(when == USED for when, _, _ in case.edits):
            given = inputs(case, plain)
            expected = measured(plain, given)
            assert_same(measure(model, given), expected, case.rounds)
        for when, edit, where in case.edits:
            if when != stage:
                continue
            try:
                plain = edit(plain, where)
            except Exception:  # a copy of what is parametrized, and the like: not with the original either
                reject()
            model = edit(model, where)
            if report is not None and edit in (a_copy, pickled):
                report = None
    if case.shard is not None:
        try:
            shard_both = [plain.block, plain] if case.shard == "model" else [plain.block]
            for module in shard_both:
                shard(module)
        except Exception:
            reject()
        for module in [model.block, model] if case.shard == "model" else [model.block]:
            shard(module)
    return model, plain, report, inputs(case, plain)


def inputs(case: Case, plain: Model) -> list[Tensor]:
    return case.drawn.inputs(case.batch, next(plain.parameters()).dtype, case.channels_last)


def measured(plain: Model, given: list[Tensor]) -> dict[str, Tensor | None]:
    """Of the original; an edit may have made it one that does not run."""
    for module in plain.modules():
        if "attention_bias_cache" in module.__dict__:  # which goes stale when the biases are edited
            module.attention_bias_cache = {}
    try:
        return measure(plain, given)
    except Exception:
        reject()


# The same ones in every run; more are for whoever looks for faults.
EXAMPLES = int(os.environ.get("MVKERNELS_TEST_EXAMPLES", "20"))
SETTINGS = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("family", DRAW)
def test_swapped_and_edited_it_is_the_original(family, one_process):
    @SETTINGS
    @given(cases(family))
    def check(case: Case) -> None:
        model, plain, _, given_ = pair(case, one_process)
        expected = measured(plain, given_)
        assert_same(measure(model, given_), expected, case.rounds)
        if not case.edits and not case.training and case.shard is None:
            assert not eligibility._logged

    check()


def described(model: nn.Module) -> dict[str, Any]:
    """Classes and attributes of all modules, past the names of the classes that torch makes up for one module."""
    found = {}
    for name, module in model.named_modules():
        bases = [(base.__module__, base.__qualname__) for base in type(module).__mro__]
        made_up = ("Parametrized", "FSDP")
        kinds = [b for b in bases if not b[1].startswith(made_up) or b[1] == "FSDPModule"]
        found[name] = (kinds, sorted(module.__dict__), type(module.__dict__.get("processor")))
    return found


@pytest.mark.parametrize("family", DRAW)
def test_restored_it_is_the_original(family, one_process):
    @SETTINGS
    @given(cases(family))
    def check(case: Case) -> None:
        model, plain, report, given_ = pair(case, one_process)
        if report is None:
            unswap(model)
        else:
            report.restore()
        ours, theirs = described(model), described(plain)
        assert ours.keys() == theirs.keys()
        for name, what in theirs.items():
            assert ours[name] == what, (name, ours[name], what)
        assert list(model.state_dict()) == list(plain.state_dict())
        expected = measured(plain, given_)
        assert_same(measure(model, given_), expected, case.rounds)

    check()


@pytest.mark.parametrize("family", DRAW)
def test_gradients_of_many_cotangents_at_once(family):
    @SETTINGS
    @given(cases(family, shards=False, edits=False))
    def check(case: Case) -> None:
        case.batch = 1
        model, plain, _, given_ = pair(case, lambda module: None)
        generator = torch.Generator().manual_seed(5)

        def gradients(one: Model, batched: bool) -> dict[str, Tensor | None]:
            leaves = [x.detach().requires_grad_() for x in given_]
            wanted = [*leaves, *one.parameters()]
            torch.manual_seed(3)
            eligibility._logged.clear()
            result = one(*leaves)
            out = result[0] if isinstance(result, tuple) else result
            cotangents = torch.randn((3, *out.shape), generator=generator.manual_seed(5), dtype=out.dtype)
            if batched:
                grads = torch.autograd.grad(out, wanted, cotangents, is_grads_batched=True, allow_unused=True)
            else:
                each = [torch.autograd.grad(out, wanted, c, retain_graph=True, allow_unused=True) for c in cotangents]
                grads = [None if g[0] is None else torch.stack(g) for g in zip(*each)]
            return {f"d {i}": g for i, g in enumerate(grads)}

        try:
            expected = gradients(plain, batched=False)
        except ValueError:  # a batch norm has one number to learn from
            reject()
        assert_same(gradients(model, batched=True), expected, case.rounds)

    check()
