"""What GPUs are said to do, and the few constants that were fitted to measured times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peaks: of data sheets, dense, without sparsity."""

    arch: str
    processors: int
    clock: float
    """Hz, boost: of the peaks."""
    busy_clock: float
    """Hz while kernels run one after the other."""
    bytes: float
    """A second, of the memory."""
    flops: dict[str, float]
    """A second, by dtype: float32 exact, as the kernels have it by default, not TF32."""
    cache: float
    """Bytes of the second-level cache."""
    cache_bytes: float
    """A second, of the second-level cache."""
    first_cache: int
    """Bytes that a processor divides between its first-level cache and shared memory."""
    name: str = ""

    @property
    def exponentials(self) -> float:
        """A second: 16 for each processor and clock."""
        return 16 * self.processors * self.clock


# NVIDIA A100 80GB SXM, H100 SXM5 and H200 SXM data sheets; CUDA C++ Programming Guide, compute capabilities. The busy
# clock of the H100 is what times and cycles of benchmarks/results say; of the A100 its boost clock. Bytes of the
# second-level cache a second: Luo et al. (see warps.py), 5.5 to 5.7 TB/s on an H100; A100: NVIDIA A100 Tensor Core GPU
# Architecture, 5120 bytes a cycle, of which as large a part as on the H100.
_HOPPER = {"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12}
DEVICES = {
    "A100": Device("sm_80", 108, 1.41e9, 1.41e9, 2.039e12, {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
                   40e6, 4.0e12, 192 << 10, "NVIDIA A100-SXM4-80GB"),
    "H100": Device("sm_90", 132, 1.98e9, 1.755e9, 3.35e12, _HOPPER, 50e6, 5.5e12, 256 << 10, "NVIDIA H100 80GB HBM3"),
    "H200": Device("sm_90", 132, 1.98e9, 1.755e9, 4.8e12, _HOPPER, 50e6, 5.5e12, 256 << 10, "NVIDIA H200"),
}  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """Constants that no data sheet has: fitted to the kernels' times of one GPU, see validation.py."""

    launch: float = 1.05
    """Microseconds from the beginning of a kernel to its first block, and from its last to the end."""
    waiting: float = 1.01
    """Of the cycles of a warp alone, those that count: other warps of its turn do not fill them."""
    busy: float = 0.74
    """Of the cycles of the busiest unit, those that count: what is on average, not at the worst moment."""
    near: float = 40.0
    """Cycles of a load from the first-level cache (Luo et al.; not fitted)."""
    far: float = 90.0
    """More, of one from the second-level cache, that are not hidden."""
    further: float = 730.0
    """More, of one from memory."""
    requests: float = 1.3
    """Cycles of the first-level cache, for a pass of a request: 32 banks of 4 bytes serve it, four lines at once."""
    passes: float = 0.69
    """Cycles for a pass over the banks of shared memory, or a shuffle."""
    memory: float = 0.865
    """Of the peak of the memory, what a copy reaches: 2.9 of 3.35 TB/s."""
    power: float = 1.8
    """With which the times of processors, second-level cache and memory come together: 1 would be one after the other,
    infinity the largest alone."""


FITTED = Fitted()
