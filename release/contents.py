"""What has to be in a distribution, and nothing else: names, licence, size, tag. Each check raises :class:`Failed`."""

from __future__ import annotations

import re
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from release import common
from release.common import Failed

MOST_BYTES = 12_000_000
OLDEST_GLIBC = 28
"""Wheels for Linux are built in an image with glibc 2.28, and run with that and newer ones."""
PLATFORM = r"manylinux_2_\d+_(x86_64|aarch64)|macosx_\d+_\d+_arm64"
RELEASE = {
    "source": r"\.tar\.gz$",
    "pure": r"-py3-none-any\.whl$",
    "Linux on x86-64": r"-abi3-manylinux_.*_x86_64\.whl$",
    "Linux on ARM": r"-abi3-manylinux_.*_aarch64\.whl$",
    "macOS on ARM": r"-abi3-macosx_.*_arm64\.whl$",
}
"""What a release consists of, told apart by the files' names."""

# Every file of a wheel is of one of these kinds. A kind that has to be there names the wheels that it has to be in.
EXTENSION = "the extension"
KINDS = {
    "Python code": (r"(mvkernels|mvmodels)/([a-z_0-9]+/)*[A-Za-z_0-9]+\.py", "every"),
    "py.typed of mvkernels": (r"mvkernels/py\.typed", "every"),
    "py.typed of mvmodels": (r"mvmodels/py\.typed", "every"),
    "launch configurations": (r"mvkernels/configs/[^/]+\.json", "every"),
    "candidates and predictions": (r"mvkernels/(triton/candidates|cuda/predicted)\.json", "every"),
    "CUDA kernels": (
        r"mvkernels/cuda/data/(manifest\.json|[a-z_0-9]+\.[a-z_0-9]+\.(sm_\d+a?|compute_\d+)\.xz)",
        "every",
    ),
    EXTENSION: (r"mvkernels/_C\.abi3\.so", "platform"),
    "ops for ONNX Runtime": (r"mvkernels/libmvkernels_onnxruntime\.so", "platform"),
    "the licence": (r"mvkernels-[^/]+\.dist-info/licenses/LICENSE", "every"),
    "metadata": (r"mvkernels-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|top_level\.txt)", "every"),
    "bills of materials": (r"mvkernels-[^/]+\.dist-info/sboms/[^/]+\.json", "none"),
}
SOURCE = (
    *("setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc/cpu/register.cpp", "csrc/cuda/compile.py"),
    *("mvkernels/__init__.py", "python/mvmodels/__init__.py", "tests/conftest.py", "PKG-INFO"),
)


def is_pure(wheel: Path) -> bool:
    """Whether a wheel says by its name that it has no compiled code."""
    return wheel.name.endswith("-none-any.whl")


def wheel_contents(wheel: Path) -> str:
    """Only files of KINDS, and at least one of each that belongs in this wheel; no folder of caches or tests."""
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if not name.endswith("/")]
    counts = dict.fromkeys(KINDS, 0)
    for name in names:
        kind = next((kind for kind, (pattern, _) in KINDS.items() if re.fullmatch(pattern, name)), None)
        if kind is None or "__pycache__" in name or "tests/" in name:
            raise Failed(f"{wheel.name}: {name} does not belong there")
        counts[kind] += 1
    for kind, (_, wanted) in KINDS.items():
        if not counts[kind] and (wanted == "every" or (wanted == "platform" and not is_pure(wheel))):
            raise Failed(f"{wheel.name}: {kind}: no such file")
        if counts[kind] and wanted == "platform" and is_pure(wheel):
            raise Failed(f"{wheel.name}: {kind}: compiled code in a wheel for every platform")
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def sdist_contents(sdist: Path) -> str:
    """What a build needs is there, and nothing that a build has made."""
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for name in SOURCE:
        if name not in names:
            raise Failed(f"{sdist.name}: {name} is missing")
    for name in sorted(names):
        if re.search(r"\.(so|pyd|o|pyc|xz)$|__pycache__", name):
            raise Failed(f"{sdist.name}: {name} was built")
    return f"{len(names)} files"


def size(file: Path) -> str:
    found = file.stat().st_size
    if found > MOST_BYTES:
        raise Failed(f"{file.name}: {found} bytes, want at most {MOST_BYTES}")
    return f"{found / 1e6:.2f} MB"


def headers(wheel: Path, name: str) -> Message:
    """The file METADATA or WHEEL of a wheel."""
    with zipfile.ZipFile(wheel) as files:
        paths = [path for path in files.namelist() if path.endswith(f".dist-info/{name}")]
        if len(paths) != 1:
            raise Failed(f"{wheel.name}: {len(paths)} files {name}")
        return Parser().parsestr(files.read(paths[0]).decode())


