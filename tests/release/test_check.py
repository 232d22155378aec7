"""Each check of a release has to be able to fail."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from release import contents

ABOUT = "mvkernels-1.0.0.dist-info"
FILES = {
    "mvkernels/__init__.py": "", "mvkernels/py.typed": "", "mvmodels/py.typed": "", "mvkernels/configs/a.json": "",
    "mvkernels/cuda/predicted.json": "", "mvkernels/cuda/data/manifest.json": "", "mvkernels/_C.abi3.so": "",
    f"{ABOUT}/licenses/LICENSE": "MIT", f"{ABOUT}/METADATA": "License-Expression: MIT\nLicense-File: LICENSE\n",
    f"{ABOUT}/WHEEL": "Root-Is-Purelib: false\nTag: cp310-abi3-linux_x86_64\n",
}  # fmt: skip


def wheel(folder: Path, tag: str = "cp310-abi3-linux_x86_64", **changes: str | None) -> Path:
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
    assert contents.tag(right) == "cp310-abi3-linux_x86_64" and contents.licence(right, "MIT") == "MIT"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"tests/a.py": ""}, "does not belong"), ({"mvkernels/a.cpp": ""}, "does not belong")]
    + [({name: None}, "no such file") for name in FILES if "METADATA" not in name and "WHEEL" not in name],
)
def test_contents_that_are_wrong(tmp_path: Path, changes: dict[str, str | None], reason: str) -> None:
    with pytest.raises(contents.Failed, match=reason):
        contents.wheel_contents(wheel(tmp_path, **changes))


def test_a_tag_a_licence_and_a_size_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tag in ("cp311-cp311-linux_x86_64", "cp310-abi3-win_amd64", "py3-none-any"):
        with pytest.raises(contents.Failed):
            contents.tag(wheel(tmp_path, tag))
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
