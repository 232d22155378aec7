"""Which ops stay in an exported graph as what they are, for a runtime that has kernels for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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


def is_kept(op: str) -> bool:
    """Whether exports have the operator of this op."""
    return op in _kept.names


def exports_reference(op: str) -> bool:
    """Whether this is an export that has the reference of an op in its graph."""
    return torch.compiler.is_exporting() and op not in _kept.names
