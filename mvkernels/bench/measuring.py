"""``mvkernels bench``: how fast an op is, compared with the same work done without mvkernels.

All times of a row are measured in one process, interleaved. By default with one thread, and with freed memory kept by
the process. A provider whose result is wrong on the input that is timed gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mvkernels import report, testing
from mvkernels.bench import timing
from mvkernels.bench.gate import Gate, Provider
from mvkernels.bench.rows import COLUMNS, Row, geomeans, read_csv, size_class, write_csv
from mvkernels.dispatch.backend import BACKENDS, reason_against
from mvkernels.dispatch.registry import OPS, Case, Op

__all__ = ["COLUMNS", "MODES", "PEERS", "Options", "Result", "Row", "geomeans", "measure", "read_csv", "size_class",
           "write_csv"]  # fmt: skip

PEERS = ("eager", "sdpa", "compile", "thirdparty")
MODES = ("fwd", "bwd", "full")


@dataclass(frozen=True)
class Options:
    """What to measure. An empty list means all, or all that can run."""

    ops: Sequence[str] = ()
    suite: str = "small"
    batches: Sequence[int] = (1,)
    modes: Sequence[str] = ("fwd",)
    dtypes: Sequence[str] = ("float32",)
    layouts: Sequence[str] = ()
    backends: Sequence[str] = ()
    against: Sequence[str] = PEERS[:3]
    labels: Sequence[str] = ()
    device: str = "cpu"
    threads: int = 1
    rounds: int | None = None
    min_time: float = 0.3
    memory: bool = True


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    rates: dict[str, timing.Rates] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    """What is not measured, with the reason: backends that were not asked for by name and cannot run; and modes that
    need a backward, and backends that were asked for, where an op's kernels have none."""

    @property
    def wrong(self) -> list[Row]:
        """The rows of this library's kernels that failed or gave a wrong result."""
        return [row for row in self.rows if not row.ok and row.provider in BACKENDS]


def measure(options: Options, after_each: Callable[[Result], None] | None = None) -> Result:
    """Run the benchmark. Raises UsageError if there is nothing to measure.

    ``after_each`` is called with the results so far after each shape, so an interrupted run does not lose them.
    """
    cases = list(work(options))
    if not cases:
        raise report.UsageError("no shape of the suite matches the options")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    result, progress = Result(not_run=_left_out(options)), report.Progress(len(cases))
    try:
        where, triton = report.machine(options.device), report.version_of("triton")
        for op, case, layout, batch, name, mode in cases:
            if name not in result.rates:
                result.rates[name] = timing.measure_rates(options.device, getattr(torch, name))
            progress.step(f"{op.name} {case.label} batch {batch} {name} {mode}")
            shared = {
                **where,
                "threads": torch.get_num_threads(),
                "op": op.name,
                "model": case.model,
                "label": case.label,
                "size_class": size_class(case),
                "batch": batch,
                "dtype": name,
                "layout": layout,
                "mode": mode,
                "triton": triton,
            }
            arguments = case.make(batch=batch, dtype=getattr(torch, name), device=options.device, layout=layout)
            backends, reasons = _backends(op, arguments, options, mode)
            result.not_run.update(reasons)
            if mode != "fwd":
                for value in testing.tensors_in(arguments).values():
                    value.requires_grad_()
            providers = [*(Provider(b, _on(op, b, arguments)) for b in backends), *_peers(op, options.against)]
            gate = Gate(op, arguments, mode)
            result.rows += _measure_case(gate, providers, shared, options, result.rates[name])
            if after_each is not None:
                after_each(result)
    finally:
        progress.close()
        torch.set_num_threads(before)
    return result


Item = tuple[Op, Case, str, int, str, str]
"""Op, shape, layout, batch, dtype, mode."""


def work(options: Options) -> Iterator[Item]:
    """What there is to measure, whatever is named twice once.

    Of an op whose kernels have no backward, only the forward, unless the reference is asked for by name. Raises
    UsageError for an op that is not known, and for one of which the modes leave nothing.
    """
    for name in _asked(options):
        if name not in OPS:
            raise report.UsageError(f"bench: unknown op {name!r}, want one of {', '.join(OPS)}")
        modes = [mode for mode in dict.fromkeys(options.modes) if _measured(OPS[name], mode, options)]
        if options.ops and not modes:
            raise report.UsageError(f"{name}: {_NO_BACKWARD}, want --mode fwd, or --backend reference")
        for case in OPS[name].suite(options.suite):
            if options.labels and not any(part in f"{case.model} {case.label}" for part in options.labels):
                continue
            for layout in case.layouts:
                if options.layouts and layout not in options.layouts:
                    continue
                for batch in dict.fromkeys(options.batches):
                    for dtype in dict.fromkeys(options.dtypes):
                        for mode in modes:
                            yield OPS[name], case, layout, batch, dtype, mode


_NO_BACKWARD = "its kernels have no backward"


def _asked(options: Options) -> list[str]:
    return list(dict.fromkeys(options.ops or report.ops_with(options.backends)))


def _measured(op: Op, mode: str, options: Options) -> bool:
    """Whether any backend that is asked for, or any kernel, has what the mode needs."""
    return mode == "fwd" or op.differentiable or any(op.has_backward(b) for b in options.backends)


