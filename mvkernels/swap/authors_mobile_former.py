"""Mobile-Former as its authors publish it: the two bridges, ``Local2Global`` and ``Global2Local``.

The code is no package: people copy its files, so that its classes have no name that could be relied on. A bridge is
recognised by what it holds, and then asked: a copy with random weights has to compute the known formula. Only the
attention is replaced; the projections of the tokens, the gate and the norm are called where they were, so
that hooks and adapters on them keep working.

Tokens are (M, B, token_dim) here, in front.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.nn.mobile_former import add_attention
from mvkernels.ops.mobile_to_former import mobile_to_former
from mvkernels.swap.eligibility import log_once, not_hooked, unusual_call

# The bridges' answers are compared in float64, on numbers of about one.
_TOLERANCE = 1e-9
_made: dict[tuple[type, type], type[nn.Module]] = {}


def why_not(bridge: Any, model: nn.Module) -> str:
    """Why the fused form cannot stand for this bridge of ``model``; empty if it can."""
    base = _base(bridge)
    reason = base.why_not_now(bridge)
    if not reason and base is SwappedLocal2Global and _scores_are_wanted(model):
        reason = "its scores are used (hyper_token_id or sel_token_id is -1), and the fused op does not form them"
    return reason or _computes_something_else(bridge, base)


def swapped_class(bridge: nn.Module) -> type[nn.Module]:
    """The class that takes the place of the bridge's own."""
    return _swapped_class(type(bridge), _base(bridge))


def _base(bridge: nn.Module) -> Any:
    """The class here for the bridge's direction: only Mobile→Former has a norm."""
    return SwappedLocal2Global if "layer_norm" in bridge._modules else SwappedGlobal2Local


def _swapped_class(original: type[nn.Module], base: type[_SwappedBridge]) -> type[nn.Module]:
    if (original, base) not in _made:
        namespace = {"mvk_original": original, "__doc__": base.__doc__, "__module__": __name__}
        _made[original, base] = type(f"Swapped{original.__name__}", (base, original), namespace)
    return _made[original, base]


def _blank(original: type[nn.Module], base: type[_SwappedBridge]) -> nn.Module:
    """What unpickling and copying begin with: a class made here cannot be found by its name."""
    kind = _swapped_class(original, base)
    return kind.__new__(kind)


def _scores_are_wanted(model: nn.Module) -> bool:
    """Whether a block mixes its activation's slopes from all tokens, pixel by pixel, by the bridge's scores."""
    return any(-1 in (m.__dict__.get("hyper_token_id"), m.__dict__.get("sel_token_id")) for m in model.modules())


def _computes_something_else(bridge: Any, base: type[_SwappedBridge]) -> str:
    """Ask the bridge's own forward, on a small example and with weights that hide nothing."""
    token_dim, channels = bridge.proj.in_features, bridge.proj.out_features
    if base is SwappedLocal2Global:
        token_dim, channels = channels, token_dim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 3, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randn(bridge.token_num, 2, token_dim, generator=generator, dtype=torch.float64)
    try:
        twin = copy.deepcopy(bridge).to_empty(device="cpu").double().eval()
        for module in twin.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        with torch.no_grad():
            for value in (*twin.parameters(), *twin.buffers()):
                value.copy_(0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
            # The fused form first: it reads settings that a forward may set.
            twin.__class__, twin.mvk_backend = swapped_class(bridge), "reference"
            actual = twin.fused(x, tokens)
            twin.__class__ = type(bridge)
            expected = twin((x, tokens))
        if isinstance(actual, tuple):
            if not isinstance(expected, tuple) or len(expected) != 2:
                return "its forward does not return (tokens, scores)"
            actual, expected = actual[0], expected[0]
        difference = float((actual - expected).abs().max())
    except Exception as error:  # whatever somebody's forward may raise
        lines = str(error).splitlines() or [type(error).__name__]
        return f"its forward cannot be compared with the known formula: {lines[0]}"
    if not difference <= _TOLERANCE:
        return "its forward computes something else than the known formula"
    return ""


class _SwappedBridge:
    """What the two directions share. Never built: :func:`mvkernels.swap` gives an existing bridge a class made from
    this and its own, and restoring gives it its own again."""

    mvk_original: type[nn.Module]
    mvk_backend: str | None = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.mvk_original, _base(self)), self.__dict__.copy()  # type: ignore[arg-type]

    @staticmethod
    def why_not_now(bridge: Any) -> str:
        """What can change after a swap, looked at in every call."""
        if bridge.block != "attn":
            return f"block is {bridge.block!r}, want 'attn'"
        if not bridge.remove_proj_local:
            return "it projects the map (remove_proj_local is False)"
        drop_path = bridge.drop_path
        if type(drop_path) is not nn.Identity:
            if not hasattr(drop_path, "drop_prob"):
                return f"drop_path is a {type(drop_path).__name__}, not known to be a drop path"
            if drop_path.training and drop_path.drop_prob:
                return f"drop path (p={drop_path.drop_prob}) is active in training mode"
        return not_hooked(drop_path, "drop_path")

    def fused(self, x: Tensor, tokens: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x is the tuple (map (B, C, H, W), tokens (M, B, token_dim))."""
        reason = self._why_not_this(x) if not args and not kwargs else "it was called with more than one tuple"
        if not reason:
            reason = self.why_not_now(self)
        if reason:
            log_once(self, reason)  # type: ignore[arg-type]
            return self.mvk_original.forward(self, x, *args, **kwargs)  # type: ignore[arg-type]
        return self.fused(*x)

    def _why_not_this(self, x: Any) -> str:
        if not isinstance(x, (tuple, list)) or len(x) != 2 or not isinstance(x[1], Tensor) or x[1].dim() != 3:
            return "the input is not a map and tokens"
        return unusual_call(x[0])


class SwappedLocal2Global(_SwappedBridge):
    """A ``Local2Global`` whose attention is :func:`mvkernels.mobile_to_former`.

    Returns (tokens, None): the scores, which only blocks with a hyper_token_id of -1 use, are not formed.
    """

    mvk_not_formed = ("[1]",)

    @staticmethod
    def why_not_now(bridge: Any) -> str:
        if bridge._forward_hooks or bridge._backward_hooks:
            return "it has a hook, which may look at the scores"
        return _SwappedBridge.why_not_now(bridge)

    def fused(self: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, None]:
        query = _heads(self.q(tokens), self.num_heads)
        pixels = x.unflatten(1, (self.num_heads, -1))
        seen = mobile_to_former(query, pixels, scale=self.scale, backend=self.mvk_backend)
        seen = seen.permute(2, 0, 1, 3).flatten(2)
        if self.use_dynamic:
            seen = seen * (self.alpha(tokens) * self.alpha_scale)
        return self.layer_norm(tokens + self.proj(seen)), None


class SwappedGlobal2Local(_SwappedBridge):
    """A ``Global2Local`` whose attention and sum are :func:`mvkernels.former_to_mobile`."""

    def fused(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
        value = self.proj(tokens)
        if self.use_dynamic:
            value = value * (self.alpha(tokens) * self.alpha_scale)
        key, value = _heads(self.k(tokens), self.num_heads), _heads(value, self.num_heads)
        return add_attention(x, key, value, scale=self.scale, backend=self.mvk_backend)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """(M, B, C) -> (B, heads, M, C / heads), a view."""
    return tokens.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
