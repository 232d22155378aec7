"""Times and memory of calls, measured so that they can be compared.

All that is compared runs in one process, interleaved: each round takes one sample of everyone, in a
random order, so that a disturbance of the machine meets all alike.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHORTEST_SAMPLE = 100e-6
"""Seconds. Shorter calls are repeated inside a sample, so that reading the clock costs nothing."""
_ROUNDS = 1_000_000
"""Of multiply-adds in a sample: some milliseconds, so that threads that begin one after the other run together."""
_FASTEST_CLOCK = 4e9
"""Cycles a second of a GPU's processors, no fewer than any has: a wait of so many cycles lasts at least as long."""


@dataclass(frozen=True)
class Times:
    """Seconds per call, over rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        return min(self.samples)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the median, see :func:`median_interval`."""
        return median_interval(self.samples, confidence)


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two order statistics between which the median lies with at least this confidence, whatever the distribution.

    The number of samples below the median is binomial(n, 1/2). Fewer samples than the confidence needs (6 for 95 %)
    give the smallest and the largest, which promise less. Samples that hang together promise less, too: the
    rounds of :func:`interleave` are spread over time, which does not make them independent.
    """
    ordered, count = sorted(samples), len(samples)
    below, rank, allowed = 1, 0, round((1 - confidence) * 1e6) * 2**count // 2_000_000
    for k in range(1, count // 2 + 1):  # below: how many of 2^n outcomes have fewer than k samples under the median
        if below > allowed:
            break
        rank = k - 1
        below += math.comb(count, k)
    return ordered[rank], ordered[count - 1 - rank]


@dataclass(frozen=True)
class Staged:
    """A call in two steps of which the second alone is timed: ``prepare()`` returns what is called under the clock."""

    prepare: Callable[[], Callable[[], Any]]

    def __call__(self) -> Any:
        return self.prepare()()


def _steps(call: Callable[[], Any], repeats: int) -> list[Callable[[], Any]]:
    return [call.prepare() for _ in range(repeats)] if isinstance(call, Staged) else [call] * repeats


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    rounds: int | None = None,
    min_time: float = 0.3,
) -> dict[str, Times]:
    """Time every call in turn, A B C A B C, after a warm-up.

    Without ``rounds``, at least 15, and as many as fill ``min_time`` seconds for each call on average.
    """
    repeats = {name: _repeats(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    end = time.perf_counter() + min_time * len(order)
    with _no_collection():
        while True:
            count = len(times[order[0]])
            if count >= (rounds or 15) and (rounds is not None or time.perf_counter() >= end or count >= 5000):
                break
            shuffle(order)
            for name in order:
                times[name].append(sample(calls[name], repeats[name], device))
    return {name: Times(tuple(values)) for name, values in times.items()}


def _repeats(call: Callable[[], Any], device: torch.device | str) -> int:
    """Warm the call up, and say how often a sample repeats it."""
    if torch.device(device).type == "cuda":
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        return 1
    call()
    quickest = float("inf")
    for _ in range(3):
        step = _steps(call, 1)[0]
        start = time.perf_counter()
        step()
        quickest = min(quickest, time.perf_counter() - start)
    return max(1, min(1000, round(SHORTEST_SAMPLE / max(quickest, 1e-7))))


def sample(call: Callable[[], Any], repeats: int, device: torch.device | str = "cpu") -> float:
    """Seconds of one call, from ``repeats`` of them in a row."""
    return (_cuda_sample if torch.device(device).type == "cuda" else _host_sample)(call, repeats)


def _host_sample(call: Callable[[], Any], repeats: int) -> float:
    steps = _steps(call, repeats)
    start = time.perf_counter_ns()
    for step in steps:
        step()
    return (time.perf_counter_ns() - start) / repeats * 1e-9


_flush: dict[int, torch.Tensor] = {}


def flush() -> None:
    """Put other data into the caches of the current CUDA device, without waiting for it."""
    index = torch.cuda.current_device()
    if index not in _flush:
        _flush[index] = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    _flush[index].bitwise_not_()


_hold: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
"""Seconds for which the queue is held up while the host launches a call."""


def _cuda_sample(call: Callable[[], Any], repeats: int) -> float:
    """Time on the device alone, from cold caches: the queue is held up while the host fills it.

    Whether for long enough is seen afterwards; if not, the sample is taken again. A queue takes about a thousand
    launches and then makes the host wait, however long it is held: so the third time is the last.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for attempt in range(3):
        hold = _hold.get(call, 1e-3)
        steps = _steps(call, repeats)
        torch.cuda.synchronize()
        flush()
        torch.cuda._sleep(round(hold * _FASTEST_CLOCK))
        begun = time.perf_counter()
        start.record()
        for step in steps:
            step()
        end.record()
        host = time.perf_counter() - begun
        end.synchronize()
        if host < hold:
            break
        if attempt < 2:
            _hold[call] = 1.5 * host
    return start.elapsed_time(end) / repeats * 1e-3


