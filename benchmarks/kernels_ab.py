"""The C++ kernels of this checkout against those of another commit, in one process and on the same tensors.

``mvkernels bench --ab`` times two processes, and where each finds its memory moves a time by as much as a third. Here
the other commit's extension is loaded beside this one, under a namespace of its own, and the torch operators of both
are called in turns with the same arguments: geometric means repeat within 1 or 2 %. Python around the operators is not
timed, and their schemas must be the same. Exit status 1 if a geometric mean is above --tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from _operators import of_call

from mvkernels import report
from mvkernels.bench import ab, timing
from mvkernels.bench.rows import geomean
from mvkernels.commands import command
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS

HERE, THERE = "mvkernels_cpp", "mvkernels_cpp_there"
_libraries: list[torch.library.Library] = []  # what they define goes with them


def load(path: Path) -> None:
    """Load an extension whose operators are in THERE, and give them the schemas of those here."""
    library = torch.library.Library(THERE, "DEF")
    _libraries.append(library)
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith(f"{HERE}::"):
            library.define(str(schema).removeprefix(f"{HERE}::"))
    spec = spec_from_file_location("_C", path, loader=ExtensionFileLoader("_C", str(path)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert extension.module is not None
    if module.interface() != extension.module.interface():
        raise report.UsageError("the operators of the other commit have other schemas: use mvkernels bench --ab")


def main() -> int:
    """Measure, print the table and the geometric means."""
    ours = report.ops_with(["cpp"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--op", nargs="+", choices=ours, default=ours)
    parser.add_argument("--suite", default="small", choices=("small", "full"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--min-time", type=float, default=0.2)
    parser.add_argument("--tolerance", type=float, default=0.02)
    options = parser.parse_args()
    if extension.module is None:
        raise report.UsageError(extension.reason)
    torch.set_num_threads(1)
    with ab.files_of(options.commit) as path:
        register = next((path / "csrc" / "cpu").rglob("register.cpp"))
        register.write_text(register.read_text().replace(f"({HERE}, CPU", f"({THERE}, CPU"))
        load(
            ab.build(path, options.commit, MVKERNELS_BUILD_ISAS=extension.instruction_set(), MVKERNELS_REQUIRE_EXT="1")
        )
        means = compare(options, lambda name: getattr(getattr(torch.ops, THERE), name).default)
    return int(max(means) > 1 + options.tolerance)


def compare(options: argparse.Namespace, other: Callable[[str], Any]) -> list[float]:
    """The geometric means of here / there by op and mode; prints them and the rows."""
    cases = [(OPS[name], case, layout) for name in options.op
             for case in OPS[name].suite(options.suite) for layout in case.layouts]  # fmt: skip
    rows, ratios = [], dict[tuple[str, str], list[float]]()
    progress = report.Progress(len(cases))
    for op, case, layout in cases:
        progress.step(f"{op.name} {case.label} {layout}")
        made = case.make(batch=options.batch, dtype=getattr(torch, options.dtype), device="cpu", layout=layout)
        for mode, here, arguments in of_call(op, made):
            there = other(here.__name__.split(".")[0])
            calls = {"here": partial(here, *arguments), "there": partial(there, *arguments)}
            with torch.no_grad():
                times = timing.interleave(calls, min_time=options.min_time)
            ratio = times["here"].min / times["there"].min
            ratios.setdefault((op.name, mode), []).append(ratio)
            shown = (report.microseconds(times[name].min) for name in ("there", "here"))
            rows.append((op.name, case.label, layout, mode, *shown, f"{ratio:.3f}"))
    progress.close()
    print(report.table(rows, ("op", "shape", "layout", "mode", "there us", "here us", "here/there")))
    means = {key: geomean(found) for key, found in ratios.items()}
    print()
    print(report.table([(*key, len(ratios[key]), f"{mean:.3f}") for key, mean in means.items()],
                       ("op", "mode", "shapes", "geometric mean")))  # fmt: skip
    return list(means.values())


if __name__ == "__main__":
    sys.exit(command.run("kernels_ab", main))
