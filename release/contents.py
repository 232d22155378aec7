"""What has to be in a distribution, and nothing else: names, licence, size, tag. Each check raises :class:`Failed`."""

from __future__ import annotations

import re
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

MOST_BYTES = 12_000_000

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
    "the licence": (r"mvkernels-[^/]+\.dist-info/licenses/LICENSE", "every"),
    "metadata": (r"mvkernels-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|top_level\.txt)", "every"),
    "bills of materials": (r"mvkernels-[^/]+\.dist-info/sboms/[^/]+\.json", "none"),
}
SOURCE = (
    *("setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc/cpu/register.cpp", "csrc/cuda/compile.py"),
    *("mvkernels/__init__.py", "python/mvmodels/__init__.py", "tests/conftest.py", "PKG-INFO"),
)


class Failed(Exception):
    """A check did not pass; the message is the reason, one line."""


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


def tag(wheel: Path) -> str:
    """``cp310-abi3-<one platform>`` or ``py3-none-any``, and the same in the file WHEEL."""
    name = re.fullmatch(r"mvkernels-[^-]+-((?:cp310-abi3)-([a-z0-9_.]+)|py3-none-any)\.whl", wheel.name)
    if name is None:
        raise Failed(f"{wheel.name}: want cp310-abi3-<platform> or py3-none-any")
    about = headers(wheel, "WHEEL")
    first, _, platforms = name[1].rpartition("-")
    wanted = {f"{first}-{platform}" for platform in platforms.split(".")}
    if set(about.get_all("Tag") or []) != wanted:
        raise Failed(f"{wheel.name}: the file WHEEL says {about.get_all('Tag')}")
    if (about["Root-Is-Purelib"] == "true") != is_pure(wheel):
        raise Failed(f"{wheel.name}: Root-Is-Purelib: {about['Root-Is-Purelib']}")
    return name[1]


def version(root: Path, tags: list[str]) -> str:
    """version.py, the newest heading of the changelog, CITATION.cff and, where HEAD has one, the tag agree."""

    def find(path: str, pattern: str) -> str:
        found = re.search(pattern, (root / path).read_text(), re.MULTILINE)
        if found is None:
            raise Failed(f"{path} names no version")
        return found[1]

    wanted = find("mvkernels/version.py", r'^__version__ = "([^"]+)"$')
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
