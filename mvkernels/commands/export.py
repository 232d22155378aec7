"""``mvkernels export``: write a model for another runtime, run it there, and print what was written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvkernels import export, report, third_party


def command(options: argparse.Namespace, json: Callable[[Any], None] | None) -> int:
    """Returns 1 if the outputs of the export and of the model differ, else 0."""
    target = export.require(options.to, options.fused)  # before a model is built
    model = third_party.build(options.model, options.pretrained)
    name = options.model.partition(":")[2].replace("/", "-")
    path = Path(options.output or f"{name}{'-fused' if options.fused else ''}{target.suffix}")
    batch = options.batch or (2 if options.dynamic else 1)
    if options.dynamic and batch < 2:
        raise report.UsageError(
            f"--batch is {batch}, want at least 2 with --dynamic: the export is traced with it, and then runs any batch"
        )
    size = options.size or third_party.input_size(options.model, model)
    image, _ = third_party.picture(None, size, batch)
    third_party.check_size(options.model, model, image)
    found = export.export_model(
        model, image, options.to, path, dynamic=options.dynamic, swapped=not options.original, fused=options.fused,
        threads=options.threads,
    )  # fmt: skip
    if json is not None:
        json({"model": options.model, **asdict(found), "ok": found.ok})
    else:
        print(text(options.model, found))
    if not found.ok:
        print(f"mvkernels export: the outputs of {found.path} differ from those of the model", file=sys.stderr)
    return 0 if found.ok else 1


def text(model: str, found: export.Exported) -> str:
    """What was written, as lines of text."""
    rows = [
        ("model", f"{model}, {found.swapped} blocks swapped"),
        ("written", f"{found.path}, {found.bytes:,} bytes, {found.nodes} ops in the exported graph"),
        ("input", f"({', '.join(found.input_shape)})"),
    ]
    if "delegated_share" in found.details:
        d = found.details
        rows.append(
            (
                "delegated",
                f"{100 * d['delegated_share']:.1f} % of nodes to XNNPACK ({d['delegated_nodes']} of "
                f"{d['delegated_nodes'] + d['other_nodes']}, {d['subgraphs']} subgraphs)",
            )
        )
        rows += [("  left", f"{count} x {op}") for op, count in d["not_delegated"].items()]
    if found.details.get("fused_nodes") == 0:
        rows.append(("fused", "nothing: no op of this library is in the model, and the file needs no library"))
    elif "fused_nodes" in found.details:
        rows.append(("fused", f"{found.details['fused_nodes']} nodes of {found.details['domain']}, which run with"))
        rows.append(("", found.details["library"]))
    if found.error is None:
        rows.append(("checked", f"not run: mvkernels writes {found.target} files, but cannot run them"))
    else:
        sizes = " and ".join("x".join(map(str, size)) for size in found.checked)
        rows.append(
            (
                "checked",
                f"at {sizes}: difference from the model in float64 {found.error:.1e} of the largest output, "
                f"{found.allowed:.1e} allowed",
            )
        )
    return "\n".join(f"{key:<10} {value}" for key, value in rows)
