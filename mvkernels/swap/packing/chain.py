"""Modules that call others one after the other: one look at all of them before the first call, none between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mvkernels.swap.packing.kinds import SAME, following
from mvkernels.swap.packing.plans import Keep, Run, fits, run_of_part
from mvkernels.swap.swapped import Swapped


class Chain(Swapped):
    """Whatever calls its parts in turn, each with the result of the one before."""

    mvk_calls = None

    @staticmethod
    def mvk_chain(module: Any) -> Sequence[Any]:
        """The parts in the order of the calls."""
        raise NotImplementedError

    @classmethod
    def mvk_why_not(cls, module: nn.Module) -> str:
        """Why looking once saves nothing; empty if it does."""
        parts = cls.mvk_chain(module)
        return "" if any(getattr(part, "mvk_packs", False) for part in parts) else "its parts have no plans"

    def mvk_sizes(self: Any) -> tuple[int, int] | None:
        """The channels of the last part that has others than its input, and the strides together."""
        outputs, stride = SAME, None
        for part in self.mvk_chain(self):
            if type(part) is nn.Identity:
                continue
            sizes = part.mvk_sizes() if isinstance(part, Swapped) else None
            if sizes is None:
                return None
            outputs, stride = sizes[0] or outputs, sizes[1] if stride is None else following(stride, sizes[1])
            if stride is None:
                return None
        return None if stride is None else (outputs, stride)

    def mvk_plan(self: Any, keep: Keep) -> Run | None:
        """The parts' plans, and as modules those parts that have none."""
        parts = self.mvk_chain(self)
        runs = [run_of_part(part) for part in parts]
        if not any(runs):
            return None
        if all(runs):
            return _composed(runs)
        steps = [*zip(parts, runs)]

        def run(x: Tensor) -> Tensor:
            fit = True
            for part, known in steps:
                if known is None or not fit:
                    x = part(x)
                    fit = fits(x)
                else:
                    x = known(x)
            return x

        return run


def _composed(runs: Sequence[Any]) -> Run:
    def run(x: Tensor) -> Tensor:
        for known in runs:
            x = known(x)
        return x

    return run


class PackingSequential(Chain):
    """A ``Sequential``, or a class derived from it with the same forward."""

    @staticmethod
    def mvk_chain(module: Any) -> Sequence[Any]:
        """The children of the sequence."""
        return [*module._modules.values()]
