"""Everything on CUDA tensors, for whoever has a GPU: the tests first, then the benchmarks.

Results go to benchmarks/results/<device>. Without a GPU it says so and exits with 2; where anything is
wrong it stops before any time is taken, and exits with 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
OPS = ("patch_attention", "mobile_to_former", "former_to_mobile", "relu_linear_attention",
       "multiscale_linear_attention")  # fmt: skip


def main() -> int:
    if not torch.cuda.is_available():
        print(f"gpu: no CUDA device is available to torch {torch.__version__}; nothing was run", file=sys.stderr)
        return 2
    environment = {**os.environ, "MVKERNELS_TEST_DEVICE": "cuda"}
    environment.pop("TRITON_INTERPRET", None)
    python = sys.executable
    for command in (
        [python, "-m", "mvkernels", "info"],
        [python, "-m", "pytest", "-m", "not interpreter"],
        [python, "-m", "mvkernels", "verify", "--device", "cuda", "--suite", "full"],
        *([python, str(HERE / f"{op}.py"), "--device", "cuda"] for op in OPS),
        [python, str(HERE / "swapped.py"), "--device", "cuda", "--batch", "1", "32", "128"],
    ):
        print("$", *command[1:], flush=True)
        if subprocess.run(command, cwd=HERE.parent, env=environment, check=False).returncode:
            print(f"gpu: failed: {' '.join(command[1:])}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
