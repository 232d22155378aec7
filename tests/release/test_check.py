"""Each check of a release has to be able to fail."""

from __future__ import annotations

import csv
import json
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from release import binary, check, common, contents, macho

ABOUT = "mvkernels-1.0.0.dist-info"
FILES = {
    "mvkernels/__init__.py": "", "mvkernels/py.typed": "", "mvmodels/py.typed": "", "mvkernels/configs/a.json": "",
    "mvkernels/cuda/predicted.json": "", "mvkernels/cuda/data/manifest.json": "", "mvkernels/_C.abi3.so": "",
    "mvkernels/libmvkernels_onnxruntime.so": "",
    f"{ABOUT}/licenses/LICENSE": "MIT", f"{ABOUT}/METADATA": "License-Expression: MIT\nLicense-File: LICENSE\n",
    f"{ABOUT}/WHEEL": "Root-Is-Purelib: false\nTag: cp310-abi3-manylinux_2_28_x86_64\n",
}  # fmt: skip


def wheel(folder: Path, tag: str = "cp310-abi3-manylinux_2_28_x86_64", **changes: str | None) -> Path:
    """A wheel of FILES with changes; None leaves a file out."""
    path = folder / f"mvkernels-1.0.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as files:
        for name, text in (FILES | changes).items():
            if text is not None:
                files.writestr(name, text)
    return path


def test_a_wheel_that_is_right(tmp_path: Path) -> None:
    right = wheel(tmp_path)
    assert "1 the extension" in contents.wheel_contents(right)
    assert contents.tag(right, 28) == "cp310-abi3-manylinux_2_28_x86_64: glibc 2.28"
    assert contents.licence(right, "MIT") == "MIT" and contents.named(right, "1.0.0") == "1.0.0"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"tests/a.py": ""}, "does not belong"), ({"mvkernels/a.cpp": ""}, "does not belong")]
    + [({name: None}, "no such file") for name in FILES if "METADATA" not in name and "WHEEL" not in name],
)
def test_contents_that_are_wrong(tmp_path: Path, changes: dict[str, str | None], reason: str) -> None:
    with pytest.raises(contents.Failed, match=reason):
        contents.wheel_contents(wheel(tmp_path, **changes))


def test_a_tag_a_licence_and_a_size_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tag, reason in (
        ("cp311-cp311-manylinux_2_28_x86_64", "want cp310-abi3"),
        ("cp310-abi3-linux_x86_64", "no platform to publish for"),
        ("cp310-abi3-win_amd64", "no platform to publish for"),
        ("cp310-abi3-manylinux_2_34_x86_64", "the file WHEEL says"),
        ("py3-none-any", "the file WHEEL says"),
    ):
        with pytest.raises(contents.Failed, match=reason):
            contents.tag(wheel(tmp_path, tag))
    with pytest.raises(contents.Failed, match=r"needs glibc 2.28, want 2.17"):
        contents.tag(wheel(tmp_path), 17)
    with pytest.raises(contents.Failed, match=r"want version 1.0.1"):
        contents.named(wheel(tmp_path), "1.0.1")
    with pytest.raises(contents.Failed, match="compiled code"):
        contents.wheel_contents(wheel(tmp_path, "py3-none-any"))
    with pytest.raises(contents.Failed, match="licence"):
        contents.licence(wheel(tmp_path), "another")
    monkeypatch.setattr(contents, "MOST_BYTES", 10)
    with pytest.raises(contents.Failed, match="want at most 10"):
        contents.size(wheel(tmp_path))


