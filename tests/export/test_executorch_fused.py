"""The ops as ExecuTorch's kernels: their values in its runtime, whole models, and what is refused."""

from __future__ import annotations

import copy
import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mvkernels
from mvkernels import export
from mvkernels.commands import cli
from mvkernels.dispatch import extension
from mvkernels.dispatch.exporting import keep_in_exports
from mvkernels.export import targets
from mvkernels.export.nodes import NODES, replace_operators
from mvkernels.report import UsageError
from tests.export.test_export import IMAGE, Small
from tests.swap.conftest import randomise


@pytest.fixture(autouse=True)
def _executorch() -> Iterator[None]:
    """Fresh buffers are full of NaN in the kernels."""
    pytest.importorskip("executorch.runtime")
    if extension.module is None or sys.platform != "linux":
        pytest.skip("needs the C++ extension, on Linux")
    # Not skipped without the library: it is built with the extension where ExecuTorch is installed before.
    library = ctypes.CDLL(export.register_executorch())
    library.mvkernels_set_poison(1)
    yield
    library.mvkernels_set_poison(0)


class Calls(nn.Module):
    """A model that is one call, with parameters."""

    def __init__(self, function: Callable[..., Tensor], *parameters: Tensor) -> None:
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(parameters)

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(*given, *self.weights)


def written(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, dynamic: object = None) -> list[torch.fx.Node]:
    """Exports a model with its ops kept. Returns the nodes of the ops."""
    from mvkernels.export.operators import executorch_node

    with keep_in_exports(*NODES), torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    assert replace_operators(program, executorch_node) > 0
    # The operators compute in torch too.
    torch.testing.assert_close(program.module()(*inputs), reference(model, inputs), rtol=2e-5, atol=2e-5)
    nodes = [node for node in program.graph.nodes if str(node.target).startswith("mvkernels.")]
    with export.quiet():
        targets.FUSED["executorch"].write(program, path)
    return nodes


