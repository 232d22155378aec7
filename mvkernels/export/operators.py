"""The ops as torch operators ``mvkernels::<op>`` that ExecuTorch has kernels for: csrc/executorch.

ExecuTorch writes a call of an operator into a file as one of its out variant, and looks for a kernel of that name.
Imported by exports alone, for which the operators are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvkernels.export.nodes import DOMAIN, NODES, Placed, operator_of
from mvkernels.export.views import Place

# The type of an argument in a schema, and of the numbers after it.
_TYPES = {
    "map": ("Tensor", "int[] {}_place"),
    "channels": ("Tensor", "int {}_channels_last"),
    "tensor": ("Tensor", ""),
    "optional": ("Tensor?", ""),
    "list": ("Tensor[]", ""),
    "int": ("int", ""),
    "float": ("float", ""),
}

# It removes its registrations when it is collected, so it lives as long as the module.
_library = torch.library.Library(DOMAIN, "FRAGMENT")


def executorch_node(op: str, arguments: dict[str, Any], sizes: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """A call of ``mvkernels::<op>``."""
    flat: list[Any] = []
    for given in arguments.values():
        flat += given if isinstance(given, Placed) else [given]
    found = getattr(getattr(torch.ops, DOMAIN), op).default(*flat)
    assert isinstance(found, Tensor)
    return found


def _map_in(tensor: Tensor, where: list[int]) -> Tensor:
    """The map (B, heads, dim, H, W) at a place in a tensor, a view."""
    p = Place(*where)
    channels_first = tensor.permute(0, 3, 1, 2) if p.channels_last else tensor
    b, _, height, width = channels_first.shape
    of_b, of_c, of_y, of_x = channels_first.stride()
    strides = (of_b, p.next_head * of_c, p.next * of_c, of_y, of_x)
    return channels_first.as_strided(
        (b, p.heads, p.dim, height, width), strides, tensor.storage_offset() + p.first * of_c
    )


def _define(op: str) -> None:
    kinds = [argument.split(":") for argument in NODES[op][1].split()]
    schema: list[str] = []
    for name, kind in kinds:
        of_tensor, of_numbers = _TYPES[kind]
        schema += [f"{of_tensor} {name}", of_numbers.format(name)]
    listed = ", ".join(each for each in schema if each)

    def functional(*given: Any) -> Tensor:
        """The op by its C++ operator, for fake tensors too; dense as the kernel leaves it."""
        rest, arguments = list(given), []
        last = False
        for number, (_, kind) in enumerate(kinds):
            value = rest.pop(0)
            if kind == "map":
                where = rest.pop(0)
                value = _map_in(value, where)
                last = bool(where[0] and where[5] == 1) if number == 0 else last
            elif kind == "channels":
                last = bool(rest.pop(0))
                value = value.permute(0, 3, 1, 2) if last else value
            arguments.append(value)
        out: Tensor = operator_of(op)(*arguments)
        if op == "mobile_to_former":
            return out
        out = out.flatten(1, 2) if out.dim() == 5 else out
        return (out.permute(0, 2, 3, 1) if last else out).contiguous()

    def out_variant(*given: Any, out: Tensor) -> Tensor:
        return out.copy_(functional(*given))

    _library.define(f"{op}({listed}) -> Tensor")
    _library.define(f"{op}.out({listed}, *, Tensor(a!) out) -> Tensor(a!)")
    _library.impl(op, functional, "CompositeExplicitAutograd")
    _library.impl(f"{op}.out", out_variant, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{DOMAIN}::{op}", functional, lib=_library)


for _op in NODES:
    _define(_op)
