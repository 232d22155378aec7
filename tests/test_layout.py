"""What may import what: the rules of the tree, read off its source."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each may import those of its own line and of those above it. Imports inside functions count as well.
LAYERS = (
    ("version", "configs"),
    ("report", "files", "rounding", "dispatch", "triton", "cuda"),
    ("ops",),
    ("testing", "bench", "verify", "tune", "third_party", "nn"),
    ("swap",),
    ("export",),
    ("commands",),
)
# What mvmodels, whose reader may be a user with a network of their own, takes from mvkernels beside mvkernels.nn.
FOR_MODELS = {
    "mvkernels",
    "mvkernels.report",
    "mvkernels.files",
    "mvkernels.commands.command",
    "mvkernels.dispatch.backend",
    "mvkernels.dispatch.checks",
}
# Of whom it is enough that they are asked for when they are needed, by a function that most callers never call.
LATE = {
    ("mvkernels.ops.common.peers", "mvkernels.third_party"),  # a benchmark's peers of other packages
}


def modules(root: Path, package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules(ROOT, "mvkernels") | modules(ROOT / "python", "mvmodels")


def imports(name: str) -> set[tuple[str, str]]:
    """(module, name taken from it, or "") of all that a module imports from the tree, inside functions too."""
    return {(module, taken) for module, taken in imported(name, MODULES[name].read_text()) if module in MODULES}


def imported(name: str, text: str) -> set[tuple[str, str]]:
    tree = ast.parse(text)
    typing = {
        id(n)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for line in test.body
        for n in ast.walk(line)
    }
    found: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: imports here are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add((whole, "") if whole in MODULES else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {(arg.value, "") for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def test_every_kind_of_import_is_seen() -> None:
    text = """
import mvkernels.nn as layers
from mvkernels import swap
from mvkernels.ops.common.peers import compose
if not TYPE_CHECKING:
    import mvkernels.bench
if TYPE_CHECKING:
    import mvkernels.tune
else:
    import mvkernels.verify
def late():
    importlib.import_module("mvkernels.commands")
"""
    modules = {"mvkernels.nn", "mvkernels.swap", "mvkernels.bench", "mvkernels.verify", "mvkernels.commands"}
    assert imported("text", text) == {(m, "") for m in modules} | {("mvkernels.ops.common.peers", "compose")}


def op_of(module: str) -> str | None:
    """The op in whose folder a module is."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["mvkernels", "ops"] and len(parts) > 2 and parts[2] != "common" else None


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    order = {part: index for index, layer in enumerate(LAYERS) for part in layer}
    parts = name.split(".")
    mine = len(LAYERS) if parts[0] == "mvmodels" or len(parts) == 1 or parts[1] == "__main__" else order[parts[1]]
    for module, taken in imports(name):
        other = module.split(".")
        # What the package itself re-exports lies in some layer: it is taken from there.
        reaches = module == "mvkernels" and parts[0] != "mvmodels" and (taken or mine <= order["ops"])
        assert not reaches, f"{name} imports {taken or 'all'} of mvkernels"
        if other[0] == "mvmodels":
            assert parts[0] == "mvmodels", f"{name} imports {module}"
        elif parts[0] == "mvmodels":
            assert module in FOR_MODELS or module.startswith("mvkernels.nn"), f"{name} imports {module}"
        elif len(other) > 1:
            assert order[other[1]] <= mine or (name, module) in LATE, f"{name} imports {module}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("mvkernels.ops.")])
def test_an_op_takes_only_public_names_of_another(name: str) -> None:
    for module, taken in imports(name):
        other = op_of(module)
        if other is None or other == op_of(name):
            continue
        assert module == f"mvkernels.ops.{other}" and taken, f"{name} imports {module}, of another op's folder"
        tree = ast.parse(MODULES[module].read_text())
        public = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.dump(node.targets[0]).startswith("Name(id='__all__'")
        )
        assert taken in public, f"{name} takes {taken}, which is no public name of {module}"


def test_no_circle_of_imports() -> None:
    needs = {name: {module for module, _ in imports(name)} - {name} for name in MODULES}
    for name, needed in needs.items():  # a module stands in its packages, whose own code runs before it
        needed.difference_update([parent for parent in needed if name.startswith(f"{parent}.")])
    needs["mvkernels"] = set()  # the public names: whoever wants one of them imports where it comes from
    done: set[str] = set()
    on_the_way: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        assert name not in on_the_way, " -> ".join([*on_the_way[on_the_way.index(name) :], name])
        on_the_way.append(name)
        for module in sorted(needs[name]):
            if (name, module) not in LATE:
                visit(module)
        on_the_way.pop()
        done.add(name)

    for name in needs:
        visit(name)


def test_few_files_lie_at_the_top_of_the_package() -> None:
    assert len(list((ROOT / "mvkernels").glob("*.py"))) <= 10


def test_every_op_is_one_folder_and_one_line() -> None:
    from mvkernels.dispatch.registry import OPS

    folders = {path.name for path in (ROOT / "mvkernels" / "ops").iterdir() if (path / "reference.py").exists()}
    assert set(OPS) == folders
    package = (ROOT / "mvkernels" / "__init__.py").read_text()
    for op in folders:
        assert package.count(f"from mvkernels.ops.{op} import") == 1


def test_kernels_of_an_op_include_only_their_own_folder_and_what_is_common() -> None:
    for path in (ROOT / "csrc" / "cpu").glob("*/*.*"):
        for mark, included in re.findall(r'^#include ([<"])([^">]+)', path.read_text(), re.MULTILINE):
            folder, _, name = included.partition("/")
            if mark == "<" and folder not in {"..", *(other.name for other in (ROOT / "csrc" / "cpu").iterdir())}:
                continue
            # The table of instruction sets, which names all ops, is what the launching half of an op asks.
            known = {path.parent.name, "common"} if name else {"instruction_sets.h"}
            assert folder in known, f"{path.relative_to(ROOT)} includes {included}"


def test_what_all_instruction_sets_share_has_no_function_of_its_own() -> None:
    """The linker keeps one of several copies of an inline function, perhaps one that the processor cannot run."""
    for path in (ROOT / "csrc" / "cpu").glob("*/*.h"):
        text = path.read_text()
        if path.name == "tensor.h" or path.name.endswith("_op.h") or "namespace MVK_ISA {" in text:
            continue  # of register.cpp alone, or of one instruction set
        for line in re.findall(r"^.*\).*\{.*$", text, re.MULTILINE):
            assert line.lstrip().startswith("MVK_SHARED "), f"{path.relative_to(ROOT)}: {line.strip()}"


def test_no_file_of_code_is_long() -> None:
    for folder in ("mvkernels", "python", "csrc", "benchmarks", "release", "tests", "examples", "docs"):
        for path in (ROOT / folder).rglob("*"):
            made = path.is_relative_to(ROOT / "benchmarks" / "out")  # by a compiler, of a run on a GPU
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".c") and not made:
                assert len(path.read_text().splitlines()) <= 400, path.relative_to(ROOT)


def test_no_script_hides_a_package() -> None:
    """Tests put the benchmarks' folder first in sys.path: benchmarks/kernels.py was taken for the package kernels."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "-")

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = {plain(line.partition("==")[0]) for line in lines if "==" in line}
    modules = {name for name, of in metadata.packages_distributions().items() if wanted & set(map(plain, of))}
    assert {"torch", "kernels"} <= modules
    assert not modules & {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