def reference(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    exact = [each.double() for each in inputs]
    with mvkernels.use_backend("reference"), torch.no_grad():
        found: Tensor = copy.deepcopy(model).double()(*exact)
    return found.float()


def method(path: Path) -> Callable[..., Tensor]:
    from executorch.runtime import Runtime

    export.register_executorch()
    loaded = Runtime.get().load_program(path).load_method("forward")
    return lambda *inputs: loaded.execute([each.contiguous() for each in inputs])[0].clone()


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def packed_last(qkv: Tensor) -> list[Tensor]:
    """Maps of a linear layer's result (B, H, W, 3 x 2 heads x 5)."""
    return [each.unflatten(-1, (2, 5)).permute(0, 3, 4, 1, 2) for each in qkv.chunk(3, -1)]


def packed_first(qkv: Tensor) -> list[Tensor]:
    """Maps of a convolution's result (B, 2 heads x 3 x 5, H, W), as EfficientViT has them."""
    return list(qkv.unflatten(1, (2, 15)).split(5, 2))


def cut(qkv: Tensor) -> list[Tensor]:
    """Maps that no place describes: a tensor without its last column."""
    return packed_last(qkv[:, :, :-1])


def patch(layout: Callable[[Tensor], list[Tensor]]) -> Callable[..., Tensor]:
    return lambda qkv, bias=None: mvkernels.patch_attention(*layout(qkv), (2, 3), bias=bias, scale=0.7)


def window(qkv: Tensor, bias: Tensor) -> Tensor:
    return mvkernels.window_attention(*packed_last(qkv), (3, 4), shift=(1, 2), bias=bias)


def linear(layout: Callable[[Tensor], list[Tensor]]) -> Callable[..., Tensor]:
    return lambda qkv: mvkernels.relu_linear_attention(*layout(qkv), eps=1e-4)


def scales(last: bool, biased: bool) -> Callable[..., Tensor]:
    def call(qkv: Tensor, wide: Tensor, mixing: Tensor, bias: Tensor) -> Tensor:
        qkv = qkv.permute(0, 3, 1, 2) if last else qkv
        biases = {"depthwise_bias": [bias], "pointwise_bias": [bias + 1]} if biased else {}
        return mvkernels.multiscale_linear_attention(qkv, [wide], [mixing], head_dim=4, eps=1e-4, **biases)

    return call


# A scale of 3 x 3 over two heads of 4.
SCALE = (random(24, 1, 3, 3), random(24, 4, 1, 1), random(24))

SLOPE = random(1, 30, 5, 7)

OPS = {
    "patch_attention of a linear layer": (Calls(patch(packed_last)), (random(2, 7, 11, 30),)),
    "patch_attention of a convolution": (Calls(patch(packed_first)), (random(1, 30, 5, 7),)),
    "patch_attention with a bias": (Calls(patch(packed_last), random(2, 6, 6)), (random(3, 4, 9, 30),)),
    "patch_attention of a copy": (Calls(patch(cut)), (random(2, 5, 8, 30),)),
    "window_attention": (Calls(window, random(2, 12, 12)), (random(2, 7, 9, 30),)),
    "relu_linear_attention of a linear layer": (Calls(linear(packed_last)), (random(3, 5, 7, 30),)),
    "relu_linear_attention of a convolution": (Calls(linear(packed_first)), (random(1, 30, 7, 9),)),
    "multiscale_linear_attention": (Calls(scales(False, False), *SCALE), (random(2, 24, 5, 7),)),
    "multiscale_linear_attention, channels last": (Calls(scales(True, True), *SCALE), (random(1, 7, 5, 24),)),
    "mobile_to_former": (
        Calls(lambda x, tokens: mvkernels.mobile_to_former(tokens, x.unflatten(1, (2, 5)), scale=0.6)),
        (random(2, 10, 7, 9), random(2, 2, 3, 5)),
    ),
    "former_to_mobile": (
        Calls(lambda x, key: mvkernels.former_to_mobile(x.unflatten(1, (2, 5)), key, key + 1, scale=0.6)),
        (random(2, 10, 7, 9), random(2, 2, 3, 5)),
    ),
    "former_to_mobile, channels last, not added": (
        Calls(
            lambda x, key: mvkernels.former_to_mobile(
                x.unflatten(-1, (2, 5)).permute(0, 3, 4, 1, 2),
                key.transpose(1, 2),
                2 * key.transpose(1, 2),
                residual=False,
            )
        ),
        (random(1, 5, 7, 10), random(1, 3, 2, 5)),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_the_values_of_the_reference(name: str, tmp_path: Path) -> None:
    model, inputs = OPS[name]
    (node,) = written(model, inputs, tmp_path / "op.pte")
    assert node.target.name() == f"mvkernels::{name.split(maxsplit=1)[0].rstrip(',')}"
    if "layer" in name or "convolution" in name:  # read where they lie
        assert node.args[0] is node.args[2] is node.args[4]
    found, expected = method(tmp_path / "op.pte")(*inputs), reference(model, inputs)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_sizes_may_change(tmp_path: Path) -> None:
    """Also to what is smaller than the example: the sizes of the result are those of the call."""
    dim = torch.export.Dim
    dynamic = [({0: dim("batch", max=4), 1: dim("height", min=2, max=16), 2: dim("width", min=2, max=16)},)]
    model = Calls(linear(packed_last))
    written(model, (random(2, 6, 8, 30),), tmp_path / "op.pte", dynamic)
    run = method(tmp_path / "op.pte")
    for sizes in ((2, 6, 8, 30), (1, 3, 5, 30), (4, 15, 9, 30)):
        inputs = (random(*sizes),)
        torch.testing.assert_close(run(*inputs), reference(model, inputs), rtol=2e-5, atol=2e-5)


def test_another_type_is_refused(tmp_path: Path) -> None:
    """Its elements would be read as float32."""
    model, inputs = Calls(linear(packed_first)), (random(1, 30, 5, 7).double(),)
    with keep_in_exports(*NODES), torch.no_grad():
        program = torch.export.export(model, inputs)
    with export.quiet():
        targets.FUSED["executorch"].write(program, tmp_path / "op.pte")
    with pytest.raises(RuntimeError):
        method(tmp_path / "op.pte")(*inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_export_is_run_and_compared(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(Small())
    found = export.export_model(model, IMAGE, "executorch", tmp_path / "small.pte", fused=True, dynamic=dynamic)
    assert found.ok and found.checked == [[2, 3, 16, 24], [3, 3, 48, 88]][: 1 + dynamic]
    assert found.details["fused_nodes"] == 3 and found.details["library"] == export.executorch_library()
    ops = ("patch_attention", "mobile_to_former", "former_to_mobile")
    assert all(found.details["not_delegated"][f"mvkernels.{op}.default"] == 1 for op in ops)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nodes"),
    [("transformers:mobilevit_xxs", 9), ("mvmodels:efficientvit_b0", 4), ("mvmodels:mobile_former_26m", 17)],
)
def test_a_model_exported_with_its_ops(name: str, nodes: int, tmp_path: Path) -> None:
    from mvkernels import third_party

    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    model = third_party.build(name)
    found = export.export_model(model, torch.rand(1, 3, 64, 64), "executorch", tmp_path / "model.pte", fused=True)
    assert found.ok and found.checked == [[1, 3, 64, 64]]
    assert found.details["fused_nodes"] == nodes
    # XNNPACK has the products, whose weights are constants.
    assert not {"aten.addmm.default", "aten.mm.default", "aten.bmm.default"} & set(found.details["not_delegated"])


THREADS = """
import sys
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from mvkernels import export

portable_lib._unsafe_reset_threadpool(3)
assert portable_lib._threadpool_get_thread_count() == 3
export.register_executorch()
export.register_executorch()
inputs, expected = torch.load(sys.argv[2])
loaded = Runtime.get().load_program(sys.argv[1]).load_method("forward")
torch.testing.assert_close(loaded.execute(list(inputs))[0], expected, rtol=2e-5, atol=2e-5)
"""


def test_several_threads_share_one_head(tmp_path: Path) -> None:
    """In a process of its own: the pool is one for all methods, and may not change while one is loaded."""
    model, inputs = Calls(linear(packed_first)), (random(1, 30, 300, 203),)
    written(model, inputs, tmp_path / "op.pte")
    torch.save((inputs, reference(model, inputs)), tmp_path / "values.pt")
    command = [sys.executable, "-c", THREADS, str(tmp_path / "op.pte"), str(tmp_path / "values.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


APPLICATION = """
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <cstdio>
extern "C" const char* mvkernels_register_executorch();
int main(int, char** arguments) {
  if (mvkernels_register_executorch()) return 2;
  executorch::extension::Module model(arguments[1]);
  auto image = executorch::extension::ones({1, 30, 5, 7});
  const auto found = model.forward(image);
  if (!found.ok()) return 3;
  const auto out = found->at(0).toTensor();
  for (ssize_t i = 0; i < out.numel(); ++i) std::printf("%.9g\\n", out.const_data_ptr<float>()[i]);
}
"""


def test_an_application_without_python(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    import executorch.runtime

    model = Calls(patch(lambda x: packed_first(x * SLOPE)))
    written(model, (torch.ones(1, 30, 5, 7),), tmp_path / "op.pte")
    (tmp_path / "main.cpp").write_text(APPLICATION)
    package, ours = Path(executorch.runtime.__file__).parents[1], Path(export.executorch_library())
    flags = ["-std=c++17", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED"]
    flags += [f"-I{package / 'include'}", f"-I{package / 'include/executorch/runtime/core/portable_type/c10'}"]
    libraries = ("executorch", "executorch_threadpool", "executorch_kernels_optimized", "executorch_backend_xnnpack")
    link = ["-Wl,--no-as-needed", f"-L{package / 'lib'}", *(f"-l{name}" for name in libraries), str(ours)]
    link += [f"-Wl,-rpath,{package / 'lib'}:{ours.parent}"]
    line = [compiler, *flags, str(tmp_path / "main.cpp"), *link, "-o", str(tmp_path / "main")]
    subprocess.run(line, check=True)
    done = subprocess.run([tmp_path / "main", tmp_path / "op.pte"], capture_output=True, text=True, check=True)
    found = torch.tensor([float(each) for each in done.stdout.split()])
    expected = reference(model, (torch.ones(1, 30, 5, 7),)).flatten()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_an_unknown_instruction_set_is_told() -> None:
    command = [sys.executable, "-c", "from mvkernels import export; export.register_executorch()"]
    environment = {**os.environ, "MVKERNELS_CPU_ISA": "mmx"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0 and "MVKERNELS_CPU_ISA" in done.stderr


def test_a_library_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "__file__", str(tmp_path / "mvkernels" / "export" / "targets.py"))
    assert cli.main(["export", "mvmodels:efficientvit_b0", "--to", "executorch", "--fused"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "no libmvkernels_executorch.so in this installation" in err


def test_kernels_for_another_version_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.0" if name == "executorch" else real(name))
    with pytest.raises(UsageError, match=r"are built for executorch .*, but 9\.0 is installed"):
        export.export_model(Small(), IMAGE, "executorch", tmp_path / "small.pte", fused=True)
    assert not (tmp_path / "small.pte").exists()
