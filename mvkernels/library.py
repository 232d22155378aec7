"""Registration of kernels as torch operators, one namespace a backend: ``torch.ops.mvkernels_cpp`` and so on.

The schema and the fake (meta) implementation of an op are written once, in Python, for all of its
backends; the C++ extension only adds its CPU implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# A Library removes its registrations when it is collected, so they live as long as the module.
_libraries: dict[str, torch.library.Library] = {}


def define(
    backend: str,
    name: str,
    schema: str,
    fake: Callable[..., Any],
    implementation: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``mvkernels_<backend>::<name><schema>`` and return the callable overload.

    ``implementation`` is a Python kernel for every device; without it, the C++ extension has it.
    ``fake`` must return the kernel's exact sizes and strides.
    """
    namespace = f"mvkernels_{backend}"
    library = _libraries.get(namespace)
    if library is None:
        library = _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if implementation is not None:
        library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, namespace), name).default
