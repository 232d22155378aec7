"""``python -m mvkernels tune``: measure launch configurations on this GPU and keep the best.

For every op and shape of the suite, the kernels that a call asks a configuration for are found by
running it. Of the configurations registered to be tried a few are taken: those that ``triton/candidates.json`` lists
for the architecture and key, which were chosen by what their compiled code does (benchmarks/candidates.py), else
those near the default and unlike each other. They are timed; the fastest once more beside the default, interleaved.
What is faster by more than the margin and right, held against the float64 reference by the shared criterion, goes to
``configs/<device>.json``, which every later call reads. Nearly all of the time is compilation, which several
processes share beforehand.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mvkernels import files, testing
from mvkernels.bench import timing
from mvkernels.cuda import choice
from mvkernels.dispatch.backend import can_run
from mvkernels.dispatch.registry import Op
from mvkernels.triton import configs
from mvkernels.triton.configs import Config

MARGIN = 0.02
FINALISTS = 3
MOST = 10
"""Configurations of a kernel that are tried for one key."""
Call = Callable[[], dict[str, torch.Tensor]]
Calls = Mapping[str, Call]
Key = Callable[[bool], Mapping[str, Any]]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Finding:
    """What came out for one kernel and key."""

    kernel: str
    key: str
    tried: int
    refused: int
    """Of those tried: did not compile, did not fit, or gave wrong values."""
    default_us: float
    best_us: float
    best: Config
    """Changes of the heuristic's choice; empty where it is the best."""


def calls(
    op: Op,
    arguments: Mapping[str, Any],
    function: Callable[..., torch.Tensor],
    cotangent: torch.Tensor,
    backend: str = "triton",
) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """One call each of the op's ``function`` for the forward alone and, if the backend's kernels have a backward, for
    forward and backward, giving all their results."""
    wanted = {name: value.detach().requires_grad_() for name, value in testing.tensors_in(arguments).items()}
    leaves = testing.with_tensors(arguments, wanted)

    def forward() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"out": function(**arguments, backend=backend)}

    def backward() -> dict[str, torch.Tensor]:
        result = function(**leaves, backend=backend)
        grads = torch.autograd.grad(result, list(wanted.values()), cotangent)
        return {"out": result.detach(), **{f"d{n}": g for n, g in zip(wanted, grads)}}

    return {"forward": forward, "backward": backward} if op.has_backward(backend) else {"forward": forward}


def yardstick(op: Op, arguments: Mapping[str, Any]) -> tuple[testing.Yardstick, torch.Tensor]:
    """What results are held against, and a gradient of the output, which lies in memory as the output does."""
    held, cotangent = testing.yardstick(op, arguments, list(testing.tensors_in(arguments)))
    return held, torch.empty_like(held.baseline["out"]).copy_(cotangent)


def _right(results: Mapping[str, torch.Tensor], held: testing.Yardstick) -> bool:
    return all(found.ok for found in held.compare(results))


def tune_case(
    op: Op,
    arguments: Mapping[str, Any],
    device: torch.device | str,
    done: set[tuple[str, str]],
    min_time: float = 0.1,
    most: int = MOST,
) -> list[Finding]:
    """Tune every kernel that a call with these arguments asks a configuration for and that is not in ``done``.

    ``arguments`` are the op's, by name, on ``device``. ``done`` gains the ("op.kernel", key) pairs. At most ``most``
    configurations of a kernel are tried.
    """
    held, cotangent = yardstick(op, arguments)
    return [
        _tune_kernel(op, kernel, text, changes, call, held, device, min_time)
        for call in calls(op, arguments, op.function, cotangent).values()
        for kernel, text, key in asked_by(op, call, done)
        if (changes := to_try(op.name, kernel, key)[:most])
    ]


def compile_case(op: Op, arguments: Mapping[str, Any], done: set[tuple[str, str]], most: int = MOST) -> None:
    """Run what :func:`tune_case` would try once, so that it is compiled."""
    with torch.no_grad():
        cotangent = torch.randn_like(op.function(**arguments, backend="triton"))
    for call in calls(op, arguments, op.function, cotangent).values():
        for kernel, text, key in asked_by(op, call, done):
            for change in to_try(op.name, kernel, key)[:most]:
                # What does not compile tune_case refuses, and counts.
                with contextlib.suppress(Exception), configs.trying(op.name, kernel, text, change):
                    call()


