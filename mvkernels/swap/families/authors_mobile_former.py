"""The two bridges of Mobile-Former, ``Local2Global`` and ``Global2Local``, in the code that the authors published.

The code is not a package, so a bridge is recognised by its structure: see :mod:`mvkernels.swap.by_structure`. Only the
attention is replaced. The projections of the tokens, the gate and the norm are called as before, so hooks and adapters
on them keep working.

Tokens are (M, B, token_dim) here: the batch is the second axis.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mvkernels.nn.mobile_former import add_attention
from mvkernels.nn.pointwise import gradient_laid_as_input
from mvkernels.ops.mobile_to_former import mobile_to_former
from mvkernels.swap import by_structure
from mvkernels.swap.eligibility import asked, class_name, drops_path, log_once, not_hooked, symbolic, unusual_call
from mvkernels.swap.later import LaterTensor
from mvkernels.swap.swapped import Swapped

_CHILDREN = ("q", "k", "v", "proj", "alpha", "layer_norm", "drop_path", "fuse")


def why_not(bridge: Any, model: nn.Module) -> str:
    """Why the fused form cannot replace this bridge of ``model``; empty if it can."""
    kind = form(bridge)
    reason = by_structure.holds_something_else(bridge, _CHILDREN) or kind.why_not_now(bridge)
    if not reason and kind is SwappedLocal2Global and _scores_are_wanted(model):
        # They would be computed twice.
        reason = "its scores are used (hyper_token_id or sel_token_id is -1), and the fused op does not return them"
    return reason or _computes_something_else(bridge, kind)


def form(bridge: nn.Module) -> Any:
    """The fused form for the direction of the bridge: only Mobile→Former has a norm."""
    return SwappedLocal2Global if "layer_norm" in bridge._modules else SwappedGlobal2Local


def _scores_are_wanted(model: nn.Module) -> bool:
    """Whether a block uses the scores of the bridge, to mix the slopes of its activation at each pixel."""
    return any(-1 in (m.__dict__.get("hyper_token_id"), m.__dict__.get("sel_token_id")) for m in model.modules())


def _computes_something_else(bridge: Any, kind: type) -> str:
    token_dim, channels = bridge.proj.in_features, bridge.proj.out_features
    if kind is SwappedLocal2Global:
        token_dim, channels = channels, token_dim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 3, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randn(bridge.token_num, 2, token_dim, generator=generator, dtype=torch.float64)
    return by_structure.computes_something_else(
        bridge,
        kind,
        [(x, tokens)],
        lambda twin, example: twin.fused(*example),
        shape=("tokens", "scores") if kind is SwappedLocal2Global else (),
        quiet=_quiet,
    )


def _quiet(bridge: Any) -> None:
    """Switch off the drop path: while it is active the original forward runs."""
    if type(bridge.drop_path) is not nn.Identity:
        bridge.drop_path.drop_prob = 0.0


class _SwappedBridge(Swapped):
    """What the two directions share."""

    @staticmethod
    def why_not_now(bridge: Any) -> str:
        """Why the fused form cannot run now. It can change after a swap, so it is checked in every call."""
        if bridge.block != "attn":
            return f"block is {bridge.block!r}, want 'attn'"
        if not bridge.remove_proj_local:
            return "it projects the map (remove_proj_local is False)"
        drop_path = bridge.drop_path
        if type(drop_path) is not nn.Identity and not hasattr(drop_path, "drop_prob"):
            return f"drop_path is a {class_name(type(drop_path))}, want a drop path with the attribute drop_prob"
        return not_hooked(drop_path, "drop_path")

    def fused(self, x: Tensor, tokens: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x is the tuple (map (B, C, H, W), tokens (M, B, token_dim))."""
        reason = self._why_not_this(x) if not args and not kwargs else "the call has other arguments than (map, tokens)"
        reason = reason or asked(self.why_not_now, self) or drops_path(self.drop_path)  # type: ignore[attr-defined]
        if reason:
            log_once(self, reason)  # type: ignore[arg-type]
            return self.mvk_original.forward(self, x, *args, **kwargs)  # type: ignore[arg-type]
        return self.fused(*x)

    def _why_not_this(self, x: Any) -> str:
        if not isinstance(x, (tuple, list)) or len(x) != 2 or not isinstance(x[1], Tensor) or x[1].dim() != 3:
            given = x if isinstance(x, (tuple, list)) else (x,)
            return symbolic(*given) or "the input is not a tuple (map, tokens)"
        return unusual_call(x[0])


class SwappedLocal2Global(_SwappedBridge):
    """A ``Local2Global`` whose attention is :func:`mvkernels.mobile_to_former`.

    Returns (tokens, scores). Only blocks with a hyper_token_id of -1 use the scores. So the scores are a
    :class:`LaterTensor`, which is computed when it is used. Under torch.compile, which removes unused results itself,
    and in a reentrant checkpoint they are computed at once.
    """

    mvk_formed_later = ("[1]",)

    @staticmethod
    def why_not_now(bridge: Any) -> str:
        if bridge._forward_hooks or bridge._backward_hooks:
            return "it has a hook, which may read the scores"
        return _SwappedBridge.why_not_now(bridge)

    def fused(self: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        query = _heads(self.q(tokens), self.num_heads)
        at_once = torch.compiler.is_compiling() or _for_a_checkpoint(x, tokens)
        x = gradient_laid_as_input(x)  # the scores give x a second gradient
        pixels = x.unflatten(1, (self.num_heads, -1))
        seen = mobile_to_former(query, pixels, scale=self.scale, backend=self.mvk_backend)
        seen = seen.permute(2, 0, 1, 3).flatten(2)
        if self.use_dynamic:
            seen = seen * (self.alpha(tokens) * self.alpha_scale)
        form = functools.partial(_scores, self.scale)
        scores = form(query, pixels) if at_once else LaterTensor(form, query, pixels)
        return self.layer_norm(tokens + self.proj(seen)), scores


class SwappedGlobal2Local(_SwappedBridge):
    """A ``Global2Local`` whose attention and sum are :func:`mvkernels.former_to_mobile`."""

    def fused(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
        value = self.proj(tokens)
        if self.use_dynamic:
            value = value * (self.alpha(tokens) * self.alpha_scale)
        key, value = _heads(self.k(tokens), self.num_heads), _heads(value, self.num_heads)
        return add_attention(x, key, value, scale=self.scale, backend=self.mvk_backend)


def _for_a_checkpoint(*given: Tensor) -> bool:
    """Whether the bridge seems to run inside torch.utils.checkpoint with use_reentrant=True.

    Such a checkpoint runs it first without a graph, and later with leaves as inputs. Both times it needs real tensors,
    or the gradient through the scores is lost.
    """
    recorded = torch.is_grad_enabled()
    return any(t.requires_grad and (t.is_leaf or not recorded) for t in given)


def _scores(scale: float, query: Tensor, pixels: Tensor) -> Tensor:
    """(B, heads, M, D) and (B, heads, D, H, W) -> (B, heads, M, H, W)."""
    return (query @ pixels.flatten(3) * scale).unflatten(-1, pixels.shape[-2:])


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """(M, B, C) -> (B, heads, M, C / heads), a view."""
    return tokens.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
