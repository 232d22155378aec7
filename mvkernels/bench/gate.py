"""The providers that ``mvkernels bench`` times, and the check that wrong results get no time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvkernels import testing
from mvkernels.bench import timing
from mvkernels.dispatch.registry import NotOffered, Op


@dataclass
class Provider:
    """An implementation that is timed: a backend of mvkernels, or a peer."""

    name: str
    call: Callable[..., Tensor]
    note: str = ""
    work: Callable[[], Any] | None = None
    error: float | None = None

    def fail(self, reason: str) -> None:
        self.work, self.note = None, reason


class Gate:
    """Checks the result of each provider on the arguments that are timed. Only correct providers are timed."""

    def __init__(self, op: Op, arguments: Mapping[str, Any], mode: str) -> None:
        self.op, self.arguments, self.mode = op, arguments, mode
        self.wanted = list(testing.tensors_in(arguments)) if mode != "fwd" else []
        self.yardstick, self.cotangent = testing.yardstick(op, arguments, self.wanted)

    def apply(self, providers: Sequence[Provider]) -> None:
        """Give each correct provider its ``work``, and every other one the reason in its ``note``."""
        for provider in providers:
            try:
                with _quiet():
                    actual = testing.run(provider.call, self.arguments, self.wanted, self.cotangent)
            except (ImportError, NotOffered) as error:
                provider.fail(f"skipped: {' '.join(str(error).split())[:200]}")
                continue
            except Exception as error:  # a peer that does not compile is a row that says so, not the end
                provider.fail(f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            found = self.yardstick.compare(actual)
            provider.error = max(c.error for c in found)
            wrong = [str(c) for c in found if not c.ok]
            if wrong:
                provider.fail("; ".join(wrong))
            else:
                provider.work = self._work(provider.call)

    def _work(self, call: Callable[..., Tensor]) -> Callable[[], Any]:
        # Fresh leaves for each provider: a compiled function guards on the tensors that it first met.
        tensors = testing.tensors_in(self.arguments)
        fresh = {n: v.detach().requires_grad_(n in self.wanted) for n, v in tensors.items()}
        arguments = testing.with_tensors(self.arguments, fresh)
        if self.mode == "fwd":

            def forward() -> Tensor:
                with torch.no_grad():
                    return call(**arguments)

            return forward
        leaves = [fresh[n] for n in self.wanted]
        # The gradient of the output lies as the output does, as it would from whatever follows.
        cotangent = torch.empty_like(call(**arguments).detach()).copy_(self.cotangent)

        def full() -> tuple[Tensor, ...]:
            return torch.autograd.grad(call(**arguments), leaves, cotangent)

        def forwarded() -> Callable[[], Any]:
            out = call(**arguments)
            return lambda: torch.autograd.grad(out, leaves, cotangent)

        # The backward alone needs a forward before each, which keeping one graph for all would spare: but compiled
        # code gives back what it saved, and allocating and freeing is part of what a backward costs.
        return full if self.mode == "full" else timing.Staged(forwarded)


class _quiet:
    """Keeps torch.compile's warnings off stderr while a peer is tried; its exceptions come through."""

    def __enter__(self) -> None:
        self.levels = {name: logging.getLogger(name).level for name in ("torch._dynamo", "torch._inductor")}
        for name in self.levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