def _left_out(options: Options) -> dict[str, str]:
    """The modes of ops that :func:`work` passes over."""
    pairs = ((name, mode) for name in _asked(options) for mode in dict.fromkeys(options.modes))
    return {f"{name} {mode}": _NO_BACKWARD for name, mode in pairs if not _measured(OPS[name], mode, options)}


def _measure_case(
    gate: Gate, providers: list[Provider], shared: dict[str, Any], options: Options, rates: timing.Rates
) -> list[Row]:
    gate.apply(providers)
    # Of the compiled peers the quicker one runs; two of them would be one peer too many in every round.
    compiled = {p.name: p.work for p in providers if p.name.startswith("compile(") and p.work is not None}
    if len(compiled) > 1:
        quick = timing.interleave(compiled, options.device, rounds=7)  # type: ignore[arg-type]
        best = min(quick, key=lambda name: quick[name].median)
        providers = [p for p in providers if p.name not in compiled or p.name == best]
    timed = {p.name: p.work for p in providers if p.work is not None}
    times = timing.interleave(timed, options.device, options.rounds, options.min_time) if timed else {}
    peaks = {name: _memory(work, options.device) for name, work in timed.items()} if options.memory else {}
    costs = [gate.op.cost(gate.arguments, backward) for backward in _PASSES[gate.mode]]
    floor = sum(cost.seconds(rates.copy, rates.matmul) for cost in costs)
    torch._dynamo.reset()

    peers = {name: t for name, t in times.items() if name not in BACKENDS}
    rows = []
    for provider in providers:
        t = times.get(provider.name)
        row = Row(
            **shared,
            provider=provider.name,
            ok=t is not None,
            floor_us=_us(floor),
            copy_gb_s=round(rates.copy / 1e9, 2),
            matmul_gflop_s=round(rates.matmul / 1e9, 1),
            fma_gflop_s=None if rates.fma is None else round(rates.fma / 1e9, 1),
            error=provider.error,
            note=provider.note,
        )
        if t is not None:
            row.median_us, row.min_us, row.rounds = _us(t.median), _us(t.min), len(t.samples)
            row.p20_us, row.p80_us = _us(t.quantile(0.2)), _us(t.quantile(0.8))
            row.median_low_us, row.median_high_us = map(_us, t.interval())
            row.fraction_of_floor = round(floor / t.median, 4)
            row.gb_s = round(sum(cost.bytes for cost in costs) / t.median / 1e9, 3)
            flops = sum(cost.flops for cost in costs) / t.median
            row.tflop_s = round(flops / 1e12, 6)
            row.fraction_of_fma = None if rates.fma is None else round(flops / rates.fma, 4)
            row.peak_bytes, row.peak_resident_bytes = peaks.get(provider.name, (None, None))
            wall = timing.wall(timed[provider.name], options.device)
            row.wall_us = None if wall is None else _us(wall)
            if provider.name in BACKENDS and peers:
                row.best_peer = min(peers, key=lambda name: peers[name].median)
                row.speedup_median = round(peers[row.best_peer].median / t.median, 4)
                row.speedup_min = round(min(p.min for p in peers.values()) / t.min, 4)
        rows.append(row)
    return rows


_PASSES = {"fwd": (False,), "bwd": (True,), "full": (False, True)}
"""Whether it is the backward, for each pass of a mode."""


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _memory(work: Callable[[], Any], device: str) -> tuple[int | None, int | None]:
    peak = timing.peak_bytes(work, device)
    return peak, timing.peak_resident(work) if torch.device(device).type == "cpu" else None


def _backends(op: Op, arguments: Mapping[str, Any], options: Options, mode: str) -> tuple[list[str], dict[str, str]]:
    """Who of this library runs: those named, else every kernel that can, else the reference; and why not the others."""
    asked = dict.fromkeys(options.backends or [b for b in BACKENDS if b in op.why_not])
    reasons = {b: f"{op.name}: {_NO_BACKWARD}" for b in asked if mode != "fwd" and not op.has_backward(b)}
    able = [b for b in asked if b not in reasons]
    if options.backends:
        return able, reasons
    checked = op.check(**arguments)
    reasons |= {b: reason for b in able if (reason := reason_against(op, b, checked))}
    return [b for b in able if b not in reasons] or ["reference"], reasons


def candidates(item: Item, options: Options) -> list[str]:
    """The backends of this library that are measured on one shape."""
    op, case, layout, batch, dtype, mode = item
    arguments = case.make(batch=batch, dtype=getattr(torch, dtype), device=options.device, layout=layout)
    return _backends(op, arguments, options, mode)[0]


def _peers(op: Op, wanted: Sequence[str]) -> Iterator[Provider]:
    for name, peer in op.peers.items():
        if name in wanted:
            yield Provider(name, peer)
        if "compile" in wanted:
            yield Provider(f"compile({name})", torch.compile(peer, fullgraph=True, dynamic=False))
    if "thirdparty" in wanted:
        yield from (Provider(name, peer) for name, peer in op.third_party.items())


def _on(op: Op, backend: str, arguments: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The op on a backend, with what callers make once of the weights."""
    packed = {"packed": op.pack(arguments)} if op.pack is not None and backend == "cpp" else {}
    return lambda **arguments: op.function(**arguments, **packed, backend=backend)
