"""``mvkernels bench``: how fast an op is, against the same work done without this library.

A figure here can be believed: everything in a row runs in one process, interleaved; one thread unless
told otherwise; with freed memory kept by the process unless told otherwise; and whatever gives a wrong
result on the very input that is timed has no time.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvkernels import report, testing, timing
from mvkernels.backend import BACKENDS, reason_against
from mvkernels.registry import OPS, Case, Op

PEERS = ("eager", "sdpa", "compile")
MODES = ("fwd", "full")


@dataclass(frozen=True)
class Options:
    """What to measure. ``None`` means all, or what the machine has."""

    ops: Sequence[str] = ()
    suite: str = "small"
    batches: Sequence[int] = (1,)
    modes: Sequence[str] = ("fwd",)
    dtypes: Sequence[str] = ("float32",)
    layouts: Sequence[str] = ()
    backends: Sequence[str] = ()
    against: Sequence[str] = PEERS
    labels: Sequence[str] = ()
    device: str = "cpu"
    threads: int = 1
    rounds: int | None = None
    min_time: float = 0.3
    memory: bool = True


@dataclass
class Row:
    """One line of the CSV: a provider's figures for one shape. The names and their order stay."""

    date: str
    device: str
    capability: str
    torch: str
    mvkernels: str
    commit: str
    threads: int
    allocator: str
    op: str
    model: str
    label: str
    size_class: str
    batch: int
    dtype: str
    layout: str
    mode: str
    provider: str
    ok: bool
    median_us: float | None = None
    min_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    rounds: int = 0
    speedup_median: float | None = None
    """Median of the best peer over this median (and likewise of the minima); peers have none."""
    speedup_min: float | None = None
    best_peer: str = ""
    peak_bytes: int | None = None
    peak_resident_bytes: int | None = None
    floor_us: float | None = None
    fraction_of_floor: float | None = None
    copy_gb_s: float = 0.0
    matmul_gflop_s: float = 0.0
    error: float | None = None
    note: str = ""


COLUMNS = tuple(f.name for f in fields(Row))


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    rates: dict[str, timing.Rates] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    """Backends that were not asked for by name and cannot run, with the reason."""

    @property
    def wrong(self) -> list[Row]:
        """The rows of this library's kernels that failed or gave a wrong result."""
        return [row for row in self.rows if not row.ok and row.provider in BACKENDS]


@dataclass
class Provider:
    """Somebody who does the work: a backend of this library, or a peer."""

    name: str
    call: Callable[..., Tensor]
    note: str = ""
    work: Callable[[], Any] | None = None
    error: float | None = None

    def fail(self, reason: str) -> None:
        self.work, self.note = None, reason


def measure(options: Options, after_each: Callable[[Result], None] | None = None) -> Result:
    """Run the benchmark. ``after_each`` sees what there is after each shape, so that a long run that is cut off
    leaves its part. Raises UsageError for what cannot be measured at all.
    """
    cases = list(_work(options))
    if not cases:
        raise report.UsageError("no shape fits what was asked for")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    result, progress = Result(), report.Progress(len(cases))
    try:
        where = report.machine(options.device)
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
            }
            arguments = case.make(batch=batch, dtype=getattr(torch, name), device=options.device, layout=layout)
            backends, reasons = _backends(op, arguments, options)
            result.not_run.update(reasons)
            if mode == "full":
                for value in testing.tensors_in(arguments).values():
                    value.requires_grad_()
            providers = [*(Provider(b, _on(op, b)) for b in backends), *_peers(op, options.against)]
            gate = Gate(op, arguments, mode == "full")
            result.rows += _measure_case(gate, providers, shared, options, result.rates[name])
            if after_each is not None:
                after_each(result)
    finally:
        progress.close()
        torch.set_num_threads(before)
    return result


def _work(options: Options) -> Iterator[tuple[Op, Case, str, int, str, str]]:
    for name in options.ops or OPS:
        if name not in OPS:
            raise report.UsageError(f"bench: unknown op {name!r}, want one of {', '.join(OPS)}")
        for case in OPS[name].suite(options.suite):
            if options.labels and not any(part in f"{case.model} {case.label}" for part in options.labels):
                continue
            for layout in case.layouts:
                if options.layouts and layout not in options.layouts:
                    continue
                for batch in options.batches:
                    for dtype in options.dtypes:
                        for mode in options.modes:
                            yield OPS[name], case, layout, batch, dtype, mode


def size_class(case: Case) -> str:
    """The class of shapes that a summary puts together: for grouped attention by the tokens of a group."""
    shape = case.shape
    if "patch" not in shape:
        return "all"
    tokens = shape["height"] * shape["width"] // shape["patch"] ** 2
    return next((f"N<={bound}" for bound in (16, 64, 255) if tokens <= bound), "N>=256")


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
    floor = gate.op.cost(gate.arguments, False).seconds(rates.copy, rates.matmul)
    if gate.backward:
        floor += gate.op.cost(gate.arguments, True).seconds(rates.copy, rates.matmul)
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
            error=provider.error,
            note=provider.note,
        )
        if t is not None:
            row.median_us, row.min_us, row.rounds = _us(t.median), _us(t.min), len(t.samples)
            row.p20_us, row.p80_us = _us(t.quantile(0.2)), _us(t.quantile(0.8))
            row.fraction_of_floor = round(floor / t.median, 4)
            row.peak_bytes, row.peak_resident_bytes = peaks.get(provider.name, (None, None))
            if provider.name in BACKENDS and peers:
                row.best_peer = min(peers, key=lambda name: peers[name].median)
                row.speedup_median = round(peers[row.best_peer].median / t.median, 4)
                row.speedup_min = round(min(p.min for p in peers.values()) / t.min, 4)
        rows.append(row)
    return rows


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _memory(work: Callable[[], Any], device: str) -> tuple[int | None, int | None]:
    peak = timing.peak_bytes(work, device)
    return peak, timing.peak_resident(work) if torch.device(device).type == "cpu" else None


