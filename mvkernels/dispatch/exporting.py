"""Whether a model is being exported, and which ops stay in its graph as what they are, for a runtime that has kernels
for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def exporting() -> bool:
    """What ``torch.compiler.is_exporting()`` is to say.

    To Dynamo of torch 2.9 and 2.10 that function is true in every trace, so under torch.compile all calls would be the
    reference's. The flag that it returns is read as it is.
    """
    return torch.compiler._is_exporting_flag


class _Kept(threading.local):
    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()


_kept = _Kept()


@contextmanager
def keep_in_exports(*names: str) -> Iterator[None]:
    """Context manager: what this thread exports inside it has the C++ operators of these ops, not their references.

    The graph then runs only where these operators have kernels.
    """
    before = _kept.names
    _kept.names = frozenset(names)
    try:
        yield
    finally:
        _kept.names = before


def exports_reference(op: str) -> bool:
    """Whether this is an export that has the reference of an op in its graph."""
    return exporting() and op not in _kept.names


def exports_operator(op: str) -> bool:
    """Whether this is an export that keeps the operator of an op."""
    return exporting() and op in _kept.names
