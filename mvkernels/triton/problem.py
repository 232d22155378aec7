"""What a launch is planned from: a call without its data. Needs no Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mvkernels.triton import configs
from mvkernels.triton.configs import Device
from mvkernels.triton.maps import Shape

P = TypeVar("P", bound="Problem")

LOG2E = 1.4426950408889634
"""What a scale is multiplied by for exponentials that are powers of two."""
PARTS_BYTES = 64 << 20
"""Of partial sums that one launch may leave: small beside any map that makes so many."""


def precision_of(dtype: torch.dtype, device_type: str) -> str:
    """How products of inputs are taken: "tf32" where the user lets float32 products round, else "ieee"."""
    return "tf32" if dtype == torch.float32 and configs.tf32_allowed(device_type) else "ieee"


def key_dtype(dtype: torch.dtype, precision: str) -> str:
    """The dtype as configurations have it: ``f16``, ``bf16``, ``f32``, ``tf32``, ``f64``."""
    names = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}
    return names.get(dtype, "f32" if precision == "ieee" else "tf32")


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """A call without its data: all that kernels and their configurations may depend on. Ops add fields of their own."""

    shape: Shape
    """Of the map that the others follow: (B, heads, head_dim, H, W), or (B, C, H, W)."""
    strides: tuple[tuple[str, Shape], ...]
    """Of the tensors that are read or written in place, by name."""
    dtype: torch.dtype
    precision: str
    device: Device

    @classmethod
    def of(
        cls: type[P], map_: torch.Tensor, named: Sequence[tuple[str, torch.Tensor]], interpreted: bool, **more: Any
    ) -> P:
        """The description of a call on ``map_`` and the tensors ``named``; ``more`` are the op's own fields."""
        type_ = map_.device.type
        device = configs.device_of(*(("cpu", None) if interpreted else (type_, map_.device.index)))
        strides = tuple((name, tensor.stride()) for name, tensor in named)
        return cls(tuple(map_.shape), strides, map_.dtype, precision_of(map_.dtype, type_), device, **more)

    @property
    def key_dtype(self) -> str:
        return key_dtype(self.dtype, self.precision)

    @property
    def interpreted(self) -> bool:
        return self.device.arch == "interpreter"

    def loop(self, bound: int) -> int:
        """The interpreter takes loop bounds as constants; 0: the kernel takes the bound from its own data."""
        return bound if self.interpreted else 0

    def split(self, op: str, kernel: str, key: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """A kernel's configuration: (constexprs, launch options)."""
        config = configs.config(op, kernel, self.device.name, {**key, "arch": self.device.arch})
        options = {name: value for name, value in config.items() if name.islower()}
        return {name: value for name, value in config.items() if not name.islower()}, options
