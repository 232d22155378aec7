"""The blocks of Mobile-Former in the code that its authors published, on packed weights.

The code is not a package, so a block is recognised by its structure: see :mod:`mvkernels.swap.by_structure`. What it
computes is tested when it is swapped, and again by the first plan after one of its settings has changed. The bridges
and the layers of the tokens are called as modules. Maps come out laid out as they went in: somebody may rely on it.

Blocks take and give a tuple (map, tokens), the tokens as (M, B, token_dim).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from mvkernels.swap import by_structure
from mvkernels.swap.eligibility import asked, class_of, not_hooked
from mvkernels.swap.packing import layers
from mvkernels.swap.packing.blocks import not_own
from mvkernels.swap.packing.layers import Part
from mvkernels.swap.packing.own_mobile import not_halves, order_of, slopes, widened
from mvkernels.swap.packing.plans import Keep, Run
from mvkernels.swap.swapped import Swapped

_BRIDGES = ("local_global", "global_block", "global_local")
_ALWAYS = ("act", "drop_path", *_BRIDGES)
_TESTED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""The settings with which a block has been found to compute the known formula."""


class _Block(Swapped):
    """What the blocks share."""

    mvk_beside = (3,)
    mvk_children: tuple[str, ...] = ()
    """What such a block may hold."""

    @staticmethod
    def mvk_tensors(*given: Any) -> Sequence[Any]:
        """The map and the tokens, these with the batch in front."""
        pair = given[0] if len(given) == 1 else None
        if type(pair) is not tuple or len(pair) != 2 or not isinstance(pair[1], Tensor) or pair[1].dim() != 3:
            return given
        return pair[0], pair[1].transpose(0, 1)

    @classmethod
    def mvk_not_parts(cls, block: Any) -> str:
        """Why its convolutions are others; empty if they are not."""
        raise NotImplementedError

    @staticmethod
    def mvk_formula(block: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the plan computes, by the modules."""
        raise NotImplementedError

    @classmethod
    def mvk_why_not(cls, module: Any) -> str:
        """Why such a block is another; empty if it is the known one."""
        kind: Any = class_of(module)
        if len(inspect.signature(kind.forward).parameters) != 2:
            return "its forward takes other arguments"
        return (
            by_structure.holds_something_else(module, cls.mvk_children)
            or asked(cls.mvk_not_parts, module)
            or _computes_something_else(module, cls)
        )

    def mvk_whole_plan(self, keep: Keep) -> Run | None:
        """Of a map and tokens (M, B, token_dim)."""
        raise NotImplementedError

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """If nothing but the bridges has a hook or a forward of its own, and nothing drops."""
        called = {part for name in _BRIDGES if name in self._modules for part in self._modules[name].modules()}
        for name, part in self.named_modules():
            rests = part in called or not (part.training or (name and not_hooked(part, name)))
            if not rests:
                return None
        changed = by_structure.holds_something_else(self, self.mvk_children) or asked(self.mvk_not_parts, self)
        if changed or _computes_something_else(self, self.mvk_unpacked):
            return None
        whole = self.mvk_whole_plan(keep)
        if whole is None:
            return None

        def run(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            channels_last = x.is_contiguous(memory_format=torch.channels_last)
            out, tokens = whole(x, tokens.transpose(0, 1))
            return out if channels_last else out.contiguous(), tokens

        return run


def _computes_something_else(block: Any, form: Any) -> str:
    """Tested once for the block's settings."""
    settings = _settings(block)
    if _TESTED.get(block) == settings:
        return ""
    conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    token_dim, token_num = 8, 3
    if "local_global" in block._modules:
        token_dim, token_num = block.local_global.proj.out_features, block.local_global.token_num
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, conv.in_channels, 3, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randn(token_num, 2, token_dim, generator=generator, dtype=torch.float64)
    reason = by_structure.computes_something_else(
        block,
        form,
        [(x, tokens)],
        lambda twin, example: form.mvk_formula(twin, *example),
        shape=("map", "tokens"),
        quiet=_quiet,
    )
    if not reason:
        _TESTED[block] = settings
    return reason


def _settings(block: nn.Module) -> list[Any]:
    """All that may decide what the block computes, but for its tensors and the classes of its parts."""
    found: list[Any] = []
    for name, part in block.named_modules():
        values = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training"}
        plain = {k: v if isinstance(v, (int, float, str, tuple)) or v is None else repr(v) for k, v in values.items()}
        kind: Any = class_of(part)
        found.append((name, kind, kind.forward, plain))
    return found


def _quiet(block: Any) -> None:
    """Switch off the drop paths, which are at rest where a plan is made."""
    for part in block.modules():
        if hasattr(part, "drop_prob"):
            part.drop_prob = 0.0


def _part(sequence: Any) -> Part | None:
    """A convolution and its norm in a ``Sequential``, and perhaps an empty one after them; None if there is more."""
    if not_own(sequence, nn.Sequential) or not 2 <= len(sequence) <= 3:
        return None
    conv, norm, *rest = sequence
    return None if any(_not_empty(part) for part in rest) else (conv, norm, ())


def _not_empty(part: Any) -> str:
    return not_own(part, nn.Sequential) or ("it has more in it" if len(part) else "")


def _parts(block: Any, *names: str) -> list[Part]:
    """Empty if one has more in it."""
    found = [_part(getattr(block, name)) for name in names]
    return [part for part in found if part is not None] if None not in found else []


def _not_hyper(*hypers: Any) -> str:
    """They must take the same token."""
    tokens = {hyper.sel_token_id for hyper in hypers}
    if len(tokens) != 1 or not all(type(token) is int and token >= 0 for token in tokens):
        return "its slopes are not those of one token"
    return "" if all(len(hyper.hyper) == 4 for hyper in hypers) else "its slopes come from other layers"


def _of_token(hypers: Sequence[Any], orders: Sequence[Tensor | None], keep: Keep) -> Run | None:
    """The slopes of each for tokens (M, B, token_dim)."""
    made = slopes(*((h.hyper[0], h.hyper[2], order) for h, order in zip(hypers, orders)), keep=keep)
    token = hypers[0].sel_token_id
    return None if made is None else lambda tokens: made(tokens[token])


def _dynamic(x: Tensor, hyper: Any, tokens: Tensor) -> Tensor:
    """The dynamic ReLU of a map, by the formula."""
    squeeze, _, widen, _ = hyper.hyper
    hidden = relu(linear(tokens[hyper.sel_token_id], squeeze.weight, squeeze.bias))
    first, second = (linear(hidden, widen.weight, widen.bias) / 3)[..., None, None].chunk(2, 1)
    return torch.maximum((first + 1).clamp(0, 2) * x, second.clamp(-1, 1) * x)


def _with_bridges(
    block: Any, convolve: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A block whose convolutions ``convolve`` does, of a map and tokens (M, B, token_dim)."""
    into, between, out = (getattr(block, name) for name in _BRIDGES)

    def run(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = between(into((x, tokens))[0])
        return out((convolve(x, tokens), tokens)), tokens

    return run


class PackingDnaBlock(_Block):
    """A ``DnaBlock``, whose convolutions are an inverted residual with two dynamic ReLUs."""

    mvk_children = (*(f"{name}{i}" for name in ("conv", "hyper", "act") for i in range(1, 4)), *_ALWAYS)

    @classmethod
    def mvk_not_parts(cls, block: Any) -> str:
        """They must be an inverted residual."""
        parts = _parts(block, "conv1", "conv2", "conv3")
        known = len(parts) == 3 and layers.inverted(parts)
        return _not_hyper(block.hyper1, block.hyper2) if known else "its convolutions are others"

    @staticmethod
    def mvk_formula(block: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes of each dynamic ReLU come from a token after the bridge."""

        def convolve(x: Tensor, tokens: Tensor) -> Tensor:
            out = _dynamic(block.conv1(x), block.hyper1, tokens)
            out = block.conv3(_dynamic(block.conv2(out), block.hyper2, tokens))
            return out + x if block.identity else out  # type: ignore[no-any-return]

        return _with_bridges(block, convolve)(x, tokens)

    def mvk_whole_plan(self: Any, keep: Keep) -> Run | None:
        """The convolutions in one kernel."""
        of_token = _of_token((self.hyper1, self.hyper2), (None, None), keep)
        convolve = layers.inverted_residual_of(_parts(self, "conv1", "conv2", "conv3"), bool(self.identity), keep)
        if of_token is None or convolve is None:
            return None
        return _with_bridges(self, lambda x, tokens: convolve(x, *of_token(tokens)))


class PackingDnaBlock3(_Block):
    """A ``DnaBlock3``, which halves the map: two convolutions that widen, each with a product after it."""

    mvk_children = (*(f"{name}{i}" for name in ("conv", "hyper", "act") for i in range(1, 5)), *_ALWAYS)

    @classmethod
    def mvk_not_parts(cls, block: Any) -> str:
        """They must be two that widen and two products."""
        parts = [conv for conv, _, _ in _parts(block, "conv1", "conv2", "conv3", "conv4")]
        if len(parts) != 4 or getattr(block, "identity", False):
            return "its convolutions are others"
        return not_halves(*parts[:2]) or not_halves(*parts[2:]) or _not_hyper(block.hyper1, block.hyper3)

    @staticmethod
    def mvk_formula(block: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes of each dynamic ReLU come from a token after the bridge."""

        def convolve(x: Tensor, tokens: Tensor) -> Tensor:
            short = block.conv2(_dynamic(block.conv1(x), block.hyper1, tokens))
            return block.conv4(_dynamic(block.conv3(short), block.hyper3, tokens)) + short  # type: ignore[no-any-return]

        return _with_bridges(block, convolve)(x, tokens)

    def mvk_whole_plan(self: Any, keep: Keep) -> Run | None:
        """Each half in one kernel."""
        parts = _parts(self, "conv1", "conv2", "conv3", "conv4")
        orders = [order_of(parts[i][0]) for i in (0, 2)]
        of_token = _of_token((self.hyper1, self.hyper3), orders, keep)
        first, second = widened(parts[0], parts[1], False, keep), widened(parts[2], parts[3], True, keep)
        if of_token is None or first is None or second is None:
            return None

        def convolve(x: Tensor, tokens: Tensor) -> Tensor:
            before, after = of_token(tokens)
            out: Tensor = second(first(x, before), after)
            return out

        return _with_bridges(self, convolve)


class PackingConvBlock(_Block):
    """The first block, a convolution that widens and a product; tokens pass by."""

    mvk_children = ("conv", "drop_path")

    @classmethod
    def mvk_not_parts(cls, block: Any) -> str:
        """They must be one that widens and a product."""
        return not_halves(*(conv for conv, _, _ in _halves(block)))

    @staticmethod
    def mvk_formula(block: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """With the activation that the block has."""
        (depthwise, norm, (act,)), (project, last, _) = _halves(block)
        out = last(project(act(norm(depthwise(x)))))
        return out + x if block.identity else out, tokens

    def mvk_whole_plan(self: Any, keep: Keep) -> Run | None:
        """In one kernel."""
        first, last = _halves(self)
        run = widened(first, last, bool(self.identity), keep)
        return None if run is None else lambda x, tokens: (run(x), tokens)


def _halves(block: Any) -> list[Part]:
    sequence = block.conv
    if not_own(sequence, nn.Sequential) or len(sequence) != 6 or _not_empty(sequence[3]):
        raise AttributeError("its convolutions are others")
    depthwise, norm, act, _, project, last = sequence
    return [(depthwise, norm, (act,)), (project, last, ())]


def form(block: nn.Module) -> type[Swapped]:
    """The packing form of a block of this structure."""
    if "conv" in block._modules:
        return PackingConvBlock
    return PackingDnaBlock3 if "conv4" in block._modules else PackingDnaBlock
