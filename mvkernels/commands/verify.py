"""``mvkernels verify``: every op, dtype and backend on this machine against the float64 reference."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mvkernels.verify import verify


def command(options: argparse.Namespace, json: Callable[[Any], None] | None) -> int:
    """Returns 1 if a result was wrong or nothing ran, else 0."""
    result = verify(options.op, options.backend, options.dtype, options.suite, options.device)
    json(result.as_dict()) if json is not None else print(result)
    return 0 if result.ok else 1
