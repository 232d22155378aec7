"""The steps of benchmarks/gpu.py, in their order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from _counters import COUNTED

from mvkernels import report
from mvkernels.dispatch.registry import OPS

HERE = Path(__file__).resolve().parent
MODELS = {"timm:mobilevit_s": 256, "timm:efficientvit_b1": 288}
"""Whole models, and the sides of the pictures at which others have published times: results/published.csv."""
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = (
    "mobilevit_s@256", "xxs@256 4x16_32x32", "efficientformer", "coatnet", "294m@224 2x12_", "294m@224 2x24_",
    "294m@224 2x48_", "294m@224 2x96_", "efficientvit_b1@512 8x16_32", "efficientvit_b1@512 16x16_32",
    "efficientvit_b3@224", "swin_tiny@224 3x32_56x56", "swin_large@384 6x32_96x96",
    "efficientvit_b1@256",
)  # fmt: skip
"""The shapes, with channels last, at which times are taken and for which configurations are searched."""
TUNED = ("patch_attention", "window_attention", "multiscale_linear_attention", "mobile_to_former",
         "relu_linear_attention", "former_to_mobile", "patch_transformer_layer", "inverted_residual")  # fmt: skip
"""The ops for which configurations are searched, in this order."""
COMPILED = ("mobilevit_s@256", "efficientvit_b1@512 8x16_32", "efficientvit_b1@512 16x16_32", "294m@224 2x24_")
"""The shapes at which torch.compile is a peer too: to compile takes most of the time."""
LARGE = "sana_1600m"
"""A model whose maps are too large for a batch of 128."""
KERNELS = "forward|backward|bias_|norm_ffn|_rows|rows_wide|attend_|_slices|_merge|aggregate|weight_"
"""What tells this library's kernels from PyTorch's by a part of the name."""
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats", "InstructionStats")


@dataclass(frozen=True)
class Step:
    """A command, and how many seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float
    beside: bool = False
    """Whether others run at the same time: it is not timed."""
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    """A program without which the step is left out, and the report says so."""


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def steps(rehearse: bool = False, cores: int = 16, cached: bool = False) -> list[Step]:
    """What is run, in this order; ``cached``: without the steps that only compile ops."""
    device, backend = ("cpu", "cpp") if rehearse else ("cuda", "triton")
    dtype = "float32" if rehearse else "bfloat16"
    batches = ("1",) if rehearse else ("128", "1")
    tests = python("-m", "pytest", "-q", "-m", "not interpreter")
    workers = str(max(1, min(8, cores // 2)))
    where = ("--dtype", dtype, "--batch", batches[0], "--shape", *SHAPES, "--layout", "channels_last")
    kernels = python(str(HERE / "gpu_kernels.py"), *where)
    compiler = python(str(HERE.parent / "csrc" / "cuda" / "compile.py"))
    found = [Step("CUDA C++", compiler, 100, needs="nvcc"), Step("info", python("-m", "mvkernels", "info"), 30)]
    for each in DTYPES:
        # The interpreter's products of bfloat16 are wrong, and two dtypes of it are more than there is time for.
        interpreted = rehearse and each == "float32"
        for op in report.ops_with(["triton"]):
            there = backend if backend in OPS[op].why_not else "reference"
            of = ("--dtype", each, "--device", device, "--backend", "triton" if interpreted else there, "--json")
            step = Step(f"verify {op} {each}", python("-m", "mvkernels", "verify", "--op", op, *of), 170, beside=True)
            found.append(replace(step, environment={"TRITON_INTERPRET": "1"}) if interpreted else step)
        for op in report.ops_with(["cuda"]):
            of = ("--dtype", each, "--device", device, "--backend", "cpp" if rehearse else "cuda", "--json")
            line = python("-m", "mvkernels", "verify", "--op", op, *of)
            found.append(Step(f"verify {op} {each}, CUDA C++", line, 100, beside=True))
    line = (*tests, "tests/ops/test_device.py", "-k", "one_shape")
    found.append(Step("tests with tf32", line, 120, beside=True, environment={"MVKERNELS_TEST_TF32": "1"}))
    device_tests = (*tests, "-n", workers, "tests/ops/test_device.py", "-k")
    found.append(Step("tests of graphs", (*device_tests, "bits or graph"), 100, beside=True))
    found.append(Step("tests of sizes", (*device_tests, "not bits and not graph and not one_shape"), 170, beside=True))
    # Each tensor an allocation of its own: in a block that PyTorch keeps, what is read past an end is not seen.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitized = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")
    one_shape = (*tests, "tests/ops/test_device.py", "-k", "one_shape and bfloat16")
    found.append(
        Step("memcheck", (*sanitized, *one_shape), 60, beside=True, environment=alone, needs="compute-sanitizer")
    )
    for k in range(0 if cached else cores - 4):
        found.append(Step(f"compile {k}", (*kernels, "--share", f"{k}/{cores - 4}"), 170, beside=True))
    for model in MODELS:  # precompile.py does not know the sizes of their maps
        line = whole(model, device, dtype, "--rounds", "1", "--no-file", "--no-compile")
        found.append(Step(f"compile {model}", line, 120, beside=True))
    found.append(Step("times", timed(device, dtype, batches, "eager,sdpa", SHAPES), 150))
    for model in MODELS:
        found.append(Step(f"time {model}", whole(model, device, dtype, "--seconds", "1", "--no-compile"), 60))
    found.append(Step("kernels", kernels, 80))
    in_cuda = [part for op in report.ops_with(["cuda"]) for part in ("--op", op)]
    found.append(Step("kernels, CUDA C++", (*kernels, "--backend", "cuda", *in_cuda), 40))
    large = ("--op", "relu_linear_attention", "multiscale_linear_attention")
    found.append(Step(f"times of {LARGE}", (*timed(device, dtype, ("2",), "eager", (LARGE,)), *large), 40))
    found.append(Step("times, compiled peers", timed(device, dtype, batches[:1], "eager,sdpa,compile", COMPILED), 180))
    # After the times: it takes as long as it is given. What it finds is for the next run.
    tuned = [part for op in TUNED for part in ("--op", op)]
    search = (*tuned, "--dtype", dtype, "--filter", *SHAPES, "--layout", "channels_last", "--min-time", "0.02")
    search += ("--processes", "1") if cached else ()
    found.append(Step("tune", python("-m", "mvkernels", "tune", *search), 150))
    # Setting clocks needs rights, and times are taken without it.
    counters = ("ncu", "--clock-control", "none", "--csv", "--page", "details", "--kernel-name", f"regex:{KERNELS}")
    counters += tuple(part for name in SECTIONS for part in ("--section", name))
    for op, (layout, *shapes) in COUNTED.items():
        line = ("--op", op, "--layout", layout, "--shape", *shapes, "--batch", "128", "--share", "0/1")
        found.append(Step(f"counters {op}", (*counters, *python(str(HERE / "gpu_kernels.py"), *line)), 30, needs="ncu"))
    for model in MODELS:
        found.append(Step(f"time {model}, compiled", whole(model, device, dtype, "--seconds", "1"), 180))
    return [replace(step, seconds=min(step.seconds, 60)) for step in found] if rehearse else found


def whole(model: str, device: str, dtype: str, *more: str) -> tuple[str, ...]:
    """The command that measures a whole model."""
    batch = "128" if device == "cuda" else "1"
    line = ("--model", model, "--size", str(MODELS[model]), "--device", device, "--dtype", dtype)
    line += ("--batch", batch, "--channels-last", *more)
    return python(str(HERE / "swapped.py"), *line)


def timed(device: str, dtype: str, batches: Sequence[str], against: str, shapes: Sequence[str]) -> tuple[str, ...]:
    """The command that measures the ops against their peers."""
    line = ("--device", device, "--dtype", dtype, "--batch", *batches, "--against", against, "--shape", *shapes)
    return python(str(HERE / "ops.py"), *line, "--layout", "channels_last")
