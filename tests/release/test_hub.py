"""The package for Hugging Face's `kernels` library, as that library loads it: without mvkernels, and beside it."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mvkernels
from mvkernels.dispatch.registry import OPS
from release import hub as maker

ROOT = Path(__file__).resolve().parents[2]
interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    return [value] if isinstance(value, torch.Tensor) else []


def run(function: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The output, and a gradient of every tensor."""
    inputs = [tensor.requires_grad_() for tensor in tensors(list(arguments.values()))]
    out = function(**arguments)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(-1))]


# What every script begins with.
LOAD = f"""
import importlib, pkgutil, sys
from pathlib import Path
from typing import Any
import torch
from kernels import get_loaded_kernels, get_local_kernel

{inspect.getsource(tensors)}
{inspect.getsource(run)}
"""
# In which nothing can import mvkernels.
ALONE = (
    LOAD
    + """
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mvkernels", "mvmodels"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
package = get_local_kernel(Path(sys.argv[1]), backend="cpu")
try:
    import mvkernels
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("mvkernels can be imported here")
"""
)
EVERY_OP = (
    ALONE
    + """
given = torch.load(sys.argv[2])
torch.save({name: run(getattr(package, name), given[name]) for name in given}, sys.argv[3])
assert not package.can_run("patch_attention", "cpp", *[torch.ones(1, 1, 1, 2, 2)] * 3)[0]
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(found.name)
assert not [name for name in sys.modules if name.partition(".")[0] in ("mvkernels", "mvmodels")]
assert all(hasattr(package, name) for name in package.__all__)
"""
)
TOGETHER = (
    LOAD
    + """
import mvkernels
packages = [mvkernels] + [get_local_kernel(Path(each), backend="cpu") for each in sys.argv[1:]]
assert len({package.__name__ for package in packages}) == 3
assert packages[1].__version__ != packages[2].__version__ == "1.2.3"
maps = {name: torch.randn(1, 2, 4, 6, 8, dtype=torch.float64) for name in ("query", "key", "value")}
found = [run(package.patch_attention, maps | {"backend": "reference"}) for package in packages]
for each in found[1:]:
    torch.testing.assert_close(each, found[0])
for package in packages[1:]:
    assert package.patch_attention is not mvkernels.patch_attention
    assert hasattr(getattr(torch.ops, package.__name__), "triton_patch_attention_forward"), package.__name__
    for name in ("patch_attention", "window_attention"):
        assert package.can_run(name, "reference", *maps.values(), 2) == (True, "")
assert sorted(each.metadata.id for each in get_loaded_kernels()) == sorted(package.__name__ for package in packages[1:])
"""
)


