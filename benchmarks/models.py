"""All models of mvmodels: parameters, multiply-adds, and times in eager mode on the reference, fused and compiled.

The file keeps the rows of models, sizes and modes that are not measured this time.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from _models import SAME, SHOWN, calls, in_mode, parse, rows
from _results import folder, keep_pages, merge, show, stem, write
from torch import nn

import mvmodels
from mvkernels import report, third_party
from mvkernels.commands import command
from mvkernels.dispatch.backend import BACKENDS, BackendUnavailable


def on(backend: str, model: nn.Module) -> nn.Module:
    """A copy of the model whose fused ops run on the backend, with the same weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if "backend" in module.__dict__:
            module.backend = backend
    return model


def counted(name: str, size: int) -> dict[str, Any]:
    """What needs no run: on the meta device."""
    info = mvmodels.model_info(name)
    with torch.device("meta"):
        model = mvmodels.create_model(name, num_classes=info.num_classes)
        macs = mvmodels.count_macs(model, torch.empty(1, 3, size, size))
    params = sum(p.numel() for p in model.parameters())
    return {"model": name, "classes": info.num_classes, "params": params, "size": size, "macs_m": round(macs / 1e6, 1)}


def rows_of(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    size = options.size or mvmodels.model_info(name).input_size
    known = counted(name, size)
    if options.no_latency:
        yield {**report.machine(options.device), **known}
        return
    model = mvmodels.create_model(name, num_classes=known["classes"])
    third_party.randomise(model)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    dtype = getattr(torch, options.dtype)
    model.eval().to(options.device, dtype, memory_format=layout)
    models = {"reference": on("reference", model)}
    if any("backend" in module.__dict__ for module in model.modules()):  # else the model has no fused form
        models["fused"] = on(options.backend, model)
    for batch in options.batch:
        image = third_party.picture(None, size, batch)[0].to(options.device, dtype, memory_format=layout)
        for mode in options.mode:
            columns = {
                **known,
                "batch": batch,
                "dtype": options.dtype,
                "layout": report.short(layout).removesuffix("_format"),
                "mode": mode,
            }
            timed = calls(mode, in_mode(mode, models, not options.no_compile), image)
            yield from rows(timed, columns, options.device, options.rounds, options.seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--most-params", type=float, default=100.0, help="leave larger models out (in millions)")
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="of the fused ops")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--mode", nargs="+", default=["fwd"], choices=("fwd", "full"))
    parser.add_argument("--size", type=int, help="of the pictures; by default what each model is published for")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true", help="model and picture in channels-last memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each provider, without --rounds")
    parser.add_argument("--no-latency", action="store_true", help="parameters and multiply-adds only")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parse(parser)
    keep_pages()
    torch.set_num_threads(options.threads)
    names = [name for pattern in options.model for name in mvmodels.list_models(pattern)]
    if not names:
        parser.error(f"no model is called {' or '.join(options.model)}")
    names = [n for n in dict.fromkeys(names) if mvmodels.model_info(n).params <= options.most_params * 1e6]
    found: list[dict[str, Any]] = []
    target = folder(options.device) / f"{stem('models', options.threads)}.csv"
    for i, name in enumerate(names, 1):
        print(f"[{i}/{len(names)}] {name}", file=sys.stderr)
        try:
            found += rows_of(name, options)
        except BackendUnavailable as error:
            parser.error(str(error))
        if not (options.no_file or options.no_latency):
            merge(found, target, SAME)
    if not found:
        parser.error(f"all of these models have more than {options.most_params} million parameters")
    shown = [key for key in ("model", "params", "macs_m", *SHOWN[1:]) if key in found[0]]
    show(found, shown)
    if options.no_latency and not options.no_file:
        write(found, folder(options.device) / "model_sizes.csv")
    return 0


if __name__ == "__main__":
    sys.exit(command.run("models", main))