def asked_by(op: Op, call: Callable[[], Any], done: set[tuple[str, str]]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(kernel, key as text, key) of the kernels of the op that a call launches and that are not in ``done``, which
    gains them."""
    with configs.recording() as asked:
        call()
    found = [
        (kernel, text, key)
        for (owner, kernel, text), key in asked.items()
        if owner == op.name and (f"{op.name}.{kernel}", text) not in done
    ]
    done.update((f"{op.name}.{kernel}", text) for kernel, text, _ in found)
    return found


def to_try(op: str, kernel: str, key: Mapping[str, Any]) -> list[Config]:
    """Changes of the default, the most promising first: those listed, else the nearest to the default of each kind,
    then the next nearest of each."""
    default, listed = configs.default(op, kernel, key), configs.listed(op, kernel, key)
    if listed is not None:
        return [change for change in listed if {**default, **change} != default]
    return interleaved(kinds(configs.candidates_of(op, kernel, key), default))


def kinds(changes: Sequence[Config], default: Config) -> list[list[Config]]:
    """What is registered, by kind, a kind being tiles and warps; the nearest to the default first, of each and of all.

    Configurations of a kind execute the same instructions but for loops' begins and ends: they differ in how many
    stages are under way, and in how the work is spread.
    """

    def distance(change: Config) -> float:
        return sum(
            abs(math.log2(value / default[name])) if value and default.get(name) else float(value != default.get(name))
            for name, value in change.items()
        )

    found: dict[tuple[Any, ...], list[Config]] = {}
    for change in sorted((c for c in changes if {**default, **c} != default), key=distance):
        whole = {**default, **change}
        kind = tuple(whole[name] for name in sorted(whole) if name not in ("PROGRAMS", "num_stages"))
        found.setdefault(kind, []).append(change)
    return list(found.values())


def interleaved(sorted_in: Sequence[Sequence[Config]]) -> list[Config]:
    """The first of each kind, then the second of each, and so on."""
    return [each[rank] for rank in range(max(map(len, sorted_in), default=0)) for each in sorted_in if rank < len(each)]


def _tune_kernel(
    op: Op,
    kernel: str,
    key: str,
    changes: Sequence[Config],
    call: Callable[[], dict[str, torch.Tensor]],
    held: testing.Yardstick,
    device: torch.device | str,
    min_time: float,
) -> Finding:
    quick: dict[str, float] = {}
    for change in ({}, *changes):
        try:
            with configs.trying(op.name, kernel, key, change):
                call()
                quick[json.dumps(change, sort_keys=True)] = min(timing.sample(call, 1, device) for _ in range(5))
        except Exception:  # does not compile, or asks for more than the device has: not a candidate
            if not change:
                raise
    # Few are worth a second look. Entering and leaving a trial costs host time, alike for all, the default included;
    # device times are what is compared, by replaying a graph of the call where the device has graphs.
    finalists = [text for text in sorted(quick, key=quick.__getitem__) if quick[text] < quick["{}"]][:FINALISTS]
    measured = timing.interleave(
        {text: _replayed(op.name, kernel, key, json.loads(text), call, device) for text in ("{}", *finalists)},
        device,
        min_time=min_time,
    )
    default = measured["{}"].median
    best, wrong = "{}", 0
    for text in sorted(finalists, key=lambda text: measured[text].median):
        if not measured[text].median < (1 - MARGIN) * default:
            break
        with configs.trying(op.name, kernel, key, json.loads(text)):
            if _right(call(), held):
                best = text
                break
        wrong += 1
    refused = len(changes) + 1 - len(quick) + wrong
    return Finding(kernel, key, len(changes), refused, default * 1e6, measured[best].median * 1e6, json.loads(best))


def _replayed(
    op: str, kernel: str, key: str, change: Config, call: Callable[[], Any], device: torch.device | str
) -> Callable[[], Any]:
    """The call with a change of a configuration."""
    if torch.device(device).type == "cuda":
        with configs.trying(op, kernel, key, change):
            return _graph(call)

    def run() -> Any:
        with configs.trying(op, kernel, key, change):
            return call()

    return run


def tune_choice(
    op: Op,
    arguments: Mapping[str, Any],
    device: torch.device | str,
    done: set[tuple[str, str]],
    min_time: float = 0.1,
) -> list[Finding]:
    """Measure the ways between which there is a choice, as :func:`tune_case`: the op against the same composed of
    others, where modules choose; its kernels in CUDA C++ against those in Triton, where "auto" does.

    The one that the configuration names, FUSED or CUDA, is found right by the shared criterion first, and faster by
    more than the margin.
    """
    able = op.choice is not None and can_run(op.name, "cuda", **arguments)[0]
    if op.composed is None and not able:
        return []
    held, cotangent = yardstick(op, arguments)
    triton = calls(op, arguments, op.function, cotangent)

    def between(kernel: str, flag: str, ways: tuple[str, str], key: Key, others: Calls, named: Calls) -> list[Finding]:
        return [
            found
            for name in named
            if (found := _tune_choice(op, kernel, flag, ways, key(name == "backward"), others[name], named[name], held,
                                      device, done, min_time)) is not None
        ]  # fmt: skip

    findings = []
    if op.composed is not None:
        of, others = op.composed, calls(op, arguments, op.composed.function, cotangent)
        findings += between(of.kernel, "FUSED", ("composed", "fused"), lambda grad: of.key(arguments, grad), others,
                            triton)  # fmt: skip
    if able:
        cuda = calls(op, arguments, op.function, cotangent, "cuda")
        findings += between(choice.KERNEL, "CUDA", ("triton", "cuda"), lambda grad: choice.key_of(op, arguments, grad),
                            triton, cuda)  # fmt: skip
    return findings


def _tune_choice(
    op: Op,
    kernel: str,
    flag: str,
    ways: tuple[str, str],
    of_call: Mapping[str, Any],
    other: Call,
    named: Call,
    held: testing.Yardstick,
    device: torch.device | str,
    done: set[tuple[str, str]],
    min_time: float,
) -> Finding | None:
    key = configs.key_text(of_call)
    if (f"{op.name}.{kernel}", key) in done:
        return None
    done.add((f"{op.name}.{kernel}", key))
    right = _right(named(), held)
    times: dict[str, Callable[[], Any]] = {ways[0]: other} | ({ways[1]: named} if right else {})
    if torch.device(device).type == "cuda":
        times = {which: _graph(each) for which, each in times.items()}
    measured = {which: t.median for which, t in timing.interleave(times, device, min_time=min_time).items()}
    faster = right and measured[ways[1]] < (1 - MARGIN) * measured[ways[0]]
    default = configs.default(op.name, kernel, of_call)[flag]
    before, best = ways[bool(right and default)], ways[faster]
    change = {} if bool(default) == faster else {flag: int(faster)}
    us, best_us = (measured[which] * 1e6 for which in (before, best))
    return Finding(kernel, key, 1, int(not right), us, best_us, change)


def _graph(call: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def save(path: Path, op: str, findings: Sequence[Finding], device: configs.Device) -> None:
    """Merge the findings into a configuration file; a key whose default is the best is taken out."""
    import triton

    content: dict[str, Any] = {"configs": {}}
    if path.exists():
        content = json.loads(path.read_text())
    configs = content["configs"]
    for finding in findings:
        entries = configs.setdefault(f"{op}.{finding.kernel}", {})
        entries.pop(finding.key, None)
        if finding.best:
            entries[finding.key] = finding.best
    content |= {"device": device.name, "arch": device.arch, "date": date.today().isoformat()}
    content |= {"torch": torch.__version__, "triton": triton.__version__}
    content["configs"] = {name: dict(sorted(entries.items())) for name, entries in sorted(configs.items()) if entries}
    files.write(path, json.dumps(content, indent=1) + "\n")