def test_versions_that_differ(tmp_path: Path) -> None:
    (tmp_path / "mvkernels").mkdir()
    (tmp_path / "mvkernels/version.py").write_text('__version__ = "1.0.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.0.0\n")
    (tmp_path / "CHANGELOG.md").write_text("## 1.0.0 (unreleased)\n")
    assert "not tagged" in contents.version(tmp_path, [])
    for tag in ("v1.0.0", "v2.0.0"):
        with pytest.raises(contents.Failed, match="HEAD is tagged"):
            contents.version(tmp_path, [tag])
    (tmp_path / "CITATION.cff").write_text("version: 1.0.1\n")
    with pytest.raises(contents.Failed, match="CITATION"):
        contents.version(tmp_path, [])


def test_a_newer_glibc_is_said(tmp_path: Path) -> None:
    about = "Root-Is-Purelib: false\nTag: cp310-abi3-manylinux_2_34_x86_64\n"
    newer = wheel(tmp_path, "cp310-abi3-manylinux_2_34_x86_64", **{f"{ABOUT}/WHEEL": about})
    assert "glibc 2.34, that of the machine which built it; wheels to publish are built for 2.28" in contents.tag(newer)


def test_a_release_that_lacks_a_file_or_has_one_too_many() -> None:
    tags = ("py3-none-any", "cp310-abi3-manylinux_2_27_x86_64.manylinux_2_28_x86_64")
    tags += ("cp310-abi3-manylinux_2_28_aarch64", "cp310-abi3-macosx_11_0_arm64")
    files = [Path("mvkernels-1.0.0.tar.gz"), *(Path(f"mvkernels-1.0.0-{tag}.whl") for tag in tags)]
    assert "macOS on ARM" in contents.complete(files)
    for left_out in range(len(files)):
        with pytest.raises(contents.Failed, match="missing: "):
            contents.complete(files[:left_out] + files[left_out + 1 :])
    with pytest.raises(contents.Failed, match="6 files, want 5"):
        contents.complete([*files, Path("mvkernels-1.0.0-cp310-abi3-manylinux_2_34_x86_64.whl")])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one commit."""
    for name, text in (("mvkernels/version.py", '__version__ = "1.0.0"\n'), (".gitignore", "dist/\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    common.git(tmp_path, "init", "--quiet")
    common.git(tmp_path, "add", ".")
    common.git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "First")
    return tmp_path


def test_a_tree_that_is_not_clean(tree: Path) -> None:
    assert common.clean(tree) == f"commit {common.commit(tree)}" and common.version(tree) == "1.0.0"
    (tree / "dist").mkdir()
    (tree / "dist" / "a.whl").touch()
    (tree / "benchmarks/results").mkdir(parents=True)
    (tree / "benchmarks/results/a.csv").touch()
    common.clean(tree)  # what git ignores, and measured files
    (tree / "new.py").touch()
    with pytest.raises(common.Failed, match=r"^new.py: not committed$"):
        common.clean(tree)
    (tree / "mvkernels/version.py").write_text("")
    with pytest.raises(common.Failed, match=r"^mvkernels/version.py and 1 more: not committed$"):
        common.clean(tree)
    with pytest.raises(common.Failed, match="names no version"):
        common.version(tree)


def test_rows_are_written_of_a_clean_commit_only(tree: Path) -> None:
    (tree / "dist").mkdir()
    info = {"torch": "2.10.0", "compiler": "g++ 12", "instruction_sets": ["baseline"]}
    files = [wheel(tree / "dist", **{"mvkernels/_C.abi3.so": f"\0{json.dumps(info)}\0"}), tree / "dist/a.tar.gz"]
    files[1].write_text("abc")
    to = tree / check.RESULT
    assert check.write(files, tree) == f"2 rows in {check.RESULT}"
    with to.open(newline="") as text:
        first, second = csv.DictReader(text)
    assert (first["tag"], first["torch"], first["compiler"]) == (
        "cp310-abi3-manylinux_2_28_x86_64",
        "2.10.0",
        "g++ 12",
    )
    assert (second["name"], second["bytes"], second["limit"]) == ("a.tar.gz", "3", str(contents.MOST_BYTES))
    assert first["commit"] == second["commit"] == common.commit(tree)
    to.unlink()
    (tree / "new.py").touch()
    with pytest.raises(common.Failed, match="not committed"):
        check.write(files, tree)
    assert not to.exists()


def test_instruction_sets_that_are_missing(tmp_path: Path) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b'\0{"torch": "2", "instruction_sets": ["baseline", "avx2"]}\0')
    with pytest.raises(common.Failed, match="kernels for baseline, avx2, want baseline, avx2, avx512"):
        binary.instruction_sets(library, "x86_64")
    library.write_bytes(b"\0")
    with pytest.raises(common.Failed, match="does not say"):
        binary.instruction_sets(library, "x86_64")


def mach_o(path: Path, libraries: list[str], undefined: list[str], processor: int = macho.ARM64) -> Path:
    """A binary for macOS that asks for these, with a symbol of its own and one for a debugger beside them."""
    names = [("_ours", 0x0F), ("_torch_debug", 0x64), *((f"_{name}", 0x01) for name in undefined)]
    commands = b""
    for library in libraries:
        name = library.encode() + b"\0"
        commands += struct.pack("<IIIIII", 0x0C, 24 + len(name), 24, 0, 0, 0) + name
    size = 32 + len(commands) + 24
    strings, table = b"\0", b""
    for name, kind in names:
        table += struct.pack("<IBBHQ", len(strings), kind, 0, 0, 0)
        strings += name.encode() + b"\0"
    commands += struct.pack("<IIIIII", 0x02, 24, size, len(names), size + len(table), len(strings))
    header = macho.MAGIC + struct.pack("<IIIIIII", processor, 0, 6, len(libraries) + 1, len(commands), 0, 0)
    path.write_bytes(header + commands + table + strings)
    return path


def test_a_library_that_stands_alone(tmp_path: Path) -> None:
    system = "/usr/lib/libSystem.B.dylib"
    assert "neither" in binary.standalone(mach_o(tmp_path / "lib.so", [system], ["memcpy"]))
    for libraries, used, reason in (
        ([system], ["PyList_New"], "torch or Python: PyList_New"),
        ([system], ["torch_list_size"], "torch or Python: torch_list_size"),
        ([system, "@rpath/libtorch_cpu.dylib"], ["memcpy"], "needs other libraries: @rpath"),
    ):
        with pytest.raises(common.Failed, match=reason):
            binary.standalone(mach_o(tmp_path / "lib.so", libraries, used))


def test_what_a_binary_for_macos_asks_for(tmp_path: Path) -> None:
    system, used = "/usr/lib/libSystem.B.dylib", ["PyList_New", "torch_list_size", "memcpy"]
    file = mach_o(tmp_path / "_C.abi3.so", [system], used)
    assert macho.asked(file) == ({system}, {*used})
    assert binary.symbols(file, binary.listed()) == "1 of torch, all known of the oldest"
    for libraries, more, reason in (
        ([system, "@rpath/libtorch_cpu.dylib"], [], "needs other libraries: @rpath"),
        ([system], ["torch_of_tomorrow"], "not known of the oldest torch: torch_of_tomorrow"),
        ([system], ["_ZN2at5addmmEv"], r"C\+\+ of torch"),
    ):
        with pytest.raises(common.Failed, match=reason):
            binary.symbols(mach_o(file, libraries, used + more), binary.listed())
    with pytest.raises(ValueError, match="no binary for macOS on ARM"):
        macho.asked(mach_o(file, [system], used, processor=0x01000007))


def test_a_check_that_fails_is_a_line_and_a_status(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "ROOT", tree)
    monkeypatch.setattr(common, "clean", lambda: "clean")
    monkeypatch.setattr(contents, "version", lambda *_: "1.0.0")
    assert check.main([]) == 0

    def unclean() -> str:
        raise common.Failed("a.py: not committed")

    monkeypatch.setattr(common, "clean", unclean)
    assert check.main([]) == 1
    assert "failed  tree        a.py: not committed\n" in capsys.readouterr().out
    with pytest.raises(subprocess.CalledProcessError):
        common.git(tree, "no-such-command")