def _backends(op: Op, arguments: Mapping[str, Any], options: Options) -> tuple[list[str], dict[str, str]]:
    """Who of this library runs: those named, else every kernel that can, else the reference; and why not the others."""
    if options.backends:
        return list(options.backends), {}
    checked = op.check(**arguments)
    reasons = {b: reason_against(op, b, checked) for b in BACKENDS if b in op.why_not}
    able = [b for b, reason in reasons.items() if not reason]
    return able or ["reference"], {b: reason for b, reason in reasons.items() if reason}


def _peers(op: Op, wanted: Sequence[str]) -> Iterator[Provider]:
    for name, peer in op.peers.items():
        if name in wanted:
            yield Provider(name, peer)
        if "compile" in wanted:
            yield Provider(f"compile({name})", torch.compile(peer, fullgraph=True, dynamic=False))


def _on(op: Op, backend: str) -> Callable[..., Tensor]:
    return lambda **arguments: op.function(**arguments, backend=backend)


class Gate:
    """Lets only those be timed who compute the right thing on the arguments that are timed."""

    def __init__(self, op: Op, arguments: Mapping[str, Any], backward: bool) -> None:
        self.op, self.arguments, self.backward = op, arguments, backward
        tensors = testing.tensors_in(arguments)
        self.wanted = list(tensors) if backward else []
        exact = testing.with_tensors(arguments, {n: v.detach().double() for n, v in tensors.items()})
        first = next(iter(tensors.values()))
        dtype, device = first.dtype, first.device
        with torch.no_grad():
            shape = op.reference(**exact).shape if backward else ()
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(shape, generator=generator, dtype=torch.float64) if backward else None
        self.cotangent = None if cotangent is None else cotangent.to(device=device, dtype=dtype)
        exact_cotangent = None if self.cotangent is None else self.cotangent.double()
        self.exact = testing.run(op.reference, exact, self.wanted, exact_cotangent)
        self.baseline = testing.run(
            lambda **kw: op.reference(**kw, compute_dtype=dtype), arguments, self.wanted, self.cotangent
        )

    def apply(self, providers: Sequence[Provider]) -> None:
        """Give each provider that is right its work, and every other one the reason why it has none."""
        for provider in providers:
            try:
                with _quiet():
                    actual = testing.run(provider.call, self.arguments, self.wanted, self.cotangent)
            except Exception as error:  # a peer that does not compile is a row that says so, not the end
                provider.fail(f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                continue
            found = [
                testing.compare(
                    name,
                    actual[name],
                    exact,
                    self.baseline[name],
                    testing.FORWARD_FACTOR if name == "out" else testing.BACKWARD_FACTOR,
                )
                for name, exact in self.exact.items()
            ]
            provider.error = max(c.error for c in found)
            wrong = [str(c) for c in found if not c.ok]
            if wrong:
                provider.fail("; ".join(wrong))
            else:
                provider.work = self._work(provider.call)

    def _work(self, call: Callable[..., Tensor]) -> Callable[[], Any]:
        # Fresh leaves for each provider: a compiled function guards on the tensors that it first met.
        tensors = testing.tensors_in(self.arguments)
        fresh = {n: v.detach().requires_grad_(n in self.wanted) for n, v in tensors.items()}
        arguments = testing.with_tensors(self.arguments, fresh)
        if not self.backward:

            def forward() -> Tensor:
                with torch.no_grad():
                    return call(**arguments)

            return forward
        leaves = [fresh[n] for n in self.wanted]
        # The gradient of the output lies as the output does, as it would from whatever follows.
        assert self.cotangent is not None
        cotangent = torch.empty_like(call(**arguments).detach()).copy_(self.cotangent)

        def full() -> tuple[Tensor, ...]:
            return torch.autograd.grad(call(**arguments), leaves, cotangent)

        return full


class _quiet:
    """Keeps torch.compile's warnings off stderr while a peer is tried; its exceptions come through."""

    def __enter__(self) -> None:
        self.levels = {name: logging.getLogger(name).level for name in ("torch._dynamo", "torch._inductor")}
        for name in self.levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)


def geomeans(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Speed-ups put together by op, mode, dtype, provider and class of shapes, worst shape included."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.speedup_median is not None:
            for klass in dict.fromkeys((row.size_class, "all")):
                groups.setdefault((row.op, row.mode, row.dtype, row.provider, klass), []).append(row)
    out = []
    for (op, mode, dtype, provider, klass), members in sorted(groups.items(), key=_class_order):
        medians = [row.speedup_median or math.nan for row in members]
        minima = [row.speedup_min or math.nan for row in members]
        out.append(
            {
                "op": op,
                "mode": mode,
                "dtype": dtype,
                "provider": provider,
                "size_class": klass,
                "shapes": len(members),
                "geomean_of_medians": round(math.exp(sum(map(math.log, medians)) / len(medians)), 3),
                "geomean_of_minima": round(math.exp(sum(map(math.log, minima)) / len(minima)), 3),
                "worst": round(min(medians), 3),
            }
        )
    return out


def _class_order(item: tuple[tuple[str, ...], list[Row]]) -> tuple[Any, ...]:
    *rest, klass = item[0]
    return (*rest, klass == "all", int(re.sub(r"\D", "", klass) or 0))


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write rows with the stable columns."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
