"""Whether a model is exported is known also where Dynamo traces it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mvkernels.dispatch.exporting import exporting


class Says(torch.nn.Module):
    """Adds 1 while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1 if exporting() else 0)


def test_a_call_and_a_compiled_call_are_no_export() -> None:
    assert float(Says()(torch.zeros(()))) == 0
    torch._dynamo.reset()
    assert float(torch.compile(Says(), backend="eager", fullgraph=True)(torch.zeros(()))) == 0


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_one(strict: bool) -> None:
    assert float(torch.export.export(Says(), (torch.zeros(()),), strict=strict).module()(torch.zeros(()))) == 1
    assert not exporting()
