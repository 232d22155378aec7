"""Makes a package of the ops for Hugging Face's `kernels` library out of the sources: `make hub`.

    python -m release.hub [OUTPUT] [--backends NAME ...]

It has what the public functions need, which is computed from the imports: Python, Triton kernels and JSON files. The
C++ extension and the compiled CUDA kernels are not in it. OUTPUT (``dist/hub``) gets ``README.md``, ``LICENSE`` and for
every backend ``build/torch-<backend>/``: the package itself, with ``metadata.json``. All files are the same every time.

That library imports a package under a name of its own, beside other versions of it. So imports are made relative, and
operators are registered under a name that is made of what the package contains.

Exit status 1, with one line that says why, if the sources have an import that cannot be made relative.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from release.common import ROOT, Failed, version

PACKAGE = "mvkernels"
# The folders whose public names are those of the package: functions, without modules that hold parameters.
PUBLIC = ("dispatch", "ops", "version")
BACKENDS = ("cpu", "cuda", "metal", "rocm", "xpu")
"""What torch may be built for, by the names of `kernels`. The packages differ in their identifiers."""
COMPILED = "cuda/data/"
OPERATOR = f'OPERATOR = "{PACKAGE}_{{backend}}::{{name}}"'
"""The line of dispatch/library.py that names operators."""
ID = "_mvkernels_unique"
"""Stands for the identifier until the files that it is made of are there."""

CARD = """---
library_name: kernels
license: mit
tags:
- kernel
- triton
---

# mvkernels

Fused attention kernels for mobile vision models in PyTorch, version {version}: {ops}.

```python
from kernels import get_kernel

mvkernels = get_kernel("<owner>/mvkernels", version={major}, trust_remote_code=True)
out = mvkernels.patch_attention(query, key, value, 2)  # feature maps (B, heads, head_dim, H, W) on a GPU
```

On CUDA, ROCm and XPU the kernels are written in Triton. The reference in plain PyTorch runs everywhere else, and where
`backend="reference"` asks for it. Every op has a gradient. `inverted_residual` has a kernel for inference alone;
`conv3x3` and `pointwise` are PyTorch here.

This package is of no architecture: it contains Python and nothing compiled. The backends `cpp` and `cuda`, in C++ and
CUDA C++, and `swap`, which puts the ops into existing models, are in the library that is installed with pip.
"""
ALIAS = '''"""The same package, for versions of `kernels` that look for it in a folder of its name."""

import importlib.util
import sys
from pathlib import Path

_NAME = "{name}"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
__all__ = sys.modules[_NAME].__all__
globals().update({{each: getattr(sys.modules[_NAME], each) for each in __all__}})
'''


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def relative(target: str, package: str) -> str:
    """The dotted name ``target`` as seen from ``package``, both inside the library: ``..triton.maps``."""
    there, here = target.split("."), package.split(".")
    shared = 0
    while shared < min(len(there), len(here)) and there[shared] == here[shared]:
        shared += 1
    return "." * (len(here) - shared + 1) + ".".join(there[shared:])


def ours(name: str | None) -> bool:
    """Whether a dotted name is the library or inside it."""
    return name is not None and name.partition(".")[0] == PACKAGE


def edits(text: str, package: str, where: str) -> Iterator[tuple[ast.AST, str, str, str]]:
    """(node, text to find in it, text to put there, module imported) of each import of the library in a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and ours(node.module):
            assert node.module is not None
            yield node, rf"from\s+{re.escape(node.module)}\b", f"from {relative(node.module, package)}", node.module
            for alias in node.names:
                yield node, "", "", f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import) and any(ours(alias.name) for alias in node.names):
            alias = node.names[0]
            parent, _, last = alias.name.rpartition(".")
            if len(node.names) > 1 or not parent or alias.asname is None:
                raise Failed(f"{where}:{node.lineno}: `{ast.unparse(node)}` has no relative form")
            yield node, r"import\s.*", f"from {relative(parent, package)} import {last} as {alias.asname}", alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            named = node.args[0] if node.args else None
            if isinstance(named, ast.JoinedStr) and ast.unparse(named)[2:].startswith(PACKAGE):
                raise Failed(f"{where}:{node.lineno}: `{ast.unparse(node)}` imports a module known at run time only")
            if isinstance(named, ast.Constant) and isinstance(named.value, str) and ours(named.value):
                name = named.value
                yield named, r".*", f'"{relative(name, package)}", __package__', name


def portable(text: str, module: str, is_package: bool) -> tuple[str, set[str]]:
    """The text of a module with relative imports, and the dotted names of what it imports from the library."""
    data, imported = text.encode(), set()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    changes = []
    package = module if is_package else module.rpartition(".")[0]
    for node, pattern, new, name in edits(text, package, module):
        imported.add(name)
        if not pattern:
            continue
        first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        found = re.match(pattern, data[first:last].decode())
        assert found is not None, (module, name)
        changes.append((first, first + len(found.group().encode()), new.encode()))
    for first, last, new_bytes in sorted(changes, reverse=True):
        data = data[:first] + new_bytes + data[last:]
    return data.decode(), imported