def python(script: str, *arguments: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr


def compare(folder: Path, given: dict[str, dict[str, Any]], within: float) -> None:
    """Values and gradients of the package's ops, against the library's references in float64."""
    torch.save(given, folder / "given.pt")
    python(EVERY_OP, folder / "hub", folder / "given.pt", folder / "found.pt")
    found = torch.load(folder / "found.pt")
    for name, arguments in given.items():
        exact = {
            key: value.double() if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
            if key != "backend"
        }
        wanted = run(OPS[name].function, exact | {"backend": "reference"})
        assert len(found[name]) == len(wanted) > 1
        for ours, right in zip(found[name], wanted):
            error = float((ours - right).abs().max() / right.abs().max())
            assert ours.shape == right.shape and error <= within, f"{name}: {error}"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    maker.write(tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.core
def test_every_op_without_mvkernels(hub: Path) -> None:
    given = {}
    for name, op in OPS.items():
        cases = [case.make(dtype=torch.float64) for case in op.suite("small")]
        given[name] = min(cases, key=lambda each: sum(tensor.numel() for tensor in tensors(list(each.values()))))
        given[name]["backend"] = "reference"
    compare(hub.parent, given, within=1e-12)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1 from the start")
def test_triton_kernels_without_mvkernels(hub: Path) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 8, 6, 8)
    tokens, keys = torch.randn(2, 1, 2, 3, 8)
    given: dict[str, dict[str, Any]] = {
        "patch_attention": {"query": query, "key": key, "value": value, "patch_size": 2},
        "window_attention": {"query": query, "key": key, "value": value, "window_size": 4, "shift": (1, 2)},
        "relu_linear_attention": {"query": query, "key": key, "value": value},
        "mobile_to_former": {"query": tokens, "x": value},
        "former_to_mobile": {"x": value, "key": tokens, "value": keys},
    }
    compare(hub.parent, {name: each | {"backend": "triton"} for name, each in given.items()}, within=5e-6)


def test_two_versions_beside_the_library(hub: Path, tmp_path: Path) -> None:
    other = tmp_path / "sources"
    shutil.copytree(
        ROOT / "mvkernels", other / "mvkernels", ignore=shutil.ignore_patterns("data", "*.so", "__pycache__")
    )
    (other / "mvkernels" / "version.py").write_text('__version__ = "1.2.3"\n')
    shutil.copy(ROOT / "LICENSE", other)
    maker.write(tmp_path / "second", root=other)
    python(TOGETHER, hub, tmp_path / "second")


def test_what_kernels_reads_of_it(hub: Path) -> None:
    from kernels import Metadata
    from kernels._rust import Digest
    from kernels.variants import get_variants_local

    variants = {each.variant_str for each in get_variants_local(hub / "build")}
    assert variants == {f"torch-{backend}" for backend in maker.BACKENDS}
    for folder in (hub / "build").iterdir():
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert metadata.id.isidentifier() and metadata.name.python_name == "mvkernels"
        assert metadata.version == int(mvkernels.__version__.split(".")[0])
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder))


def test_every_import_is_relative_and_there(hub: Path) -> None:
    folder = hub / "build" / "torch-cuda"
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.partition(".")[0] == "mvkernels" for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module and node.module.partition(".")[0] != "mvkernels", path
            elif isinstance(node, ast.ImportFrom):
                target = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert target.is_relative_to(folder), path
                assert (target / "__init__.py").exists() or target.with_suffix(".py").exists(), (path, node.module)
    assert not [path for path in folder.rglob("*") if path.suffix in (".so", ".xz", ".cubin")]


def test_the_folder_of_its_name_is_the_same_package(hub: Path) -> None:
    # Where versions of `kernels` before the flat layout look for it.
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("older", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.patch_attention.__module__.startswith("_mvkernels_xpu_") and "window_attention" in module.__all__
"""
    python(script, hub / "build" / "torch-xpu" / "mvkernels" / "__init__.py")


def test_the_same_every_time(hub: Path) -> None:
    before = {path: path.read_bytes() for path in hub.rglob("*") if path.is_file()}
    (hub / "build" / "torch-cpu" / "stale.py").touch()
    maker.write(hub)
    assert {path: path.read_bytes() for path in hub.rglob("*") if path.is_file()} == before
    assert "tags:\n- kernel\n" in (hub / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from mvkernels import nn", "from ... import nn"),
        ("from mvkernels.ops.one import x", "from . import x"),
        ("from mvkernels.ops.one.two import (\n    x,  # é\n)", "from .two import (\n    x,  # é\n)"),
        ("é = 1; from mvkernels.triton import maps", "é = 1; from ...triton import maps"),
        ("import mvkernels.triton.maps as maps", "from ...triton import maps as maps"),
        ("importlib.import_module('mvkernels._C')", 'importlib.import_module("..._C", __package__)'),
        ("say('from mvkernels import x')", "say('from mvkernels import x')"),
    ],
)
def test_imports_become_relative(text: str, wanted: str) -> None:
    assert maker.portable(text, "mvkernels.ops.one", True)[0] == wanted


@pytest.mark.parametrize("text", ["import mvkernels", "import mvkernels.triton", "import_module(f'mvkernels.{x}')"])
def test_imports_without_a_relative_form(text: str) -> None:
    with pytest.raises(maker.Failed, match=r"ops.one:1: "):
        maker.portable(text, "mvkernels.ops.one", True)


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    command = [sys.executable, "-m", "release.hub", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 1 and found.stderr.count("\n") == 1 and "mine.txt" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