def licence(wheel: Path, text: str) -> str:
    """The metadata name the licence and its file, and the file is the repository's ``text``."""
    found = headers(wheel, "METADATA")
    if found["License-Expression"] != "MIT" or found.get_all("License-File") != ["LICENSE"]:
        raise Failed(f"{wheel.name}: licence {found['License-Expression']} in {found.get_all('License-File')}")
    with zipfile.ZipFile(wheel) as files:
        path = next((path for path in files.namelist() if path.endswith(".dist-info/licenses/LICENSE")), None)
        if path is None or files.read(path).decode() != text:
            raise Failed(f"{wheel.name}: the licence's file is not the repository's")
    return "MIT"


def platforms(wheel: Path) -> list[str]:
    """The platforms of a wheel's name, or none."""
    return [] if is_pure(wheel) else wheel.stem.rpartition("-")[2].split(".")


def glibc(wheel: Path) -> int | None:
    """The oldest glibc 2 that a wheel says it runs on; None where it says none."""
    found = [re.match(r"manylinux_2_(\d+)_", platform) for platform in platforms(wheel)]
    return min((int(each[1]) for each in found if each), default=None)


def tag(wheel: Path, newest_glibc: int | None = None) -> str:
    """``cp310-abi3-<platform>`` or ``py3-none-any``, and the same in the file WHEEL.

    A platform is one that an index takes: manylinux, or macOS on ARM; a wheel that was not repaired says ``linux``.
    """
    name = re.fullmatch(r"mvkernels-[^-]+-((?:cp310-abi3)-([a-z0-9_.]+)|py3-none-any)\.whl", wheel.name)
    if name is None:
        raise Failed(f"{wheel.name}: want cp310-abi3-<platform> or py3-none-any")
    for platform in platforms(wheel):
        if not re.fullmatch(PLATFORM, platform):
            raise Failed(f"{wheel.name}: {platform} is no platform to publish for, want manylinux or macosx")
    about = headers(wheel, "WHEEL")
    first, _, last = name[1].rpartition("-")
    wanted = {f"{first}-{platform}" for platform in last.split(".")}
    if set(about.get_all("Tag") or []) != wanted:
        raise Failed(f"{wheel.name}: the file WHEEL says {about.get_all('Tag')}")
    if (about["Root-Is-Purelib"] == "true") != is_pure(wheel):
        raise Failed(f"{wheel.name}: Root-Is-Purelib: {about['Root-Is-Purelib']}")
    needs = glibc(wheel)
    if needs is None:
        return name[1]
    if newest_glibc is not None and needs > newest_glibc:
        raise Failed(f"{wheel.name}: needs glibc 2.{needs}, want 2.{newest_glibc} or older")
    of_here = f", that of the machine which built it; wheels to publish are built for 2.{OLDEST_GLIBC}"
    return f"{name[1]}: glibc 2.{needs}{of_here if needs > OLDEST_GLIBC else ''}"


def named(file: Path, version: str) -> str:
    """The version of a file's name is the tree's."""
    if not file.name.startswith((f"mvkernels-{version}-", f"mvkernels-{version}.tar.gz")):
        raise Failed(f"{file.name}: want version {version}")
    return version


def complete(files: list[Path]) -> str:
    """One file of each kind that a release has, and no other."""
    found = [kind for file in files for kind, pattern in RELEASE.items() if re.search(pattern, file.name)]
    if missing := [kind for kind in RELEASE if kind not in found]:
        raise Failed(f"missing: {', '.join(missing)}")
    if len(found) > len(RELEASE) or len(files) > len(RELEASE):
        raise Failed(f"{len(files)} files, want {len(RELEASE)}")
    return ", ".join(RELEASE)


def version(root: Path, tags: list[str]) -> str:
    """version.py, the newest heading of the changelog, CITATION.cff and, where HEAD has one, the tag agree."""

    def find(path: str, pattern: str) -> str:
        found = re.search(pattern, (root / path).read_text(), re.MULTILINE)
        if found is None:
            raise Failed(f"{path} names no version")
        return found[1]

    wanted = common.version(root)
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", wanted):
        raise Failed(f"version {wanted}, want X.Y.Z")
    heading = find("CHANGELOG.md", r"^## (.+)$")
    for path, found in (
        ("CHANGELOG.md", heading.split()[0]),
        ("CITATION.cff", find("CITATION.cff", r"^version: (\S+)$")),
    ):
        if found != wanted:
            raise Failed(f"{path} says {found}, version.py {wanted}")
    of_release = [tag for tag in tags if tag.startswith("v")]
    if of_release and of_release != [f"v{wanted}"]:
        raise Failed(f"HEAD is tagged {', '.join(of_release)}, version.py says {wanted}")
    if of_release and "unreleased" in heading:
        raise Failed(f"HEAD is tagged {of_release[0]}, but the changelog calls it unreleased")
    return f"{wanted}, {f'tagged {of_release[0]}' if of_release else 'not tagged'}"
