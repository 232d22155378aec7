"""Exports of references with sizes left open, in every dtype: also where a window does not divide them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import mvkernels


class Op(nn.Module):
    def __init__(self, op: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.settings = getattr(mvkernels, op), settings

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.op(query, key, value, **self.settings, backend="reference")


def maps(last: bool, height: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2, height, width, 2, 5, generator=generator).to(dtype).permute(0, 3, 4, 1, 2) for _ in range(3)]
    return made if last else [each.contiguous() for each in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("op", "settings"),
    [
        ("window_attention", {"window_size": (3, 4)}),
        ("window_attention", {"window_size": (3, 4), "shift": (1, 2), "bias": True}),
        ("window_attention", {"window_size": (3, 4), "bias": True}),
        ("patch_attention", {"patch_size": 1}),
        ("patch_attention", {"patch_size": 3}),
    ],
    ids=str,
)
def test_other_sizes_after_the_export(op: str, settings: dict[str, Any], last: bool, dtype: torch.dtype) -> None:
    bias = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    module = Op(op, settings | ({"bias": bias} if "bias" in settings else {}))
    open_ = {3: Dim.DYNAMIC, 4: Dim.DYNAMIC}
    example = maps(last, 9, 12, dtype)
    with torch.no_grad():
        exported = torch.export.export(module, tuple(example), dynamic_shapes=(open_, open_, open_)).module()
        for size in ((9, 12), (12, 15)) if op == "patch_attention" else ((9, 12), (7, 9), (10, 21)):
            other = maps(last, *size, dtype)
            torch.testing.assert_close(exported(*other), module(*other))
