"""``mvkernels verify``: compare every op, dtype and backend on this machine with the float64 reference.

It compares outputs and gradients, at the shapes of the suite and at small unusual ones: all kinds of strides, and maps
that the patch does not divide. The error criterion is :func:`mvkernels.testing.compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mvkernels import report, testing
from mvkernels.dispatch.backend import BACKENDS, can_run
from mvkernels.dispatch.registry import OPS, Case, Op

DTYPES = ("float32", "float16", "bfloat16", "float64")
# Height and width: even, odd, long, a single pixel; each with the strides that reads it hardest.
ODD_MAPS = ((9, 7, "packed"), (7, 8, "contiguous"), (3, 17, "transposed"), (1, 1, "channels_last"))
# Triton's interpreter takes seconds for what the device does in microseconds.
INTERPRETER_PIXELS = 100


@dataclass(frozen=True)
class Row:
    """The result for one op, backend, dtype and shape: its worst tensor."""

    op: str
    backend: str
    dtype: str
    shape: str
    strides: str
    ok: bool
    worst: str = ""
    """The tensor with the largest ratio of its error to the limit: out, dquery, ..."""
    error: float | None = None
    allowed: float | None = None
    note: str = ""


@dataclass
class Result:
    """All rows, and the reasons for what did not run."""

    rows: list[Row] = field(default_factory=list)
    not_run: dict[tuple[str, str], str] = field(default_factory=dict)
    """(op, backend) -> why it did not run."""

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "rows": [asdict(row) for row in self.rows],
            "not_run": [{"op": o, "backend": b, "reason": r} for (o, b), r in self.not_run.items()],
        }

    def __str__(self) -> str:
        header = ("op", "backend", "dtype", "shape", "strides", "tensor", "error", "allowed", "")
        lines = [
            (r.op, r.backend, r.dtype, r.shape, r.strides, r.worst, _number(r.error), _number(r.allowed),
             "ok" if r.ok else f"WRONG {r.note}".rstrip())
            for r in self.rows
        ]  # fmt: skip
        wrong = sum(not row.ok for row in self.rows)
        out = [report.table(lines, header), ""]
        out += [f"not run: {op} on {backend}: {reason}" for (op, backend), reason in self.not_run.items()]
        out.append(f"{len(self.rows)} checked, {wrong} wrong" if wrong else f"{len(self.rows)} checked, all correct")
        return "\n".join(out)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def verify(
    ops: Sequence[str] = (),
    backends: Sequence[str] = (),
    dtypes: Sequence[str] = DTYPES,
    suite: str = "small",
    device: str = "cpu",
) -> Result:
    """Check the outputs of ops, and the gradients where there is a backward, against the float64 reference.

    Args:
        ops: names of ops; none for all that have kernels on these backends.
        backends: names of backends; none for all that can run.
        dtypes: names of dtypes: "float32", "float16", "bfloat16", "float64".
        suite: shapes to run: "small" or "full".
        device: device to run on, such as "cpu" or "cuda".

    Returns:
        A :class:`Result` with one row for each comparison. It prints as a table, and its ``ok`` is the result.

    Raises:
        UsageError: an op is unknown, the device cannot be used, or a backend that was asked for cannot run.
    """
    for name in ops:
        if name not in OPS:
            raise report.UsageError(f"unknown op {name!r}, want one of {', '.join(OPS)}")
    report.check_device(device)
    ops = ops or report.ops_with(backends)
    for name in ops:
        report.check_backends(name, backends, device)
    result = Result()
    work = [
        (OPS[name], backend, dtype, shape, strides, make)
        for name in ops
        for shape, strides, make in inputs(OPS[name], suite)
        for dtype in dtypes
        for backend in backends or BACKENDS
    ]
    progress = report.Progress(len(work))
    for op, backend, dtype, shape, strides, make in work:
        progress.step(f"{op.name} {backend} {dtype} {shape} {strides}")
        arguments = make(getattr(torch, dtype), device)
        able, reason = can_run(op.name, backend, **arguments)
        if able and backend == "triton":
            reason = _too_slow([arguments[name] for name in op.maps if name in arguments], named=bool(backends))
        if reason:
            result.not_run.setdefault((op.name, backend), reason)
            continue
        result.rows.append(_check(op, backend, arguments, shape, strides))
    progress.close()
    return result


def _check(op: Op, backend: str, arguments: dict[str, Any], shape: str, strides: str) -> Row:
    dtype = report.short(arguments[op.maps[0]].dtype)
    try:
        found = testing.check(op, arguments, backend)
    except Exception as error:  # a kernel that fails is a finding like any other, and the rest still runs
        note = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Row(op.name, backend, dtype, shape, strides, ok=False, note=note)
    worst = max(found, key=lambda c: c.error / c.allowed)
    return Row(
        op.name, backend, dtype, shape, strides, worst.ok, worst.name, worst.error, worst.allowed, worst.detail
    )  # fmt: skip


def _too_slow(maps: list[Tensor], named: bool) -> str:
    """Why these maps are left out, if Triton's interpreter would run them; empty if they are not left out."""
    if any(m.device.type != "cpu" for m in maps):
        return ""
    if not named:
        return "Triton's interpreter takes minutes: use --backend triton to run it"
    if any(m.shape[-2] * m.shape[-1] > INTERPRETER_PIXELS for m in maps):
        return f"Triton's interpreter is too slow for maps of more than {INTERPRETER_PIXELS} pixels"
    return ""


Maker = Callable[[torch.dtype, str], dict[str, Any]]


def inputs(op: Op, suite: str = "small") -> Iterator[tuple[str, str, Maker]]:
    """The inputs of the checks: (shape, strides, function of dtype and device that makes the arguments)."""
    seen = set()
    for case in op.suite(suite):
        for layout in case.layouts:
            yield f"{case.model} {case.label}", f"qkv {layout}", partial(_of_suite, case, layout)
        example = case.make(batch=2)
        kind = tuple(sorted(example))
        if kind in seen:
            continue
        seen.add(kind)
        wanted = [(8, 8, strides) for strides in testing.STRIDES] + list(ODD_MAPS)
        if not _accepts(op, _resized(op, example, wanted[0], torch.float32, "cpu")):  # a bias fits one size only
            height, width = example[op.maps[0]].shape[-2:]
            wanted = [(height, width, strides) for strides in testing.STRIDES]
        for lie in wanted:
            if _accepts(op, _resized(op, example, lie, torch.float32, "cpu")):
                height, width, strides = lie
                yield (
                    f"{case.label.split('_')[0]} {height}x{width}, batch 2",
                    strides,
                    partial(_resized, op, example, lie),
                )


def _of_suite(case: Case, layout: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    return case.make(dtype=dtype, device=device, layout=layout)


def _accepts(op: Op, arguments: dict[str, Any]) -> bool:
    try:
        op.check(**arguments)
    except ValueError:
        return False
    return True


def _resized(
    op: Op, example: dict[str, Any], lie: tuple[int, int, str], dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """The example's arguments, batch 2, with every map of another height, width and kind of strides."""
    height, width, strides = lie
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, value in testing.tensors_in(example).items():
        if name in op.maps:
            shape = (2, *value.shape[1:-2], height, width)
            tensors[name] = testing.make_map(shape, strides, dtype, device, generator)
        else:
            tensors[name] = value.to(dtype=dtype, device=device)
    return testing.with_tensors(example, tensors)
