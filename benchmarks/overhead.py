"""What a call costs before any arithmetic, and what the import costs: both must stay small.

The call: each op on tensors so small that the kernel itself is nothing, and on the smallest shape of its suite, beside
the torch operator that it ends in and beside PyTorch's own attention function on tokens of the same sizes; without a
gradient, with one recorded, and forward and backward; called, and inside a compiled function.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _operators import Recorded
from _results import folder, replace, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mvkernels
from mvkernels import can_run, report
from mvkernels.bench import timing
from mvkernels.commands import command
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS, Op

Arguments = Mapping[str, Any]
Call = Callable[[], Any]
STATES = ("no gradient", "gradient recorded", "forward and backward")
MAP = (1, 1, 4, 2, 2)


def tiny() -> dict[str, dict[str, Any]]:
    """Arguments of each op without arithmetic worth the name."""
    a, b, c = (torch.randn(MAP) for _ in range(3))
    tokens, more = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    weights = {"depthwise": [torch.randn(12, 1, 3, 3)], "pointwise": [torch.randn(12, 4, 1, 1)]}
    return {
        "patch_attention": {"query": a, "key": b, "value": c, "patch_size": 2},
        "window_attention": {"query": a, "key": b, "value": c, "window_size": 2},
        "mobile_to_former": {"query": tokens, "x": a},
        "former_to_mobile": {"x": a, "key": tokens, "value": more},
        "relu_linear_attention": {"query": a, "key": b, "value": c},
        "multiscale_linear_attention": {"qkv": torch.randn(1, 12, 2, 2), "head_dim": 4, **weights},
        "patch_transformer_layer": {**packed("patch_transformer_layer", layer()), "heads": 1},
        "inverted_residual": packed("inverted_residual", block()),
        "conv3x3": packed("conv3x3", {"weight": torch.randn(4, 4, 3, 3), "bias": torch.randn(4)}),
        "pointwise": packed("pointwise", {"weight": torch.randn(4, 4), "bias": torch.randn(4)}),
    }


def block() -> dict[str, Any]:
    """Weights of an inverted residual."""
    shapes = {"expand": (8, 4, 1, 1), "depthwise": (8, 1, 3, 3), "project": (4, 8, 1, 1)}
    return {name: (torch.randn(shape), torch.randn(shape[0])) for name, shape in shapes.items()}


def layer() -> dict[str, Any]:
    """Parameters of a transformer layer."""
    shapes = {"norm1": (4,), "qkv": (12, 4), "proj": (4, 4), "norm2": (4,), "fc1": (8, 4), "fc2": (4, 8)}
    return {
        f"{name}_{part}": torch.randn(shape if part == "weight" else shape[:1])
        for name, shape in shapes.items()
        for part in ("weight", "bias")
    }


def packed(name: str, weights: dict[str, Any]) -> dict[str, Any]:
    """These weights, packed once as a model does, and a map."""
    pack = getattr(mvkernels, f"pack_{name}")
    x = torch.randn(1, 2, 2, 4).permute(0, 3, 1, 2)
    return {"x": x, **weights, "packed": pack(**weights) if extension.module else None}


def tensors(arguments: Arguments) -> list[Tensor]:
    """The tensors among arguments, those of lists as well."""
    flat = itertools.chain.from_iterable(v if isinstance(v, (list, tuple)) else [v] for v in arguments.values())
    return [value for value in flat if isinstance(value, Tensor)]


def smallest(op: Op) -> tuple[str, dict[str, Any]]:
    """The case of the full suite with the fewest elements: its label and arguments."""
    made = ((case.label, case.make()) for case in op.suite("full"))
    return min(made, key=lambda pair: sum(t.numel() for t in tensors(pair[1])))


def tokens(name: str, arguments: Arguments) -> list[Tensor]:
    """Query, key and value for scaled_dot_product_attention, of as many tokens as the op has in a group."""

    def of(shape: torch.Size, groups: int = 1) -> Tensor:
        if len(shape) == 4:
            return torch.randn(shape)
        batch, heads, dim, height, width = shape
        return torch.randn(batch * groups, heads, height * width // groups, dim)

    if OPS[name].pack:
        batch, channels, height, width = arguments["x"].shape
        return [torch.randn(batch, 1, height * width, channels) for _ in range(3)]

    if name == "multiscale_linear_attention":
        batch, channels, height, width = arguments["qkv"].shape
        dim, scales = arguments["head_dim"], 1 + len(arguments["depthwise"])
        return [torch.randn(batch, scales * channels // (3 * dim), height * width, dim) for _ in range(3)]
    if name == "mobile_to_former":
        sizes = [arguments[each].shape for each in ("query", "x", "x")]
    elif name == "former_to_mobile":
        sizes = [arguments[each].shape for each in ("x", "key", "value")]
    else:
        sizes = [arguments[each].shape for each in ("query", "key", "value")]

    def area(of_one: Any) -> int:
        return of_one * of_one if isinstance(of_one, int) else math.prod(of_one)

    groups = area(arguments.get("patch_size", 1))
    if "window_size" in arguments:
        groups = math.prod(sizes[0][3:]) // area(arguments["window_size"])
    return [of(shape, groups) for shape in sizes]


def operator(op: Op, arguments: Arguments) -> Call | None:
    """The calls of the torch operators that the op's call ends in; None on the reference."""
    with Recorded() as recorded:
        op.function(**arguments)
    if not recorded.kernels:
        return None
    (kernel, given), *more = recorded.kernels
    if more:  # an op that is made of others
        return lambda: [kernel(*given) for kernel, given in recorded.kernels]
    return lambda: kernel(*given)


