"""Launches of multiscale_linear_attention's convolutions in CUDA C++: all that follows from shapes, strides and dtype.

The kernels are in ``csrc/cuda/multiscale_linear_attention``: tiles.cuh says how they divide the work. What stands here
of tiles, threads and shared memory says the same as they do.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from mvkernels.cuda.launch import Launch, fitting
from mvkernels.ops.multiscale_linear_attention.triton.plan import ScaleProblem
from mvkernels.triton import configs
from mvkernels.triton.maps import needed
from mvkernels.triton.problem import PARTS_BYTES

FOLDER = "multiscale_linear_attention"
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
KERNELS = (3, 5)
HEAD_DIMS = (16, 32)
SIDE = 4
TILE_ROWS = 8
THREADS_OF_SUM = 128
_SQUARE = SIDE * SIDE
_MOST_STEPS = 32
# Before its first tile a block reads weights and waits for memory: about as long as a tile takes.
_START = 1


def slab(dim: int) -> int:
    """Channels of a block: whole groups."""
    return 64 // dim * dim


def tile_columns(problem: ScaleProblem) -> int:
    """Width of a tile: narrow where the wide ones would not reach all processors, or waste a half.

    Of float32 the wide one would take the shared memory of two blocks.
    """
    batch, groups, dim, height, width = problem.shape
    wide = batch * -(-groups * dim // slab(dim)) * -(-height // TILE_ROWS) * -(-width // 16)
    return 8 if width <= 8 or problem.dtype == torch.float32 or wide < problem.device.processors else 16


def shared_bytes(kernel: str, dtype: torch.dtype, dim: int, side: int, columns: int, buffers: int) -> int:
    """Shared memory of a block of "aggregate", "map_gradient" or "weight_sums"; ``buffers``: for tiles of the map."""
    size, wide = dtype.itemsize, slab(dim)
    vector = 16 // size
    pitch = wide + vector
    halo, pixels = (TILE_ROWS + side - 1) * (columns + side - 1), TILE_ROWS * columns
    weights = wide * (dim + vector) * size + -(-4 * side * side * (wide + 2) // 16) * 16
    tile = -(-halo // _SQUARE) * _SQUARE * (pitch if kernel == "map_gradient" else wide)
    if kernel == "map_gradient":
        return buffers * (tile + pixels * wide) * size + weights
    if kernel == "aggregate":
        return (buffers * tile + pixels * pitch) * size + weights + 8 * wide
    # Beside a tile its gradient, what the depthwise convolution gave, and float32 rows of half a warp's square.
    in_loop = (buffers * (tile + pixels * pitch) + pixels * pitch) * size + weights + 4 * wide
    in_loop += pixels // 2 * (wide + 8) * 4 if size == 2 else 0
    return max(in_loop, 4 * (side * side + 2) * wide * 4)


def most_shared_bytes(dtype: torch.dtype, dim: int, side: int) -> int:
    """What the kernels need at least, whatever the map."""
    columns = 8 if dtype == torch.float32 else 16
    return max(
        shared_bytes("aggregate", dtype, dim, side, columns, 1),
        shared_bytes("map_gradient", dtype, dim, side, columns, 1),
        shared_bytes("weight_sums", dtype, dim, side, TILE_ROWS, 1),
    )


def why_not(dtype: torch.dtype, head_dim: int, sides: Collection[int], arch: str) -> str | None:
    """Why a call with kernels of these sides is not for these kernels, or None."""
    if not sides:
        return "no convolutions, which are all that is in CUDA C++"
    if dtype not in NAMES:
        return f"dtype {str(dtype).removeprefix('torch.')}: want bfloat16, float16, float32"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}: want {' or '.join(map(str, HEAD_DIMS))}"
    for side in sides:
        if side not in KERNELS:
            return f"a depthwise kernel of {side}: want {', '.join(map(str, KERNELS))}"
        needed = most_shared_bytes(dtype, head_dim, side)
        if needed > configs.shared_memory_of(arch):
            return f"{needed} bytes of shared memory: a block of this GPU has {configs.shared_memory_of(arch)}"
    return None


class _Plan:
    def __init__(self, problem: ScaleProblem, columns: int) -> None:
        self.problem, self.tile = problem, columns
        batch, groups, self.dim, self.height, self.width = problem.shape
        self.channels = groups * self.dim
        self.slabs = -(-self.channels // slab(self.dim))
        self.rows, self.columns = -(-self.height // TILE_ROWS), -(-self.width // columns)
        self.tiles = batch * self.rows * self.columns
        self.name = NAMES[problem.dtype]
        self.module = f"{FOLDER}/{'half' if problem.dtype.itemsize == 2 else self.name}_{problem.kernel}"

    def _strides(self, names: str) -> tuple[int, ...]:
        strides = dict(self.problem.strides)
        found = (needed(strides[name], self.problem.shape) for name in names.split())
        return tuple(stride for sb, _, _, sy, sx in found for stride in (sb, sy, sx))

    def launch(
        self, kernel: str, pointers: str, names: str, slices: int, ints: tuple[int, ...], buffers: int = 1
    ) -> Launch:
        """``names``: the maps among the pointers, in the order of their strides; ``ints``: what follows the tiles."""
        side = self.problem.kernel
        full = f"multiscale_{kernel}_{self.name}_{side}_{self.dim}"
        if kernel != "weight_sums":
            full += f"_{self.tile}"
        sizes = (self.channels, self.height, self.width, self.rows, self.columns, self.tiles)
        warps = TILE_ROWS // SIDE * (self.tile // SIDE) * (2 if kernel == "weight_sums" else 1)
        return Launch(
            self.module, full, self.slabs * slices, 32 * warps,
            shared_bytes(kernel, self.problem.dtype, self.dim, side, self.tile, buffers), tuple(pointers.split()),
            self._strides(names), (*sizes, *ints), (),
        )  # fmt: skip

    def resident(self, kernel: str, by_registers: int, buffers: int) -> int:
        """Blocks of a kernel that a processor has at once, of which the registers allow so many; 0 if none fits."""
        problem = self.problem
        need = shared_bytes(kernel, problem.dtype, self.dim, problem.kernel, self.tile, buffers)
        return min(by_registers, fitting(problem.device.arch, need))

    def buffers(self, kernel: str, by_registers: int, steps: int) -> int:
        """Of a block for its tiles: two only where the second takes no other block's place."""
        resident = [self.resident(kernel, by_registers, buffers) for buffers in (1, 2)]
        return 2 if steps > 1 and resident[0] == resident[1] else 1

    def over_tiles(self, kernel: str, pointers: str, names: str, more: tuple[int, ...]) -> Launch:
        """A launch of a kernel whose blocks leave no sums: so many tiles a block that all are done soonest."""
        by_registers = 32 // self.tile
        alone = self.resident(kernel, by_registers, 1)
        at_once = self.problem.device.processors * alone

        def time(steps: int) -> int:
            return -(-self.slabs * -(-self.tiles // steps) // at_once) * (steps + _START)

        steps = min(range(1, 1 + max(1, min(_MOST_STEPS, self.tiles))), key=time)
        buffers = self.buffers(kernel, by_registers, steps)
        return self.launch(kernel, pointers, names, -(-self.tiles // steps), (steps, buffers, *more), buffers)


@configs.memo
def aggregate_launches(problem: ScaleProblem) -> list[Launch]:
    """Both convolutions of the map ``x`` to the map ``o``; tensors ``x wide m wb mb o``."""
    plan = _Plan(problem, tile_columns(problem))
    return [plan.over_tiles("aggregate", "x wide m wb mb o", "x o", tuple(map(int, problem.biases)))]


@configs.memo
def map_launches(problem: ScaleProblem) -> list[Launch]:
    """From the gradient of a scale's map, ``g``, to that of ``x``, added to the map ``o``; tensors ``g wide m o``."""
    plan = _Plan(problem, tile_columns(problem))
    return [plan.over_tiles("map_gradient", "g wide m o", "g o", ())]


@configs.memo
def weight_launches(problem: ScaleProblem) -> tuple[list[Launch], tuple[int, int]]:
    """(launches, shape of ``parts``) of the gradients of a scale's weights, given that of its map, ``g``.

    Tensors ``g x wide m wb parts dw dm dwb dmb``. Without a bias its gradient is not written.
    """
    plan = _Plan(problem, TILE_ROWS)
    taps = problem.kernel**2
    size = plan.channels * (taps + plan.dim + 2)
    # As many blocks as are resident at once: each leaves its sums. The kernel's bounds say how many registers allow.
    by_registers = 1 if problem.dtype == torch.float32 else 2
    resident = plan.resident("weight_sums", by_registers, 1) * problem.device.processors
    most = max(1, min(plan.tiles, resident // plan.slabs, PARTS_BYTES // (4 * size)))
    steps = -(-plan.tiles // most)
    slices = -(-plan.tiles // steps)
    first, second = problem.biases
    buffers = plan.buffers("weight_sums", by_registers, steps)
    ints = (steps, buffers, int(first), int(first or second))
    sums = plan.launch("weight_sums", "g x wide m wb parts", "g x", slices, ints, buffers)
    last = Launch(
        plan.module, f"multiscale_weight_gradients_{plan.name}", -(-size // THREADS_OF_SUM), THREADS_OF_SUM, 0,
        ("parts", "dw", "dm", "dwb", "dmb"), (), (plan.channels, slices, taps, plan.dim, int(first), int(second)), (),
    )  # fmt: skip
    return [sums, last], (slices, size)
