"""All models of mvmodels: parameters, multiply-adds, and latency in eager mode on the reference, fused and compiled."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _results import folder, keep_pages, write
from torch import Tensor, nn

import mvmodels
from mvkernels import report, third_party, timing


def on(backend: str, model: nn.Module) -> nn.Module:
    """A copy of the model whose fused ops run on the backend, with the same weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if "backend" in module.__dict__:
            module.backend = backend
    return model


def providers(model: nn.Module, backend: str, compiled: bool) -> dict[str, nn.Module]:
    """The model in each form, by name. One without a fused op has no fused form."""
    models = {"reference": on("reference", model)}
    if any("backend" in module.__dict__ for module in model.modules()):
        models["fused"] = on(backend, model)
    if compiled:
        torch._dynamo.reset()  # models of a family are one class, and its code is compiled only so often
        models |= {f"{who}, compiled": torch.compile(copy.deepcopy(m)) for who, m in models.items()}
    return models


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [*out]


def check(models: dict[str, nn.Module], image: Tensor) -> None:
    """No time for a model that computes something else: outputs within what a deep float32 network's rounding makes."""
    with torch.no_grad():
        expected = tensors(models["reference"](image))
        for name, model in models.items():
            for out, wanted in zip(tensors(model(image)), expected, strict=True):
                error = float((out - wanted).abs().max() / wanted.abs().max())
                if not error < 1e-2:
                    raise SystemExit(f"{name}: outputs differ from the reference by {error:.1e} of the largest")


def forward(model: nn.Module, image: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return model(image)

    return call


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
    model.eval().to(options.device, memory_format=layout)
    models = providers(model, options.backend, not options.no_compile)
    for batch in options.batch:
        image = third_party.picture(None, size, batch)[0].to(options.device, memory_format=layout)
        check(models, image)
        calls = {who: forward(m, image) for who, m in models.items()}
        times = timing.interleave(calls, options.device, options.rounds, min_time=options.seconds)
        for who, t in times.items():
            yield {
                **report.machine(options.device),
                **known,
                "batch": batch,
                "layout": report.short(layout).removesuffix("_format"),
                "provider": who,
                "median_us": round(t.median * 1e6, 1),
                "min_us": round(t.min * 1e6, 1),
                "p20_us": round(t.quantile(0.2) * 1e6, 1),
                "p80_us": round(t.quantile(0.8) * 1e6, 1),
                "rounds": len(t.samples),
                "speedup_median": round(times["reference"].median / t.median, 3),
                "speedup_min": round(times["reference"].min / t.min, 3),
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--most-params", type=float, default=100.0, help="leave larger models out (in millions)")
    parser.add_argument("--backend", default="auto", help="of the fused ops")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--size", type=int, help="of the pictures; by default what each model is published for")
    parser.add_argument("--channels-last", action="store_true", help="model and picture in channels-last memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each provider, without --rounds")
    parser.add_argument("--no-latency", action="store_true", help="parameters and multiply-adds only")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args()
    keep_pages()
    torch.set_num_threads(options.threads)
    names = [name for pattern in options.model for name in mvmodels.list_models(pattern)]
    if not names:
        parser.error(f"no model is called {' or '.join(options.model)}")
    names = [n for n in dict.fromkeys(names) if mvmodels.model_info(n).params <= options.most_params * 1e6]
    rows = []
    for i, name in enumerate(names, 1):
        print(f"[{i}/{len(names)}] {name}", file=sys.stderr)
        rows += rows_of(name, options)
    if not rows:
        parser.error(f"all of these models have more than {options.most_params} million parameters")
    wanted = ("model", "params", "size", "macs_m", "batch", "provider", "median_us", "min_us", "speedup_median")
    shown = tuple(key for key in wanted if key in rows[0])
    print(report.table([tuple(row[key] for key in shown) for row in rows], shown))
    if not options.no_file:
        write(rows, folder(options.device) / ("model_sizes.csv" if options.no_latency else "models.csv"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
