"""Whole networks on the C++ kernels against the reference, by the criterion of the ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mvkernels


def need_cpp() -> None:
    """Skip where patch_attention has no C++ kernel."""
    able, reason = mvkernels.can_run("patch_attention", "cpp", *[torch.randn(1, 1, 4, 1, 5)] * 3, patch_size=1)
    if not able:
        pytest.skip(reason)


def backends_agree(build: Callable[[str], nn.Module], x: Tensor, classes: int) -> dict[str, Tensor]:
    """Logits and gradients of every parameter: float32 on cpp errs at most 3 times as much as on the reference.

    An error is the largest of a tensor over its largest value, and the worst tensor counts: single small tensors are a
    matter of luck. ``build(backend)`` makes the same network each time. Returns the float64 gradients by name.
    """
    need_cpp()
    cotangent = torch.randn(len(x), classes)
    found: dict[str, list[Tensor]] = {}
    names: list[str] = []
    for run, dtype in (("exact", torch.float64), ("reference", torch.float32), ("cpp", torch.float32)):
        model = build("reference" if run == "exact" else run).to(dtype)
        names = [name for name, _ in model.named_parameters()]
        out = model(x.to(dtype))
        gradients = torch.autograd.grad(out, list(model.parameters()), cotangent.to(dtype))
        found[run] = [out.detach().double(), *(g.double() for g in gradients)]

    def worst(run: str, tensors: slice) -> float:
        pairs = zip(found[run][tensors], found["exact"][tensors])
        # A gradient that is zero but for rounding has no scale of its own.
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)

    for what, tensors, factor in (("values", slice(0, 1), 2), ("gradients", slice(1, None), 3)):
        error, floor = worst("cpp", tensors), worst("reference", tensors)
        assert error <= factor * floor + 1e-6, f"{what}: {error:.2e} against {floor:.2e}"
    return dict(zip(names, found["exact"][1:]))
