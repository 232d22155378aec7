"""One side of ``mvkernels bench --ab``: a process that times one checkout's ops when it is told to.

Run by path, as ``python worker.py CHECKOUT TIMING``: everything but this file and the clock (TIMING is the path
of timing.py, the same for both sides) is the checkout's own, which may be older than either. Requests are lines of
JSON on stdin: a dict with "op", "label", … prepares a call and is answered with {"repeats": n} or {"why": text};
"sample" is answered with seconds. Only ``registry.OPS``, ``Case.make`` and ``testing.check`` are asked of a checkout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def main(checkout: str, clock: str) -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the checkout prints is no answer
    sys.path[0] = checkout
    spec = importlib.util.spec_from_file_location("mvkernels_clock", clock)
    assert spec is not None and spec.loader is not None
    timing = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = timing  # where dataclasses look for it
    spec.loader.exec_module(timing)
    import mvkernels

    if not os.path.samefile(os.path.dirname(os.path.dirname(mvkernels.__file__)), checkout):
        raise SystemExit(f"the process imports {mvkernels.__file__}, which is not in {checkout}")
    call, repeats, device = None, 1, "cpu"
    for line in sys.stdin:
        request = json.loads(line)
        if request == "sample":
            answer: Any = timing.sample(call, repeats, device)
        else:
            device = request["device"]
            try:
                call = prepare(request, timing.Staged)
                repeats = timing._repeats(call, device)
                answer = {"repeats": repeats}
            except Exception as error:
                answer = {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(answer), file=answers, flush=True)


def prepare(request: Mapping[str, Any], staged: Any) -> Callable[[], Any]:
    """The call asked for, if it is right: checked now, unless it was before. Raises if it is wrong or missing."""
    import torch

    import mvkernels
    from mvkernels import testing

    # By the file: an editable install of another checkout would lend an older one the modules that it does not have.
    if os.path.exists(os.path.join(os.path.dirname(mvkernels.__file__), "dispatch", "registry.py")):
        from mvkernels.dispatch.registry import OPS
    else:
        from mvkernels.registry import OPS  # type: ignore[no-redef]

    torch.set_num_threads(request["threads"])
    op, backend, mode = OPS[request["op"]], request["backend"], request["mode"]
    cases = [case for case in op.suite("full") if (case.model, case.label) == (request["model"], request["label"])]
    if not cases:
        raise LookupError("this checkout has no such shape")
    dtype = getattr(torch, request["dtype"])
    made = {"batch": request["batch"], "dtype": dtype, "device": request["device"], "layout": request["layout"]}
    if not request["checked"]:
        wrong = [str(c) for c in testing.check(op, cases[0].make(**made), backend, mode != "fwd") if not c.ok]
        if wrong:
            raise ArithmeticError("; ".join(wrong))
    arguments = cases[0].make(**made)
    if mode == "fwd":
        pack = getattr(op, "pack", None)  # which an older checkout does not know
        packed = {"packed": pack(arguments)} if pack is not None and backend == "cpp" else {}

        def forward() -> Any:
            with torch.no_grad():
                return op.function(**arguments, **packed, backend=backend)

        return forward
    found = [v for value in arguments.values() for v in (value if isinstance(value, (list, tuple)) else [value])]
    leaves = [v.requires_grad_() for v in found if isinstance(v, torch.Tensor)]
    out = op.function(**arguments, backend=backend)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.empty_like(out.detach()).copy_(torch.randn(out.shape, generator=generator))

    def full() -> Any:
        return torch.autograd.grad(op.function(**arguments, backend=backend), leaves, cotangent)

    def forwarded() -> Callable[[], Any]:
        out = op.function(**arguments, backend=backend)
        return lambda: torch.autograd.grad(out, leaves, cotangent)

    return full if mode == "full" else staged(forwarded)


if __name__ == "__main__":
    main(*sys.argv[1:])
