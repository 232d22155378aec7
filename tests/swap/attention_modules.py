"""Modules that mix tokens by attention, each in another way of saying so, and modules that do not."""

from __future__ import annotations

import functools
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa


def scores_of(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1)


def product(x: Tensor) -> Tensor:
    return scores_of(x) @ x


def wrapped(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)

    return inner


def closed_over(function):
    def inner(self, x):
        return function(self, x)

    return inner


class Mixer(nn.Module):
    """Called nothing in particular. What follows differs in how it says that it attends."""

    def __init__(self):
        super().__init__()
        self.to_out = nn.Linear(8, 8)


class Operators(Mixer):
    def forward(self, x):
        return self.to_out(torch.softmax(x @ x.mT, -1) @ x)


class Einsum(Mixer):
    def forward(self, x):
        return torch.einsum("bij,bjc->bic", F.softmax(torch.einsum("bic,bjc->bij", x, x), dim=-1), x)


class InAnotherMethod(Mixer):
    def attend(self, x):
        return torch.bmm(x.softmax(-1), x)

    def forward(self, x):
        return self.attend(x)


class InAFunction(Mixer):
    def forward(self, x):
        return product(x)


class OfItsBase(InAFunction):
    def forward(self, x):
        return super().forward(x) + x


class Decorated(Mixer):
    @wrapped
    def forward(self, x):
        return scores_of(x) @ x


class Closed(Mixer):
    @closed_over
    def forward(self, x):
        return scores_of(x) @ x


class ByALambda(Mixer):
    def forward(self, x):
        attend = lambda y: y.softmax(-1) @ y  # noqa: E731
        return attend(x)


class Renamed(Mixer):
    def forward(self, x):
        return sdpa(x, x, x)


class Kept(Mixer):
    def __init__(self, core=sdpa):
        super().__init__()
        self.core = core

    def forward(self, x):
        return self.core(x, x, x)


class OfTheClass(Mixer):
    core = staticmethod(functools.partial(sdpa, scale=1.0))

    def forward(self, x):
        return self.core(x, x, x)


class ByDefault(Mixer):
    def forward(self, x, core=sdpa):
        return core(x, x, x)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return sdpa(x, x, x)


class AutogradFunction(Mixer):
    def forward(self, x):
        return Function.apply(x)


class ByName(Mixer):
    def forward(self, x):
        return getattr(F, "scaled_dot_product_attention")(x, x, x)  # noqa: B009


class InATable(Mixer):
    ways = {"fused": sdpa}  # noqa: RUF012

    def forward(self, x):
        return self.ways["fused"](x, x, x)


class BoundToTheInstance(Mixer):
    def __init__(self):
        super().__init__()
        self.forward = MethodType(lambda self, x: product(x), self)


unscaled = functools.partial(sdpa, scale=1.0)
products = functools.partial(product)


class ByKeyword(Mixer):
    def forward(self, x, *, core=unscaled):
        return core(x, x, x)


class Alias(Mixer):
    def forward(self, x):
        return unscaled(x, x, x)


class AliasOfItsPackage(Mixer):
    def forward(self, x):
        return products(x)


class SoftmaxAsAChild(Mixer):
    def __init__(self):
        super().__init__()
        self.weigh = nn.Softmax(dim=-1)

    def forward(self, x):
        return self.weigh(torch.matmul(x, x.mT)) @ x


class LinearAttention(nn.Module):
    """No softmax and no product by name: its projections and its name say it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return q * (k * v).sum(1, keepdim=True)


class PackedMSA(LinearAttention):
    def __init__(self):
        nn.Module.__init__(self)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return q * (k * v).sum(1, keepdim=True)


class KernelAttn(nn.Module):
    """All is left to a kernel: name and heads are what there is."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.kernel = 2, lambda x: x

    def forward(self, x):
        return self.kernel(x)


LISTED = [
    Operators,
    Einsum,
    InAnotherMethod,
    InAFunction,
    OfItsBase,
    Decorated,
    Closed,
    ByALambda,
    Renamed,
    Kept,
    functools.partial(Kept, functools.partial(sdpa, scale=1.0)),
    functools.partial(Kept, product),
    OfTheClass,
    ByDefault,
    ByKeyword,
    Alias,
    AliasOfItsPackage,
    AutogradFunction,
    ByName,
    InATable,
    BoundToTheInstance,
    SoftmaxAsAChild,
    LinearAttention,
    PackedMSA,
    KernelAttn,
    functools.partial(nn.MultiheadAttention, 8, 2),
]


class Classifier(Mixer):
    def forward(self, x):
        return self.to_out(x).softmax(-1)


class Router(Mixer):
    def forward(self, x):
        return torch.topk(F.softmax(self.to_out(x), -1), 2)


class Gram(Mixer):
    def forward(self, x):
        return x @ x.mT


class Loss(Mixer):
    def forward(self, x):
        return F.log_softmax(x @ x.mT, -1)


class ChannelAttention(Mixer):
    def forward(self, x):
        return x * self.to_out(x.mean(1, keepdim=True)).sigmoid()


class AttentionStage(nn.Module):
    """Called attention, and only passes on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([ChannelAttention()])

    def forward(self, x):
        return self.layers[0](x)


class KeepsAFunction(Mixer):
    def __init__(self):
        super().__init__()
        self.act, self.normalise = F.gelu, functools.partial(F.softmax, dim=-1)

    def forward(self, x, pool=torch.mean):
        return self.normalise(self.act(pool(x, 1)))


NOT_LISTED = [Classifier, Router, Gram, Loss, ChannelAttention, AttentionStage, KeepsAFunction]