def wall(call: Callable[[], Any], device: torch.device | str = "cpu", seconds: float = 0.05) -> float | None:
    """Seconds a call takes a caller who makes one after another and waits for the last, the host's work included.

    None on a CPU, where it is what :func:`interleave` measures, and of a call in two steps.
    """
    if torch.device(device).type != "cuda" or isinstance(call, Staged):
        return None
    call()
    torch.cuda.synchronize()
    best = float("inf")
    with _no_collection():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begun = time.perf_counter()
            for _ in range(10):
                call()
            torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - begun) / 10)
    return best


@contextmanager
def _no_collection() -> Any:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_bytes(call: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """The most memory that a call holds at once beyond what was held before, as torch's allocator sees it."""
    call = _steps(call, 1)[0]
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler greets on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = call()
    del kept
    result = profile.kineto_results
    if result is None:
        return None
    held = peak = 0
    changes = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def peak_resident(call: Callable[[], Any]) -> int | None:
    """The growth of resident memory during a call, in bytes: sees what no allocator reports, rounded to pages.

    Linux only. Memory that the process keeps for reuse is given back first, so that it counts again.
    """
    import ctypes

    call = _steps(call, 1)[0]
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        kept = call()
        after = _status("VmHWM")
    except (OSError, AttributeError):
        return None
    del kept
    return max(0, after - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


@dataclass(frozen=True)
class Rates:
    """What the machine can do in this run, on these threads: the two sides of a floor, and a processor's peak."""

    copy: float
    """Bytes read and written per second by a large copy."""
    matmul: float
    """FLOP/s of a large square matrix product in the benchmark's dtype."""
    fma: float | None = None
    """FLOP/s of multiply-adds in registers, by the kernels' instruction set; None on a GPU or without the extension."""


def measure_rates(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """Copy bandwidth, matrix-product rate and the peak of multiply-adds, each the best of several short runs.

    Half types on a CPU count as float32, in which the kernels compute them.
    """
    # Not at the top: `bench --ab` runs this file with an older checkout's modules, which may not have this one.
    from mvkernels.dispatch import extension

    cuda = torch.device(device).type == "cuda"
    if not cuda and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    # Random values: products of ones draw less power, and a GPU's clock goes up.
    source = torch.randn((1 << 30 if cuda else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    size = 8192 if cuda else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, a, out=out),
    }
    multiply_adds = None if cuda or extension.module is None else extension.module.multiply_adds
    flops = 0
    if multiply_adds is not None:
        doubles = dtype == torch.float64
        flops = multiply_adds(1, doubles)[0] * _ROUNDS
        calls["fma"] = lambda: multiply_adds(_ROUNDS, doubles)
    times = interleave(calls, device, rounds=15)
    return Rates(
        copy=2 * source.numel() * 4 / times["copy"].min,
        matmul=2 * size**3 / times["matmul"].min,
        fma=flops / times["fma"].min if flops else None,
    )
