"""Builds the optional C++ extension ``mvkernels._C``, the same kernels as a library of custom ops of ONNX Runtime and,
where the package executorch is installed, as a library of kernels of ExecuTorch; everything else is in pyproject.toml.

The extension uses only torch's stable C interface (torch >= 2.10) and Python's limited API, so one
binary serves several versions of both. Each kernel source is compiled once per instruction set and
chosen at run time, never with -march=native, so what was built for all sets runs on older processors.

Where there is nvcc, the kernels in CUDA C++ are compiled too, and shipped as data (csrc/cuda/compile.py).

Environment: ``MVKERNELS_SKIP_EXT=1`` builds in pure Python, ``MVKERNELS_SKIP_CUDA=1`` leaves out CUDA C++,
``MVKERNELS_SKIP_EXECUTORCH=1`` the library for ExecuTorch, and with ``MVKERNELS_REQUIRE_EXT=1`` or
``MVKERNELS_REQUIRE_CUDA=1`` what cannot be built is an error; ``MAX_JOBS`` bounds parallel compilers (by default what
cores and free memory allow); ``MVKERNELS_CXXFLAGS`` is appended to the flags.
``MVKERNELS_BUILD_ISAS`` says for which instruction sets to build: by default for those that this processor has,
``all`` for every one, as a wheel needs it, ``native`` for the best of this processor alone, ``avx2,avx512`` for these
and for the first, which every processor has.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KERNELS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*/*.cpp"))
HEADERS = sorted(
    str(p.relative_to(ROOT)) for of in ("cpu", "onnxruntime", "executorch") for p in (ROOT / "csrc" / of).rglob("*.h")
)
REGISTER = "csrc/cpu/register.cpp"
# The same kernels for ONNX Runtime: a library of its own, that needs neither torch nor Python.
ONNXRUNTIME = "csrc/onnxruntime/register.cpp"
ONNXRUNTIME_LIBRARY = "libmvkernels_onnxruntime.so"
# And for ExecuTorch: it links to the libraries of its package, whose headers are in there too.
EXECUTORCH = "csrc/executorch/register.cpp"
EXECUTORCH_LIBRARY = "libmvkernels_executorch.so"
EXECUTORCH_LINKS = ("libexecutorch.so", "libexecutorch_threadpool.so")
TORCH_TARGET = "0x020a000000000000"  # the oldest torch the binary runs on: 2.10
MEMORY_OF_A_COMPILER = 2 << 30

ISA_FLAGS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
            "-mprefer-vector-width=512",
        ],
    },
    "aarch64": {"neon": []},
}
MACOS = platform.system() == "Darwin"
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())


def jobs() -> int:
    """Parallel compilers: MAX_JOBS, else what cores and free memory allow."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    free = 4 << 30
    try:
        text = Path("/proc/meminfo").read_text()
        free = next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    return max(1, min(os.cpu_count() or 1, free // MEMORY_OF_A_COMPILER))


def chosen(isas: dict[str, list[str]], wanted: str) -> list[str]:
    """The sets to build for, from the value of MVKERNELS_BUILD_ISAS; exits if it has another name in it."""
    if wanted == "all":
        return list(isas)
    if wanted in ("", "native"):
        try:
            text = Path("/proc/cpuinfo").read_text()
        except OSError:  # not known which this processor has: all, of which it takes its own at run time
            return list(isas)
        has = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())
        needed = {name: {f[2:] for f in flags if f.startswith("-m") and "=" not in f} for name, flags in isas.items()}
        able = [name for name in isas if needed[name] <= has]
        return able[-1:] if wanted else able
    names = [name.strip() for name in wanted.split(",")]
    for unknown in (name for name in names if name not in isas):
        raise SystemExit(
            f"mvkernels: MVKERNELS_BUILD_ISAS: no {unknown!r}, want 'all', 'native' or some of {', '.join(isas)}"
        )
    return [name for number, name in enumerate(isas) if name in names or number == 0]


def executorch() -> Path | None:
    """The installed package executorch, if it has what its kernels are built with: from 1.5 on, and on Linux."""
    if os.environ.get("MVKERNELS_SKIP_EXECUTORCH") == "1":
        return None
    found = importlib.util.find_spec("executorch")
    for folder in (found and found.submodule_search_locations) or []:
        package = Path(folder)
        needed = [package / "include/executorch", *(package / "lib" / name for name in EXECUTORCH_LINKS)]
        if all(each.exists() for each in needed):
            return package
    return None


class BuildExtension(build_ext):
    """Compiles each kernel once per instruction set; a failure leaves a pure Python package."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # no compiler, no headers, a compiler too old: still a working install
            if os.environ.get("MVKERNELS_REQUIRE_EXT") == "1":
                raise
            if not self.inplace:  # a wheel would ship what an earlier build left here
                for left in self.get_outputs():
                    Path(left).unlink(missing_ok=True)
            print(f"mvkernels: building without the C++ extension: {error}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < (2, 10):
            raise RuntimeError(f"the extension needs torch 2.10 or newer, this is {torch.__version__}")
        isas = ISA_FLAGS.get(MACHINE, {"baseline": []})
        isas = {name: isas[name] for name in chosen(isas, os.environ.get("MVKERNELS_BUILD_ISAS", ""))}
        flags = [
            "-O2",
            "-std=c++20",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wall",
            "-Wno-maybe-uninitialized",
            "-g0",
        ]
        flags += ["-ffp-contract=fast", "-Wno-psabi"]
        # Mach-O has no such table, and clang warns of a flag that it does not use.
        flags += [] if MACOS else ["-fno-plt"]
        # Clang does not know all of GCC's warnings; GCC says nothing of unknown ones that are off.
        flags += ["-Wno-unknown-warning-option", "-Wno-undefined-var-template"]
        flags += shlex.split(os.environ.get("MVKERNELS_CXXFLAGS", ""))
        define = [f"-DMVK_{isa.upper()}=1" for isa in isas]
        info = {
            "torch": torch.__version__,
            "minimum_torch": "2.10",
            "python_limited_api": "3.10",
            "compiler": self._compiler_version(),
            "flags": " ".join(flags),
            "instruction_sets": list(isas),
        }
        quoted = json.dumps(json.dumps(info))
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        (build / "build_info.h").write_text(f"#define MVK_BUILD_INFO {quoted}\n")

        stable = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY", "-DPy_LIMITED_API=0x030a0000"]
        work = [
            (REGISTER, "register", [str(build), *ext.include_dirs, *include_paths()], [*define, *stable]),
            # It has no use for the backwards, which stand in the same headers.
            (ONNXRUNTIME, "onnxruntime", [], [*define, "-Wno-unused-function"]),
            *((source, isa, [], [*isas[isa], f"-DMVK_ISA={isa}"]) for source in KERNELS for isa in isas),
        ]

        def compiled(unit: tuple[str, str, list[str], list[str]]) -> list[str]:
            source, folder, includes, more = unit
            return self.compiler.compile(
                [source],
                str(build / folder),
                include_dirs=["csrc/cpu", *includes],
                extra_postargs=[*flags, *more],
            )

        if jobs() == 1:  # and no thread: emulated processors start no programs reliably once there was one
            found = [compiled(unit) for unit in work]
        else:
            with ThreadPoolExecutor(jobs()) as pool:
                found = list(pool.map(compiled, work))
        register, onnxruntime, *kernels = found
        objects = [name for names in kernels for name in names]
        # By name only, no rpath: `import torch` has loaded libtorch_cpu before. On macOS not even by name, which would
        # have a path in it: there what is undefined is looked up among all that is loaded, as Python's own functions.
        linked = (
            {"extra_postargs": ["-Wl,-undefined,dynamic_lookup"]}
            if MACOS
            else {"libraries": ["torch_cpu"], "library_dirs": library_paths()}
        )
        self.compiler.link_shared_object(
            [*register, *objects], self.get_ext_fullpath(ext.name), target_lang="c++", **linked
        )
        self.compiler.link_shared_object(
            [*onnxruntime, *objects], self._beside(ext, ONNXRUNTIME_LIBRARY), target_lang="c++"
        )
        self._build_executorch(ext, objects, [*flags, *define, "-Wno-unused-function"])

    def _build_executorch(self, ext: Extension, objects: list[str], flags: list[str]) -> None:
        """Left out where it cannot be built: everything else works without it."""
        library = self._beside(ext, EXECUTORCH_LIBRARY)
        Path(library).unlink(missing_ok=True)
        package = executorch()
        if package is None:
            return
        try:
            # As its own cmake/executorch-config.cmake says.
            its = ["-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED"]
            for folder in ("include", "include/executorch/runtime/core/portable_type/c10"):
                its += ["-isystem", str(package / folder)]
            its.append(f'-DMVK_EXECUTORCH="{importlib.metadata.version("executorch")}"')
            found = self.compiler.compile(
                [EXECUTORCH],
                str(Path(self.build_temp) / "executorch"),
                include_dirs=["csrc/cpu"],
                extra_postargs=[*flags, *its],
            )
            # No rpath here either: `import executorch.runtime` has loaded what it links to before.
            links = [f"-L{package / 'lib'}", *(f"-l:{name}" for name in EXECUTORCH_LINKS)]
            self.compiler.link_shared_object([*found, *objects], library, extra_postargs=links, target_lang="c++")
        except Exception as error:  # another version of its headers
            if os.environ.get("MVKERNELS_REQUIRE_EXT") == "1":
                raise
            print(f"mvkernels: building without the kernels for ExecuTorch: {error}", file=sys.stderr)

    def _beside(self, ext: Extension, library: str) -> str:
        return str(Path(self.get_ext_fullpath(ext.name)).with_name(library))

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            for library in (ONNXRUNTIME_LIBRARY, EXECUTORCH_LIBRARY):
                built = Path(self.build_lib) / Path(*ext.name.split(".")).with_name(library)
                Path(self._beside(ext, library)).unlink(missing_ok=True)  # one that is not built any more
                if built.exists():
                    shutil.copy(built, self._beside(ext, library))

    def get_outputs(self) -> list[str]:
        onnxruntime = [self._beside(ext, ONNXRUNTIME_LIBRARY) for ext in self.extensions]
        executorch = [self._beside(ext, EXECUTORCH_LIBRARY) for ext in self.extensions]
        return [*super().get_outputs(), *onnxruntime, *(path for path in executorch if Path(path).exists())]

    def _compiler_version(self) -> str:
        command = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        out = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
        return out.splitlines()[0]


class BuildPython(build_py):
    """Compiles the kernels in CUDA C++ before the package's files are collected; they are data among these."""

    def run(self) -> None:
        skip = os.environ.get("MVKERNELS_SKIP_CUDA") == "1"
        if not skip:
            line = [sys.executable, str(ROOT / "csrc/cuda/compile.py"), "--jobs", str(jobs())]
            if subprocess.run(line, check=False).returncode and os.environ.get("MVKERNELS_REQUIRE_CUDA") == "1":
                raise SystemExit("mvkernels: the CUDA kernels do not compile")
        built = Path(self.build_lib) / "mvkernels/cuda/data"
        if not self.editable_mode:  # what an earlier build left here
            shutil.rmtree(built, ignore_errors=True)
        super().run()
        if skip and not self.editable_mode:
            shutil.rmtree(built, ignore_errors=True)


class Wheel(bdist_wheel):
    """Says by its file name whether kernels are in: ``cp310-abi3-<platform>`` with them, ``py3-none-any`` without.

    What was built decides, which is known only after the build: an extension that failed is left out.
    """

    def run(self) -> None:
        if self.skip_build:
            self._decide()
        super().run()

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":  # between the build and the installation, which have to agree
            self._decide()

    def _decide(self) -> None:
        if not all(Path(built).exists() for built in self.get_finalized_command("build_ext").get_outputs()):
            self.distribution.ext_modules = []
            self.root_is_pure = True


sources = [REGISTER, ONNXRUNTIME, EXECUTORCH, *KERNELS]
skip = os.environ.get("MVKERNELS_SKIP_EXT") == "1" or sys.platform == "win32"
setup(
    ext_modules=[] if skip else [Extension("mvkernels._C", sources, py_limited_api=True, depends=HEADERS)],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython, "bdist_wheel": Wheel},
    options={} if skip else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
