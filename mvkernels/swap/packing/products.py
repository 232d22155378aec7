"""Modules that are two products with an activation between, and blocks that end with one, on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.swap.eligibility import class_of, not_dense, not_layer_norm, not_plain
from mvkernels.swap.folding import elementwise
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.kinds import SAME, of_convolution, sizes_of
from mvkernels.swap.packing.layers import Multiply, Part
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.packing.pooling import gate_of, pooled_sum
from mvkernels.swap.swapped import Swapped


class Products(Swapped):
    """An MLP whose activations are in its products, or a single product."""

    mvk_axes: int | None = None

    @staticmethod
    def mvk_products(module: Any) -> Sequence[Part]:
        """Its Linears or 1 x 1 convolutions with what is called after them; empty if it is more than they are."""
        raise NotImplementedError

    @staticmethod
    def mvk_last(module: Any) -> Any:
        """The layer of its last product."""
        return module.fc2

    @staticmethod
    def mvk_norm(module: Any) -> Any:
        """The LayerNorm before the first product, or None."""
        return None

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a module is no two products; empty if it is."""
        parts = cls.mvk_products(module)
        return not_products(parts) or not_norm(cls.mvk_norm(module), parts[0][0])

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """Those of the last product, after others that keep the sides."""
        return sizes_of(self.mvk_last(self))

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The two products."""
        return products(self.mvk_products(self), keep, self.mvk_norm(self))


def not_products(parts: Sequence[Part]) -> str:
    """Why there is no op for these, in whatever state they are; empty if there is."""
    for layer, _, after in parts:
        if class_of(layer) is not nn.Linear and (
            class_of(layer) is not nn.Conv2d or of_convolution(layer) != "pointwise"
        ):
            return "it is not made of Linears or 1 x 1 convolutions"
        if elementwise.activation_of(m for m in after if not isinstance(m, nn.Dropout)) is None:
            return "its activation is not known"
    return "" if parts else "it has more in it than its products"


def products(parts: Sequence[Part], keep: Keep, norm: Any = None, scale: Tensor | None = None) -> Multiply | None:
    """These products in turn, after a LayerNorm if there is one, with the factors ``scale`` of the channels that come
    out; None if there is no op for one, or not for its present state."""
    if not parts or not_norm(norm, parts[0][0]):
        return None
    found = []
    for i, (layer, batch_norm, after) in enumerate(parts):
        last = i == len(parts) - 1
        product = layers.multiplication(layer, keep, after, None if i else norm, batch_norm, scale if last else None)
        if product is None:
            return None
        found.append(product)
    *first, narrow = found

    def run(x: Tensor, residual: Tensor | None = None, *gate: Tensor) -> Tensor:
        for product in first:
            x = product(x, None, *gate)
            gate = ()
        return narrow(x, residual, *gate)

    return run


def not_norm(norm: Any, layer: Any) -> str:
    """Why the LayerNorm cannot be in the product with this Linear; empty if it can, or if there is none."""
    if norm is None:
        return ""
    reason = "" if class_of(layer) is nn.Linear else "it is not over the channels"
    reason = reason or not_layer_norm(norm, layer.weight.shape[1], "the norm")
    tensors = [t for t in (norm.weight, norm.bias) if t is not None] if not reason else []
    return reason or ("it is not float32" if any(t.dtype != torch.float32 for t in tensors) else "")


def active(path: Any, *kinds: type[nn.Module]) -> str:
    """Why a drop path does something now; empty if it is at rest, or none at all."""
    kind = class_of(path) if class_of(path) in (nn.Identity, *kinds) else nn.Identity
    return not_plain(path, kind, "the drop path") or ("it may drop paths" if path.training else "")


class ScaledBlock(Swapped):
    """A block of two sums: a token mixer and two products, each with its drop path and the factors of its channels."""

    mvk_axes: int | None = None
    mvk_calls: tuple[str, ...] = ("norm1", "token_mixer")
    mvk_mixer: str = "token_mixer"
    mvk_norms: tuple[str, str] = ("norm1", "norm2")

    @staticmethod
    def mvk_products(block: Any) -> Sequence[Part]:
        """The products of the second sum; empty if it has more in it."""
        raise NotImplementedError

    @staticmethod
    def mvk_last(block: Any) -> Any:
        """The layer of its last product."""
        return block.mlp.fc2

    @staticmethod
    def mvk_scale(block: Any, i: int) -> Tensor | str | None:
        """The factors (C,) of the channels of sum ``i``, None if there are none, or why they are not that."""
        raise NotImplementedError

    @staticmethod
    def mvk_paths(block: Any) -> str:
        """Why a drop path does something now; empty if none does."""
        raise NotImplementedError

    @staticmethod
    def mvk_pools(block: Any) -> bool:
        """Whether the mixer is the mean of 3 x 3 neighbours minus the pixel."""
        return False

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why such a block is more than two sums; empty if it is not."""
        scales = [cls.mvk_scale(module, i) for i in (1, 2)]
        return next((s for s in scales if isinstance(s, str)), "") or not_products(cls.mvk_products(module))

    def mvk_sizes(self: Any) -> tuple[int, int]:
        """The input's, as a map or as rows."""
        return SAME, sizes_of(self.mvk_last(self))[1]

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """Norms and the token mixer as modules, a LayerNorm before a Linear in its product."""
        first, last = (self.mvk_scale(self, i) for i in (1, 2))
        if isinstance(first, str) or isinstance(last, str) or self.mvk_paths(self):
            return None
        if any(s is not None and (s.dtype != torch.float32 or not_dense(s, "the scale")) for s in (first, last)):
            return None
        parts = self.mvk_products(self)
        mixer, (norm1, norm2) = getattr(self, self.mvk_mixer), (getattr(self, name, None) for name in self.mvk_norms)
        inside = norm2 is not None and bool(parts) and not not_norm(norm2, parts[0][0])
        feed = products(parts, keep, norm2 if inside else None, last)
        if feed is None:
            return None
        norm2 = None if inside else norm2
        tokens = class_of(parts[0][0]) is nn.Linear
        factors = first if first is None or tokens else first.view(-1, 1, 1)

        def mix(x: Tensor) -> Tensor:
            mixed = mixer(x if norm1 is None else norm1(x))
            return x + mixed if factors is None else torch.addcmul(x, mixed, factors)

        def multiply(x: Tensor) -> Tensor:
            return feed(x if norm2 is None else norm2(x), x)

        pooled = pooled_sum(norm1, first, keep) if self.mvk_pools(self) else None
        gate = None if tokens else gate_of(norm2)
        if pooled is None and gate is None:
            return lambda x: multiply(mix(x))

        def run(x: Tensor) -> Tensor:
            x = mix(x) if pooled is None or elementwise.not_fit(x) else pooled(x)
            return multiply(x) if gate is None or elementwise.not_fit(x) else feed(x, x, gate(x))

        return run


def convolutions(parts: Sequence[Part], keep: Keep) -> Run | None:
    """Convolutions that follow each other; None if there is no op for one, or not for its present state."""
    found = [layers.convolution(part, keep) for part in parts]
    if not parts or not all(found):
        return None

    def run(x: Tensor) -> Tensor:
        for convolve in found:
            x = convolve(x)  # type: ignore[misc]
        return x

    return run
