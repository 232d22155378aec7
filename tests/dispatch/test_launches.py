"""Launches go to the device of the tensors, whichever is current."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mvkernels.dispatch.launches import run


@pytest.mark.parametrize(("current", "guarded"), [(1, []), (0, [torch.device("cuda:1")])])
def test_the_device_is_made_current(current: int, guarded: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []
    seen: list[tuple[Any, ...]] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield
        entered.pop()

    tensors, floats = {"x": torch.empty(1)}, {"scale": 2.0}
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    run([lambda *given: seen.append((given, list(entered)))] * 2, tensors, floats)
    assert [inside for _, inside in seen] == [guarded] * 2 and not entered
    assert all(given[0] is tensors and given[1] is floats for given, _ in seen)


def test_on_a_cpu_no_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    seen: list[Any] = []
    run([lambda *given: seen.append(given)], {"x": torch.empty(1)}, {})
    assert len(seen) == 1
