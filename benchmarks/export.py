"""Exports of swapped models, plain and with fused nodes, against exports of the originals, each in its own runtime.

Exporting takes minutes and no quiet machine; timing takes seconds and needs one. So the files are kept:
``--export-only`` makes those that are missing, and a later run times them. Every file is checked against the model in
float64 before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _models import time_columns
from _results import folder, keep_pages, merge, show

from mvkernels import export, files, report, third_party
from mvkernels.bench import timing
from mvkernels.commands import command

MODELS = {
    "transformers:mobilevit_xxs": 256,
    "timm:mobilevit_xxs": 256,
    "timm:mobilevit_s": 256,
    "timm:efficientvit_b0": 256,
    "timm:efficientvit_b1": 256,
    "timm:swin_tiny_patch4_window7_224": 224,
    "mvmodels:mobile_former_26m": 224,
}
"""The side of the picture by model."""
TARGETS = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}
"""The package of the runtime by target."""


def kinds(model: str, target: str) -> tuple[str, ...]:
    """What is exported: the models of mvmodels are on the public ops as they are."""
    plain = ("original",) if model.startswith("mvmodels:") else ("original", "swapped")
    return (*plain, "fused") if target in export.FUSED else plain


@functools.cache
def size_of(model: str) -> int:
    return MODELS.get(model) or third_party.input_size(model, third_party.build(model))


def place(root: Path, model: str, who: str, target: str, size: int) -> Path:
    """The file of an export. What was found out about it is beside it."""
    return root / f"{model.replace(':', '-').replace('/', '-')}-{size}-{who}{export.TARGETS[target].suffix}"


def make(root: Path, model: str, target: str, size: int) -> None:
    """The exports of a model, unless they are there."""
    image, _ = third_party.picture(None, size)
    for who in kinds(model, target):
        path = place(root, model, who, target, size)
        notes = path.with_name(f"{path.name}.json")
        if notes.exists():
            continue
        found = export.export_model(
            third_party.build(model), image, target, path, swapped=who != "original", fused=who == "fused"
        )
        if not found.ok:
            raise SystemExit(f"{path} differs from the model by {found.error:.1e}, {found.allowed:.1e} allowed")
        files.write(notes, json.dumps(asdict(found)))
        print(f"exported: {path}, {found.bytes:,} bytes", file=sys.stderr)


def measure(root: Path, model: str, target: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the export of each kind, timed in turn in one process."""
    size = options.size or size_of(model)
    image, _ = third_party.picture(None, size)
    notes, calls = {}, {}
    if target == "executorch":
        on_threads(options.threads)
    for who in kinds(model, target):
        kind = export.require(target, who == "fused")
        path = place(root, model, who, target, size)
        notes[who] = json.loads(path.with_name(f"{path.name}.json").read_text())
        assert kind.load is not None
        with export.quiet():
            run = kind.load(path, options.threads)
        calls[who] = lambda run=run: run(image)
    times = timing.interleave(calls, rounds=options.rounds, min_time=options.min_time)
    return [
        {
            **report.machine(),
            "model": model,
            "size": size,
            "target": target,
            "runtime": f"{TARGETS[target]} {metadata.version(TARGETS[target])}",
            "provider": who,
            "swapped_blocks": notes[who]["swapped"],
            "fused_nodes": notes[who]["details"].get("fused_nodes", ""),
            "bytes": notes[who]["bytes"],
            "delegated_share": notes[who]["details"].get("delegated_share", ""),
            "error": f"{notes[who]['error']:.1e}",
            **time_columns(t, times["original"]),
        }
        for who, t in times.items()
    ]


def on_threads(count: int) -> None:
    """Give ExecuTorch's pool, which is the process's, so many threads, while nothing is loaded that uses it."""
    from executorch.extension.pybindings import portable_lib

    if portable_lib._threadpool_get_thread_count() != count:
        portable_lib._unsafe_reset_threadpool(count)


def runnable() -> list[str]:
    """The targets that are installed here; says which are not."""
    found = []
    for target in TARGETS:
        try:
            export.require(target)
            found.append(target)
        except report.UsageError as error:
            print(f"export: left out: {error}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    parser.add_argument("--to", nargs="+", choices=TARGETS, help="default: all that are installed")
    parser.add_argument("--size", type=int, help="side of the picture (default: that of the model)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--min-time", type=float, default=2.0, help="seconds for each on average")
    parser.add_argument("--files", type=Path, default=Path(__file__).parent / "out" / "export")
    parser.add_argument("--export-only", action="store_true", help="make the files that are missing, time nothing")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    if not options.export_only:
        keep_pages()
    torch.set_num_threads(options.threads)
    options.files.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        for target in options.to or runnable():
            for model in options.model:
                make(options.files, model, target, options.size or size_of(model))
                if not options.export_only:
                    rows += measure(options.files, model, target, options)
    except report.UsageError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    if rows:
        shown = (
            "model",
            "target",
            "provider",
            "fused_nodes",
            "bytes",
            "median_us",
            "speedup_median",
            "speedup_min",
        )
        show(rows, shown)
        if not options.no_file:
            merge(rows, folder() / "export.csv", ("target", "model", "size", "provider", "threads"))
    return 0


if __name__ == "__main__":
    sys.exit(command.run("export", main))
