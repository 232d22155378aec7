"""What a call costs before any arithmetic, and what the import costs: both must stay small.

The call: on tensors so small that the kernel itself is nothing, the public function against the torch
operator that it ends in, against PyTorch's own attention function.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import Any

import torch
from _results import folder, write
from torch.nn.functional import scaled_dot_product_attention

import mvkernels
from mvkernels import report, timing


def calls() -> dict[str, Any]:
    q, k, v = (torch.randn(1, 1, 4, 2, 2) for _ in range(3))
    gq, gk, gv = (t.clone().requires_grad_() for t in (q, k, v))
    tokens = [torch.randn(1, 1, 4, 4) for _ in range(3)]
    found: dict[str, Any] = {"scaled_dot_product_attention": lambda: scaled_dot_product_attention(*tokens)}
    if mvkernels.can_run("patch_attention", "cpp", q, k, v)[0]:
        kernel = torch.ops.mvkernels_cpp.patch_attention_forward.default
        found["the operator"] = lambda: kernel(q, k, v, 2, 2, None, 0.5)
        found["patch_attention"] = lambda: mvkernels.patch_attention(q, k, v, 2)
        found["patch_attention, backend named"] = lambda: mvkernels.patch_attention(q, k, v, 2, backend="cpp")
        found["patch_attention, recording a gradient"] = lambda: mvkernels.patch_attention(gq, gk, gv, 2)
    found["patch_attention, reference"] = lambda: mvkernels.patch_attention(q, k, v, 2, backend="reference")
    return found


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
    parser.add_argument("--no-file", action="store_true", help="print only")
    parser.add_argument("--no-import", action="store_true", help="leave the time of imports out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = timing.interleave(calls(), min_time=0.5)
    rows = [{**report.machine(), "what": name, "median_us": round(t.median * 1e6, 2), "min_us": round(t.min * 1e6, 2)}
            for name, t in times.items()]  # fmt: skip
    if not options.no_import:
        for module, us in import_microseconds(("torch", "mvkernels")).items():
            what = f"import {module} (processor time)"
            middle, least = round(statistics.median(us)), round(min(us))
            rows.append({**report.machine(), "what": what, "median_us": middle, "min_us": least})
    print(report.table([(r["what"], r["median_us"], r["min_us"]) for r in rows], ("what", "median us", "min us")))
    if not options.no_file:
        write(rows, folder() / "overhead.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
