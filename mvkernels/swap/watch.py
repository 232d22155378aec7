"""Whether a swapped block has changed since it was last examined, in microseconds.

Examining a block attribute by attribute takes a quarter of a millisecond; comparing a snapshot of all that could have
changed takes a tenth of that. The snapshots are not stored in the blocks, so copying and pickling a block do not
include them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

Examine = Callable[[Any], "tuple[str, list[dict[str, Any]]]"]


# Settings of attention modules, of convolutions and norms, and methods that the fused path does the work of.
_SETTINGS = frozenset(
    (
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "groups",
        "normalized_shape",
        "num_attention_heads",
        "attention_head_size",
        "all_head_size",
        "num_heads",
        "head_dim",
        "scale",
        "scaling",
        "fused_attn",
        "coreml_compatible",
        "channel_first",
    )
)
_METHODS = frozenset(("forward", "unfolding", "folding", "forward_spatial"))


class _Snapshot:
    """The parts of some modules that decide whether they may be fused; equal while nothing has changed."""

    def __init__(self, block: nn.Module, roots: Sequence[nn.Module]) -> None:
        self.modules = [m for root in roots for m in root.modules()]
        # Dictionaries of the modules and not the block itself, which the snapshot must not keep alive.
        self.attributes = [m.__dict__ for m in self.modules]
        self.containers = [block.__dict__] + [a for a in self.attributes if a["_modules"]]
        self.parameters = [a["_parameters"] for a in self.attributes if a["_parameters"]]
        self.kind = getattr(type(block), "mvk_original", type(block))
        self.settings = [(a, name) for a in self.attributes for name in sorted(_SETTINGS.intersection(a))]
        self.rates = [(a, name) for a in self.attributes for name in ("p", "drop_prob") if name in a]
        self.state = self.read()

    def read(self) -> tuple[Any, ...]:
        return (
            [*map(type, self.modules)],
            [type(m).forward for m in self.modules],
            [getattr(self.kind, name, None) for name in _METHODS],
            # whether there are hooks, and not which: `not` makes a bool of a dictionary
            [
                not (a["_forward_hooks"] or a["_forward_pre_hooks"] or a["_backward_hooks"] or a["_backward_pre_hooks"])
                for a in self.attributes
            ],
            [not _METHODS.isdisjoint(a) for a in (*self.attributes, self.containers[0])],
            [a.get(name) for a, name in self.settings],
            [a.get(name) for a, name in self.rates],
            [a["training"] for a in self.attributes],
            [tuple(a["_modules"].values()) for a in self.containers],
            [
                None if p is None else (type(p), p.dtype, p.device, p.shape)
                for parameters in self.parameters
                for p in parameters.values()
            ],
        )


@dataclass
class _Examined:
    snapshot: _Snapshot
    reason: str
    layers: list[dict[str, Any]]


_examined: WeakKeyDictionary[nn.Module, _Examined] = WeakKeyDictionary()


def examine(block: nn.Module, roots: Sequence[str], examiner: Examine) -> tuple[str, list[dict[str, Any]]]:
    """``examiner(block)``, or its last result if nothing in the children named ``roots`` has changed since.

    The examiner returns the reason against fusing (empty if there is none) and the arguments of each layer.
    """
    if torch.compiler.is_compiling():
        return examiner(block)  # traced and guarded, attribute by attribute
    known = _examined.get(block)
    if known is not None and known.snapshot.read() == known.snapshot.state:
        return known.reason, known.layers
    reason, layers = examiner(block)
    children = [block._modules.get(name) for name in roots]
    snapshot = _Snapshot(block, [child for child in children if isinstance(child, nn.Module)])
    _examined[block] = _Examined(snapshot, reason, layers)
    return reason, layers
