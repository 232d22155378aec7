"""MkDocs hooks: the README is the site's first page, and links out of docs/ become links within the site."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# What lies beside docs/ in the repository, and its name on the site.
BESIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside docs/."""
    for source, name in BESIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site. What the site does not have (a script, a CSV file) is shown by its path."""
    beside = page.file.src_uri in BESIDE.values()
    folder = ROOT if beside else (ROOT / "docs" / page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        if target.startswith(("http:", "https:")) or not target:
            return found.group(0)
        path = (folder / target).resolve()
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: there is no {target}")
        name = path.relative_to(ROOT).as_posix()
        if name in BESIDE or name.startswith("docs/"):
            here = os.path.dirname(page.file.src_uri)
            return f"[{text}]({os.path.relpath(BESIDE.get(name, name.removeprefix('docs/')), here or '.')}{anchor})"
        return f"{text} (`{name}`)"

    if beside:  # a picture's address, which is no link
        markdown = re.sub(r'(src|srcset)="docs/', r'\1="', markdown)
    # Not inside code blocks, which come out as they went in.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    pattern = r"(?<!!)\[([^\]\[]+)\]\(([^)#\s]*)(#[^)\s]*)?\)"
    return "".join(part if i % 2 else re.sub(pattern, link, part) for i, part in enumerate(parts))
