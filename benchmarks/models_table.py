"""Writes the table of docs/models.md from the registry of mvmodels: no number there is typed by hand.

``--check`` changes nothing and exits with 1 if the page is not what the registry says.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from _figures import files_are

import mvmodels
from mvkernels.commands import command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN = "<!-- models: begin (written by benchmarks/models_table.py) -->\n"
END = "<!-- models: end -->"
HEAD = ("name", "paper", "parameters", "multiply-adds", "at", "published parameters", "published FLOPs", "top-1")


def table() -> str:
    lines = [HEAD, ("---",) * len(HEAD)]
    for name in mvmodels.list_models():
        info = mvmodels.model_info(name)
        number = re.search(r"arXiv (\d+\.\d+)", info.paper)
        assert number is not None, info.paper
        row = (
            f"`{name}`",
            f"[{number[1]}](https://arxiv.org/abs/{number[1]})",
            f"{info.params:,}",
            f"{info.macs:,.1f} M",
            str(info.input_size),
            info.published_params or "–",
            info.published_flops or "–",
            "–" if info.published_top1 is None else str(info.published_top1),
        )
        lines.append(row)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    wanted = f"{before}{BEGIN}{table()}{END}{after}"
    return files_are({PAGE: wanted}, options.check, "benchmarks/models_table.py")


if __name__ == "__main__":
    sys.exit(command.run("models_table", main))
