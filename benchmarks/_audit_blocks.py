"""Of the audit's cases those of whole blocks of models: layers and inverted residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from _audit_targets import DTYPES

from mvkernels.ops.inverted_residual.triton import plan as inverted_residual
from mvkernels.ops.patch_transformer_layer.triton import plan as patch_transformer_layer
from mvkernels.triton.configs import Device


@dataclass(frozen=True)
class Layer:
    """One stage of MobileViT: its layer, but for the attention that is patch_attention's own."""

    d: int
    size: int
    dtypes: tuple[str, ...]
    heads: int = 4
    patch: int = 2

    op = "patch_transformer_layer"

    def launches(self, batch: int, name: str, device: Device) -> list[Any]:
        c = self.heads * self.d
        problem = patch_transformer_layer.LayerProblem(
            (batch, c, self.size, self.size), (), DTYPES[name], "tf32" if name == "tf32" else "ieee", device,
            2 * c, self.heads, (self.patch, self.patch), True,
        )  # fmt: skip
        ffn, _, qkv, _ = patch_transformer_layer.backward_launches(problem)
        return [*patch_transformer_layer.forward_launches(problem), ffn, qkv]

    def columns(self) -> dict[str, Any]:
        return {"heads": self.heads, "head_dim": self.d, "map": f"{self.size}x{self.size}", "patch": self.patch,
                "tokens": (self.size // self.patch) ** 2, "layout": "last"}  # fmt: skip


@dataclass(frozen=True)
class Residual:
    """One block of inverted_residual."""

    inputs: int
    """0 without an expansion."""
    hidden: int
    outputs: int
    kernel: int
    stride: int
    size: int
    layout: str
    """``last`` and ``first``, as a convolution leaves its map; ``odd``: every second column of a larger map."""
    dtypes: tuple[str, ...]
    activation: str = "silu"

    op = "inverted_residual"

    def launches(self, batch: int, name: str, device: Device) -> list[Any]:
        c, n = self.inputs or self.hidden, self.size
        strides = {"last": (n * n * c, 1, n * c, c), "first": (c * n * n, n * n, n, 1)}
        strides["odd"] = (2 * c * n * n, 2 * n * n, 2 * n, 2)
        problem = inverted_residual.BlockProblem(
            (batch, c, n, n), (("x", strides[self.layout]),), DTYPES[name], "tf32" if name == "tf32" else "ieee",
            device, self.hidden, self.outputs, self.kernel, self.stride, self.activation, self.inputs > 0,
            self.stride == 1 and c == self.outputs, (True, True, True),
        )  # fmt: skip
        return inverted_residual.forward_launches(problem)

    def columns(self) -> dict[str, Any]:
        # What is a head's dimension elsewhere are the channels of x, and that of values those of the result.
        return {"head_dim": self.inputs or self.hidden, "value_dim": self.outputs, "layout": self.layout,
                "map": f"{self.size}x{self.size} to {self.hidden}", "patch": f"{self.kernel} by {self.stride}",
                "heads": int(self.inputs > 0)}  # fmt: skip


def layers() -> list[Layer]:
    """The stages of MobileViT, narrow and wide, and the first one of MobileViT-S at twice the side."""
    half, every = ("bf16",), ("bf16", "fp32", "tf32")
    shapes = [
        (16, 32, half),
        (20, 16, half),
        (30, 16, half),
        (36, 32, every),
        (48, 16, half),
        (60, 8, every),
        (60, 16, half),
    ]
    return [Layer(*shape) for shape in [*shapes, (36, 64, half)]]


def residuals() -> list[Residual]:
    """The blocks of MobileViT, EfficientViT and MobileNetV4, and one of each kind that they do not have."""
    half, both, single = ("bf16",), ("bf16", "fp32"), ("bf16", "fp16", "fp32", "tf32")
    shapes: list[tuple[Any, ...]] = [
        (16, 64, 32, 3, 1, 128, "last", single), (32, 128, 64, 3, 2, 128, "last", single),
        (64, 256, 64, 3, 1, 64, "last", single), (64, 256, 96, 3, 2, 64, "last", half),
        (96, 384, 128, 3, 2, 32, "last", both), (128, 512, 160, 3, 2, 16, "last", both),
        (64, 128, 80, 3, 2, 16, "last", half), (64, 256, 64, 3, 1, 32, "last", both, "hardswish"),
        (128, 512, 128, 3, 1, 16, "last", half, "hardswish"), (256, 1024, 256, 3, 1, 8, "last", single, "hardswish"),
        (64, 192, 64, 5, 1, 14, "last", single, "relu"), (96, 576, 96, 5, 1, 7, "last", both, "relu"),
        (96, 384, 96, 5, 2, 14, "last", ("bf16", "tf32"), "gelu_tanh"), (0, 64, 32, 3, 1, 64, "last", single),
        (0, 96, 96, 5, 2, 28, "last", both, "relu6"), (24, 72, 40, 3, 1, 28, "first", both, "gelu"),
        (64, 256, 64, 3, 1, 32, "first", half), (64, 256, 96, 3, 2, 32, "odd", both),
        (0, 64, 64, 3, 1, 32, "odd", half), (20, 76, 36, 3, 2, 28, "last", both),
        (64, 256, 64, 7, 2, 28, "last", ("bf16", "fp32", "tf32"), "relu"), (64, 256, 64, 1, 1, 28, "last", both),
    ]  # fmt: skip
    return [Residual(*shape) for shape in shapes]