def public(text: str) -> str:
    """The library's ``__init__`` without what is not of an op: fewer imports, and fewer names in ``__all__``."""
    kept, names = [], []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[1:2] in [[each] for each in PUBLIC]:
            kept.append(ast.unparse(node))
            names += [alias.asname or alias.name for alias in node.names]
    listed = "".join(f'    "{name}",\n' for name in sorted(names))
    docstring = ast.get_docstring(ast.parse(text))
    return f'"""{docstring}"""\n\n' + "\n".join(kept) + f"\n\n__all__ = [\n{listed}]\n"


def package_files(root: Path = ROOT) -> dict[str, bytes]:
    """The files of the package by their path in it, with ID for its identifier."""
    modules, found = module_files(root), {}
    if PACKAGE not in modules:
        raise Failed(f"{root}: no sources of {PACKAGE} here")
    ahead = [PACKAGE]
    seen = set(ahead)
    while ahead:
        name = ahead.pop()
        path = modules[name]
        text = public(path.read_text()) if name == PACKAGE else path.read_text()
        text, imported = portable(text, name, path.name == "__init__.py")
        found[path.relative_to(root / PACKAGE).as_posix()] = text.encode()
        for each in imported:
            parts = each.split(".")
            needed = {".".join(parts[: n + 1]) for n in range(len(parts))} & modules.keys() - seen
            seen |= needed
            ahead += needed
    library = found["dispatch/library.py"].decode()
    if library.count(OPERATOR) != 1:
        raise Failed(f"dispatch/library.py: want the line `{OPERATOR}`")
    found["dispatch/library.py"] = library.replace(OPERATOR, f'OPERATOR = "{ID}::{{backend}}_{{name}}"').encode()
    for path in sorted((root / PACKAGE).rglob("*.json")):
        inside = path.relative_to(root / PACKAGE).as_posix()
        if not inside.startswith(COMPILED):
            found[inside] = path.read_bytes()
    found[f"{PACKAGE}/__init__.py"] = ALIAS.format(name=ID).encode()
    return dict(sorted(found.items()))


def variant(files: Mapping[str, bytes], backend: str, major: int) -> dict[str, bytes]:
    """The files for one backend, with ``metadata.json``. The identifier is a hash of the files."""
    whole = hashlib.sha256(str(major).encode())
    for path, data in files.items():
        whole.update(f"{path}\0{len(data)}\0".encode() + data)
    name = f"_{PACKAGE}_{backend}_{whole.hexdigest()[:12]}"
    named = {path: data.replace(ID.encode(), name.encode()) for path, data in files.items()}
    digests = {path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in named.items()}
    metadata = {
        "id": name,
        "name": PACKAGE,
        "version": major,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    named["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
    return named


def write(output: Path, backends: tuple[str, ...] = BACKENDS, root: Path = ROOT) -> list[Path]:
    """Write the repository to ``output``, in place of one that is there. Returns the folder of each backend."""
    unknown = sorted(set(backends) - set(BACKENDS))
    if unknown:
        raise Failed(f"unknown backend {unknown[0]}, want some of {', '.join(BACKENDS)}")
    if output.exists() and not output.is_dir():
        raise Failed(f"{output}: is not a folder")
    strange = {each.name for each in output.iterdir()} - {"build", "README.md", "LICENSE"} if output.exists() else ()
    if strange:
        raise Failed(f"{output}: contains {sorted(strange)[0]}, which is not of such a package: name another folder")
    files, number = package_files(root), version(root)
    major = int(number.partition(".")[0])
    shutil.rmtree(output / "build", ignore_errors=True)
    folders = []
    for backend in backends:
        folder = output / "build" / f"torch-{backend}"
        folders.append(folder)
        for path, data in variant(files, backend, major).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    ops = sorted(path.name for path in (root / PACKAGE / "ops").iterdir() if (path / "reference.py").exists())
    card = CARD.format(version=number, major=major, ops=", ".join(f"`{op}`" for op in ops))
    (output / "README.md").write_text(card)
    (output / "LICENSE").write_bytes((root / "LICENSE").read_bytes())
    return folders


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="release.hub", description=__doc__.partition("\n")[0])
    parser.add_argument("output", nargs="?", type=Path, default=ROOT / "dist" / "hub", help="a folder (dist/hub)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="all, if none is named")
    options = parser.parse_args(arguments)
    try:
        folders = write(options.output, tuple(options.backends))
    except (Failed, OSError) as error:
        print(f"release.hub: {error}", file=sys.stderr)
        return 1
    for folder in folders:
        print(f"{folder}: {json.loads((folder / 'metadata.json').read_text())['id']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
