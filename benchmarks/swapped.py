"""Whole models of other packages, original against swapped: inference and a step of training, plain and under
torch.compile, and what else a user of a CPU would run the original in.

The file keeps the rows of models, sizes and modes that are not measured this time.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _models import SAME, Compiled, Model, calls, in_mode, parse, rows, show
from _results import folder, keep_pages, merge, stem
from torch import nn

from mvkernels import export, report, third_party
from mvkernels.commands import command
from mvkernels.dispatch.backend import BACKENDS, BackendUnavailable
from mvkernels.nn import fused_layers
from mvkernels.swap import swap

MODELS = {  # and the sides of their pictures
    "transformers:mobilevit_xxs": 256,
    "transformers:mobilevit_s": 256,
    "timm:mobilevit_xxs": 256,
    "timm:mobilevit_xs": 256,
    "timm:mobilevit_s": 256,
    "timm:efficientvit_b0": 256,
    "timm:efficientvit_b1": 256,
    "timm:efficientvit_b2": 256,
    "timm:efficientformer_l1": 224,
    "timm:poolformer_s12": 224,
    "mvmodels:mobile_former_294m": 224,
    "timm:coatnet_0_224": 224,
    "timm:swin_tiny_patch4_window7_224": 224,
    "timm:swinv2_tiny_window8_256": 256,
    "timm:maxvit_tiny_tf_224": 224,
    "timm:tiny_vit_5m_224": 224,
    "timm:levit_256": 224,
    "timm:mobilenetv4_hybrid_medium": 256,
    "diffusers:dc-ae-f32c32-sana-1.0": 256,
}
RUNTIMES = ("freezing", "onnx", "openvino")


class Fused(nn.Module):
    """A model whose transformer layers run as one op, where they can."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> Any:
        with fused_layers():
            return self.model(image)


def built(name: str) -> nn.Module:
    """The model, of an autoencoder the encoder."""
    whole = third_party.build(name)
    return getattr(whole, "encoder", whole)  # type: ignore[no-any-return]


def other(runtime: str, model: nn.Module, image: torch.Tensor, place: Path, threads: int) -> Model:
    """The model as another runtime takes its export."""
    path = place / f"model{export.TARGETS[runtime].suffix}"
    with export.quiet():
        export.export_model(copy.deepcopy(model), image, runtime, path, swapped=False)
        load = export.require(runtime).load
        assert load is not None
        return load(path, threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=list(MODELS), help="as for `mvkernels swap`; of an autoencoder the encoder"
    )
    parser.add_argument("--backend", choices=("auto", *BACKENDS), help="of the swapped modules")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", nargs="+", type=int, help="default: what the model is for")
    parser.add_argument("--mode", nargs="+", default=["fwd", "full"], choices=("fwd", "full"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true", help="model and picture in channels-last memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each provider, without --rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes minutes)")
    parser.add_argument(
        "--runtimes",
        nargs="*",
        default=[],
        choices=RUNTIMES,
        help="what else there is on a CPU: Inductor with frozen weights, the original's export",
    )
    parser.add_argument("--fused-layers", action="store_true", help="also with each transformer layer as one op")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parse(parser)
    keep_pages()
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    for name in options.model:
        for size in options.size or [MODELS.get(name)]:
            try:
                found += rows_of(name, size, options)
            except (report.UsageError, BackendUnavailable) as error:
                parser.error(str(error))
    show(found)
    return 0


def rows_of(name: str, size: int | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """``size`` None: what the model is for."""
    dtype = getattr(torch, options.dtype)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    original = built(name).to(options.device, dtype, memory_format=layout)
    size = size or third_party.input_size(name, original)
    swapped = copy.deepcopy(original)
    count = swap(swapped, backend=options.backend).count
    found: list[dict[str, Any]] = []
    for batch in options.batch:
        image = third_party.picture(None, size, batch)[0].to(options.device, dtype, memory_format=layout)
        for mode in options.mode:
            models = in_mode(mode, {"original": original, "swapped": swapped}, not options.no_compile)
            if options.fused_layers:
                models["swapped, layers fused"] = Fused(copy.deepcopy(swapped).train(mode == "full"))
            with tempfile.TemporaryDirectory() as place:
                if mode == "fwd":
                    models["swapped, norms folded"] = copy.deepcopy(original)
                    swap(models["swapped, norms folded"], backend=options.backend, fold_norms=True)
                    models["swapped, inference"] = copy.deepcopy(original)
                    swap(models["swapped, inference"], backend=options.backend, inference=True)
                    if not options.no_compile:
                        compiled = Compiled(copy.deepcopy(models["swapped, inference"]))
                        models["swapped, inference, compiled"] = compiled
                    for who in ("original", "swapped") if "freezing" in options.runtimes else ():
                        models[f"{who}, freezing"] = Compiled(copy.deepcopy(models[who]), frozen_for=image)
                    for runtime in [name for name in options.runtimes if name != "freezing"]:
                        models[f"original, {runtime}"] = other(runtime, original, image, Path(place), options.threads)
                columns = {
                    "model": name,
                    "swapped_blocks": count,
                    "size": size,
                    "batch": batch,
                    "dtype": options.dtype,
                    "layout": report.short(layout).removesuffix("_format"),
                    "mode": mode,
                }
                found += rows(calls(mode, models, image), columns, options.device, options.rounds, options.seconds)
            if not options.no_file:
                merge(found, folder(options.device) / f"{stem('swapped', options.threads)}.csv", SAME)
    return found


if __name__ == "__main__":
    sys.exit(command.run("swapped", main))
