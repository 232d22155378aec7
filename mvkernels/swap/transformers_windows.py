"""What the layers of Swin's kind in transformers share.

Such a layer takes tokens (B, H * W, C) and the size (H, W) of their map. Three Linears project the tokens. In all but
the newest of these layers the attention has a part ``self``, which attends, and a part ``output``, which projects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mvkernels.swap.eligibility import asked, drops_attention, log_once, not_plain, unusual_call
from mvkernels.swap.windows import attend_in_windows, gathered, map_of, other_windows


def not_attention(attention: Any, kinds: tuple[type[nn.Module], type[nn.Module], type[nn.Module]]) -> str:
    """An attention with ``self`` and ``output`` must be plain; ``kinds`` are its class and those of the two."""
    reason = not_plain(attention, kinds[0], "attention") or not_plain(attention.self, kinds[1], "attention.self")
    for name in ("query", "key", "value"):
        reason = reason or not_plain(getattr(attention.self, name), nn.Linear, f"attention.self.{name}")
    return (
        reason
        or not_plain(attention.self.dropout, nn.Dropout, "attention.self.dropout")
        or not_plain(attention.output, kinds[2], "attention.output")
        or not_plain(attention.output.dense, nn.Linear, "attention.output.dense")
        or not_plain(attention.output.dropout, nn.Dropout, "attention.output.dropout")
    )


def _parts(layer: Any) -> tuple[Any, Any, Tensor]:
    inner = layer.attention.self
    return inner, inner.dropout, inner.relative_position_index


def declines(
    layer: Any,
    why_not: Callable[[Any], str],
    tokens: Any,
    size: tuple[int, int],
    *,
    given: str = "",
    resize: bool = False,
    parts: Callable[[Any], tuple[Any, Any, Tensor]] = _parts,
) -> str:
    """Why a call needs the layer's original forward; empty if it does not.

    ``given``: an argument that only the original can serve. ``resize``: the original fits its window and its
    shift to this map, and they stay so for later calls; so this does it too. ``parts`` gives the module that attends,
    its dropout of probabilities and the index of its position biases.
    """
    reason = f"{given} is given" if given else _declines(layer, why_not, tokens, size, resize, parts)
    if reason:
        log_once(layer, reason)
    return reason


def _declines(
    layer: Any,
    why_not: Callable[[Any], str],
    tokens: Any,
    size: tuple[int, int],
    resize: bool,
    parts: Callable[[Any], tuple[Any, Any, Tensor]],
) -> str:
    reason = unusual_call(tokens, axes=3) or asked(why_not, layer)
    if reason:
        return reason
    attention, dropout, index = parts(layer)
    reason = drops_attention(attention, dropout)
    if not reason and size[0] * size[1] != tokens.shape[1]:
        reason = f"there are {tokens.shape[1]} tokens, but their map is {tuple(size)}"
    if reason:
        return reason
    if resize:
        layer.set_shift_and_window_size(size)
    return other_windows((layer.window_size,) * 2, (layer.shift_size,) * 2, index)


def attend(
    layer: Any,
    tokens: Tensor,
    size: tuple[int, int],
    projections: Sequence[Callable[[Tensor], Tensor]],
    bias: Tensor,
    out: Callable[[Tensor], Tensor],
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
) -> Tensor:
    """Tokens (B, H * W, C) after attention in the layer's windows; ``projections`` to query, key and value, and ``out``
    take maps (B, H, W, C)."""
    heads = bias.shape[0]
    attended = attend_in_windows(
        tokens.unflatten(1, tuple(size)),
        (layer.window_size,) * 2,
        (layer.shift_size,) * 2,
        lambda x: [map_of(project(x), heads) for project in projections],
        bias,
        out,
        scale=scale,
        logit_scale=logit_scale,
        backend=layer.mvk_backend,
    )
    return attended.flatten(1, 2)


def attend_with_parts(
    layer: Any, tokens: Tensor, size: tuple[int, int], bias: Tensor, logit_scale: Tensor | None = None
) -> Tensor:
    """:func:`attend` by an attention with ``self`` and ``output``."""
    inner, output = layer.attention.self, layer.attention.output
    return attend(
        layer,
        tokens,
        size,
        (inner.query, inner.key, inner.value),
        bias,
        lambda x: output.dropout(output.dense(x)),
        logit_scale=logit_scale,
    )


def before_norm(layer: Any, hidden_states: Tensor, size: tuple[int, int]) -> tuple[Tensor]:
    """A layer with its norms before attention and MLP, and with a table of position biases (Donut, MaskFormer)."""
    inner = layer.attention.self
    bias = gathered(inner.relative_position_bias_table.t(), inner.relative_position_index)
    attended = attend_with_parts(layer, layer.layernorm_before(hidden_states), size, bias)
    hidden_states = hidden_states + layer.drop_path(attended)
    return (hidden_states + layer.output(layer.intermediate(layer.layernorm_after(hidden_states))),)
