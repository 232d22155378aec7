"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for an operator: what it counts for the op's reference.

A formula takes the operator's arguments, with its shape for each tensor, and gives a number of FLOPs.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

Shape = Sequence[int]
Formula = Callable[..., int]

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Formula] = {}


def register(operator: Any, formula: Formula) -> None:
    """Make the counter know the formula of ``torch.ops.<namespace>.<operator>``."""
    _formulas[operator] = formula
    if _COUNTER in sys.modules:
        _tell(sys.modules[_COUNTER], {operator: formula})


def _tell(counter: Any, formulas: dict[Any, Formula]) -> None:
    def for_counter(formula: Formula) -> Formula:
        def count(*arguments: Any, out_shape: Any = None, **named: Any) -> int:
            return formula(*arguments, **named)

        return count

    for operator, formula in formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(for_counter(formula))


class _WhenImported:
    """Tells the counter when somebody imports it, and is gone then.

    Imported here it would bring in all of Triton, which takes longer than this library itself.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: Any) -> None:
                execute(module)
                _tell(module, _formulas)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())


def grouped_attention(query: Shape, value: Shape, pairs: int) -> int:
    """Two products, (N, D) x (D, M) and (N, M) x (M, Dv), in each group: maps (B, heads, D, H, W), pairs of a map."""
    b, heads, dim = query[:3]
    return 2 * b * heads * pairs * (dim + value[2])


def linear_attention(heads: int, dim: int, pixels: int) -> int:
    """In each head the products of value and key, of that and the query, and of the sum of keys and the query."""
    return 2 * heads * (2 * dim + 1) * dim * pixels


def convolution_backward(x: Shape, weight: Shape, weight_wanted: bool) -> int:
    """Of a convolution with stride 1 and an output of x's shape, by the counter's own formula."""
    registry = sys.modules[_COUNTER].flop_registry
    groups, nothing, padding = x[1] // weight[1], [0, 0], [size // 2 for size in weight[2:]]
    return registry[torch.ops.aten.convolution_backward](  # type: ignore[no-any-return]
        x, x, weight, None, [1, 1], padding, [1, 1], False, nothing, groups, [True, weight_wanted, False],
        out_val=(x, weight, None),
    )  # fmt: skip
