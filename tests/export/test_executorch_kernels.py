"""ExecuTorch's package can be given kernels: docs/compatibility.md says so, and what that needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = """
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>
using namespace executorch::runtime;
static void scaled(KernelRuntimeContext& context, Span<EValue*> stack) {  // x, factor, out, and out again
  const auto& x = stack[0]->toTensor();
  auto& out = stack[2]->toTensor();
  if (resize_tensor(out, x.sizes()) != Error::Ok) return context.fail(Error::InvalidArgument);
  const float factor = float(stack[1]->toDouble());
  for (ssize_t i = 0; i < x.numel(); ++i)
    out.mutable_data_ptr<float>()[i] = factor * x.const_data_ptr<float>()[i];
}
static const Kernel kernel("mvkernels_test::scaled.out", scaled);
static const Error registered = register_kernels({&kernel, 1});
"""

# In a process of its own: a kernel stays registered for as long as the runtime is loaded.
PROGRAM = """
import ctypes
import sys

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

library = torch.library.Library("mvkernels_test", "FRAGMENT")
library.define("scaled(Tensor x, float factor) -> Tensor")
library.define("scaled.out(Tensor x, float factor, *, Tensor(a!) out) -> Tensor(a!)")
library.impl("scaled", lambda x, factor: x * factor, "CompositeExplicitAutograd")
library.impl("scaled.out", lambda x, factor, *, out: out.copy_(x * factor), "CompositeExplicitAutograd")
torch.library.register_fake("mvkernels_test::scaled", lambda x, factor: torch.empty_like(x), lib=library)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return torch.ops.mvkernels_test.scaled(self.conv(x).unflatten(1, (2, 4)), 2.5).flatten(1, 2)


x, model = torch.randn(1, 3, 8, 8), Model().eval()
with torch.no_grad():
    edge = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    buffer = edge.to_executorch().buffer
    wanted = model(x)
runtime = Runtime.get()
assert "mvkernels_test::scaled.out" not in runtime.operator_registry.operator_names
ctypes.CDLL(sys.argv[1])
assert "mvkernels_test::scaled.out" in runtime.operator_registry.operator_names
out = runtime.load_program(buffer).load_method("forward").execute([x])[0]
torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
"""


def test_a_kernel_of_ours_runs_in_the_packages_runtime(tmp_path: Path) -> None:
    executorch = pytest.importorskip("executorch.runtime")
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ and Linux")
    package = Path(executorch.__file__).parents[1]
    include, built = package / "include", tmp_path / "libkernel.so"
    source = tmp_path / "kernel.cpp"
    source.write_text(KERNEL)
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"]
    flags += ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED"]
    flags += [f"-I{include}", f"-I{include / 'executorch/runtime/core/portable_type/c10'}"]
    link = [f"-L{package / 'lib'}", "-l:libexecutorch.so"]
    subprocess.run([compiler, *flags, str(source), *link, "-o", str(built)], check=True)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(built)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