def states(op: Op) -> tuple[str, ...]:
    """Those that an op is timed in: without a backward, one records no gradient on its kernels."""
    return STATES if op.has_backward("cpp") else STATES[:1]


def in_state(function: Callable[..., Tensor], arguments: Arguments, state: str) -> Call:
    """The call of ``function(**arguments)`` without a gradient, recording one, or with its backward."""
    if state == STATES[0]:
        return lambda: function(**arguments)

    def leaf(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(leaf(each) for each in value)
        return value.detach().requires_grad_() if isinstance(value, Tensor) else value

    arguments = {name: value if name == "patch_size" else leaf(value) for name, value in arguments.items()}
    if state == STATES[1]:
        return lambda: function(**arguments)
    leaves = tensors(arguments)
    grad = torch.randn_like(function(**arguments))
    return lambda: torch.autograd.grad(function(**arguments), leaves, grad)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


def measure(op: Op, shape: str, arguments: Arguments, state: str, compiled: bool, min_time: float) -> list[dict]:
    """A row for each that was timed, of all of one state together."""
    theirs = dict(zip(("query", "key", "value"), tokens(op.name, arguments)))
    ours, peer = op.function, sdpa
    if compiled:
        torch.compiler.reset()
        ours, peer = torch.compile(ours, fullgraph=True), torch.compile(sdpa, fullgraph=True)
    calls = {"sdpa": in_state(peer, theirs, state), "mvkernels": in_state(ours, arguments, state)}
    if state == STATES[0] and not compiled:
        kernel = operator(op, arguments)
        calls |= {"operator": kernel} if kernel else {}
        calls["reference"] = in_state(op.function, {**arguments, "backend": "reference"}, state)
    times = timing.interleave(calls, min_time=min_time)
    return [
        {
            **report.machine(), "what": f"{provider}: {op.name}, {shape}, {state}{', compiled' if compiled else ''}",
            "median_us": round(t.median * 1e6, 2), "min_us": round(t.min * 1e6, 2), "op": op.name, "shape": shape,
            "state": state, "compiled": compiled, "provider": provider,
            "of_sdpa_median": round(t.median / times["sdpa"].median, 3),
            "of_sdpa_min": round(t.min / times["sdpa"].min, 3),
        }
        for provider, t in times.items()
    ]  # fmt: skip


class Twice(torch.autograd.Function):
    """The least that a Function in Python does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        assert ctx.saved_tensors
        return grad * 2


def autograd(min_time: float) -> list[dict[str, Any]]:
    """What a backward costs before any op of this library: PyTorch's engine, and what a Function in Python adds."""
    x, grad = torch.randn(4, requires_grad=True), torch.randn(4)
    calls = {
        "PyTorch's own": lambda: torch.autograd.grad(x * 2, [x], grad),
        "a Function in Python": lambda: torch.autograd.grad(Twice.apply(x), [x], grad),
    }
    return [
        {
            **report.machine(),
            "what": f"a product by 2, forward and backward: {who}",
            "median_us": round(t.median * 1e6, 2),
            "min_us": round(t.min * 1e6, 2),
        }
        for who, t in timing.interleave(calls, min_time=min_time).items()
    ]


def import_microseconds(modules: tuple[str, ...]) -> dict[str, list[float]]:
    """Processor time of fresh interpreters that import each, interleaved."""
    found: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(7):
        for module in modules:
            code = f"import time, {module}; print(time.process_time())"
            out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
            found[module].append(float(out) * 1e6)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = tuple(name for name, op in OPS.items() if "cpp" in op.why_not)  # the others are the reference here
    parser.add_argument("--op", nargs="+", choices=ours, default=ours)
    parser.add_argument("--min-time", type=float, default=0.3, help="seconds for each that is timed")
    parser.add_argument("--no-file", action="store_true", help="print only")
    parser.add_argument(
        "--no-import", action="store_true", help="leave out what is of no op: imports, and autograd itself"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave compiled functions out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {name: (("tiny", tiny()[name]), smallest(OPS[name])) for name in options.op}
    modes = [False] if options.no_compile else [False, True]
    progress = report.Progress(2 * len(modes) * sum(len(states(OPS[name])) for name in shapes))
    rows = []
    for name, cases in shapes.items():
        if not can_run(name, "cpp", **cases[0][1])[0]:
            print(f"{name}: not on cpp, so these are times of the reference", file=sys.stderr)
        for (shape, arguments), compiled, state in itertools.product(cases, modes, states(OPS[name])):
            progress.step(f"{name}, {shape}, {state}")
            rows += measure(OPS[name], shape, arguments, state, compiled, options.min_time)
    progress.close()
    if not options.no_import:
        rows += autograd(options.min_time)
        for module, us in import_microseconds(("torch", "mvkernels")).items():
            what = f"import {module} (processor time)"
            middle, least = round(statistics.median(us)), round(min(us))
            rows.append({**report.machine(), "what": what, "median_us": middle, "min_us": least})
    header = ("what", "median us", "min us", "of sdpa's min")
    shown = [(r["what"], r["median_us"], r["min_us"], r.get("of_sdpa_min", "-")) for r in rows]
    print(report.table(shown, header))
    if not options.no_file:
        path = folder() / "overhead.csv"
        if options.no_import or options.no_compile or set(options.op) != set(ours):  # the rest of the file stays
            replace(rows, path, "what")
        else:
            write(rows, path)
    return 0


if __name__ == "__main__":
    sys.exit(command.run("overhead", main))
