"""Importing is light, touches nothing, and works without the optional parts. Each case is a fresh interpreter."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from mvkernels.dispatch import extension

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r} or name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
USE = """
import torch, mvkernels
q = torch.randn(1, 2, 4, 6, 6, requires_grad=True)
mvkernels.patch_attention(q, q, q, 2).sum().backward()
assert q.grad.isfinite().all()
print(mvkernels.can_run("patch_attention", "cpp", q, q, q), mvkernels.can_run("patch_attention", "triton", q, q, q))
x, one, square = torch.randn(1, 8, 4, 4), torch.ones(8), torch.eye(8)
layer = x, one, one, torch.randn(24, 8), None, square, one, one, one, square, one, square, one, 2
print(mvkernels.can_run("patch_transformer_layer", "cuda", *layer))
"""


def test_without_the_extension():
    done = python(BLOCK.format(blocked=["mvkernels._C"]) + USE)
    assert done.returncode == 0, done.stderr
    assert "is not built" in done.stdout


def test_without_triton():
    done = python(BLOCK.format(blocked=["triton"]) + USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Triton cannot be imported") == 2
    assert "the kernels around the attention are Triton's. Triton cannot be imported" in done.stdout


def test_a_stale_extension_is_refused_with_the_reason():
    code = "import mvkernels._C as c\nprint(c.interface())"
    if extension.module is None:
        pytest.skip(extension.reason)
    assert python(code).returncode == 0
    stale = """
import sys, types
fake = types.ModuleType("mvkernels._C"); fake.interface = lambda: -1
sys.modules["mvkernels._C"] = fake
"""
    done = python(stale + USE)
    assert done.returncode == 0, done.stderr
    assert "was built for interface -1" in done.stdout


def test_an_older_torch_is_told_what_the_extension_needs():
    done = python("import torch\ntorch.__version__ = '2.9.1'\n" + USE)
    assert done.returncode == 0, done.stderr
    assert "needs torch 2.10" in done.stdout
    info = "from mvkernels.commands import cli\ncli.main(['info'])"
    done = python("import torch\ntorch.__version__ = '2.9.1'\n" + info)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("C++ extension: "))
    used = [name for name in (ROOT / "release/torch_symbols.txt").read_text().split("\n") if name and name[0] != "#"]
    assert line == (
        "C++ extension: not available: the C++ extension needs torch 2.10 or newer: the C interface of torch 2.9.1 "
        f"lacks 8 of the {len(used)} functions that it uses; "
        "install torch>=2.10, until then the reference and Triton run"
    )
    assert re.search(r"^patch_attention +cpu +reference +yes$", done.stdout, re.MULTILINE)


def test_import_is_light():
    code = """
import sys, time, torch
start = time.process_time()
import mvkernels
print(time.process_time() - start)
heavy = {"triton", "timm", "transformers", "torchvision", "matplotlib", "numpy.testing", "diffusers"}
print(sorted(heavy & set(sys.modules)))
print(torch.cuda.is_initialized())
"""
    reports = [python(code).stdout.split("\n") for _ in range(3)]
    assert min(float(r[0]) for r in reports) < 0.5
    assert reports[0][2] == "False"
    without = python("import sys, torch\nprint(sorted({'triton', 'numpy.testing'} & set(sys.modules)))").stdout.strip()
    assert reports[0][1] in ("[]", without)


def test_importing_changes_no_global():
    code = """
import torch, logging, random
state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                 torch.initial_seed(), logging.root.handlers[:], random.getstate(), torch.random.get_rng_state().sum())
before = state()
import mvkernels
after = state()
print(before == after)
"""
    assert python(code).stdout.strip() == "True"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
def test_the_extension_is_built_where_there_is_a_compiler():
    if os.environ.get("MVKERNELS_SKIP_EXT") == "1" or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        pytest.skip("the extension was not asked for")
    assert extension.module is not None, extension.reason


@pytest.mark.skipif(extension.module is None, reason=extension.reason)
class TestTheBinary:
    def test_instruction_set_by_environment(self):
        code = "from mvkernels.dispatch import extension as e; print(e.instruction_set(), '|', e.reason)"
        for name in extension.module.instruction_sets():
            assert python(code, MVKERNELS_CPU_ISA=name).stdout.split()[0] == name
        done = python(code, MVKERNELS_CPU_ISA="altivec")
        assert done.returncode == 0 and "altivec is not built" in done.stdout

    def test_one_binary_serves_several_pythons(self):
        assert extension.module.__file__.endswith(".abi3.so")
        assert extension.build_info()["minimum_torch"] == "2.10"

    def test_the_instruction_sets_share_no_code(self):
        """A weak symbol would be merged over the units, and an old processor might get the newest set's copy."""
        nm = shutil.which("nm")
        if nm is None:
            pytest.skip("no nm")
        symbols = subprocess.run(
            [nm, "-C", extension.module.__file__], capture_output=True, text=True, check=True
        ).stdout
        kernels = [s for s in symbols.splitlines() if "mvk::" in s and any(f"::{i}::" in s for i in ("avx2", "avx512"))]
        assert kernels
        assert not [s for s in kernels if s.split()[1] in "WVuw"]


def test_skipping_the_extension_builds_a_pure_package(tmp_path):
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("not a checkout")
    for name in files:
        if name.startswith(
            ("mvkernels/", "csrc/", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MVKERNELS_SKIP_EXT": "1", "MVKERNELS_SKIP_CUDA": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" in wheel.name
    assert time.monotonic() - start < 120
    where = tmp_path / "installed"
    shutil.unpack_archive(wheel, where, format="zip")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "mvkernels", "info"],  # -S: an editable install here would lend its extension
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(where), sysconfig.get_paths()["platlib"]])},
    )
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout
