"""Classify images: ``python -m mvmodels.predict IMAGE... --checkpoint runs/mobilevit_xxs/best.pt``.

A checkpoint of mvmodels.train says itself which model it is of, and the classes. A bare state_dict needs --model, and
--classes for their names. Exit status: 0, or 2 with one line on stderr; then no picture has an answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mvkernels
from mvkernels.commands.command import Parser, print_json, run
from mvkernels.report import UsageError
from mvmodels import checkpoint
from mvmodels.command import backend, device, number, setting
from mvmodels.data import read_picture
from mvmodels.registry import create_model, model_info

_PROG = "python -m mvmodels.predict"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = Parser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = main.add_argument
    add("image", nargs="+", type=Path, help="image files")
    add("--checkpoint", required=True, type=Path, help="checkpoint of mvmodels.train, or a state_dict")
    add("--model", help="model of a state_dict (a checkpoint names its model itself)")
    add("--source", help="code that the names in a state_dict come from: mvmodels (default), authors, timm, …")
    add(
        "--set",
        type=setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the model of a state_dict",
    )
    add("--classes", type=Path, metavar="FILE", help="file with the names of the classes, one per line")
    add(
        "--size",
        type=number(int, 8, most=checkpoint.LARGEST),
        help="side of the image in pixels (default: that of the training, else that of the model)",
    )
    add("--crop", type=number(float, 0.01, most=1), default=0.875, help="share of the side to use (default 0.875)")
    add("--mean", type=number(float), nargs=3, help="mean of each channel for a state_dict, 0 to 1 (default 0.5)")
    add("--std", type=number(float, 1e-6), nargs=3, help="deviation of each channel for a state_dict (default 0.5)")
    add("--top-k", type=number(int, 1), default=5, help="number of classes to print (default 5)")
    add("--no-ema", action="store_true", help="use the weights themselves, not their moving average")
    add(
        "--original",
        action="store_true",
        help="run the model as it is (default: on a CPU by mvkernels.swap(model, inference=True), which is faster)",
    )
    add("--device", default="cpu", help="device to run on (default cpu)")
    add("--backend", default="auto", help="backend of the fused ops: auto, reference, cpp, triton, cuda (default auto)")
    add("--json", action="store_true", help="print one JSON document on stdout")
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Predict; returns the exit status."""
    return run(_PROG, lambda: _predict(parser().parse_args(argv)))


def load(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode, and what is known of it: model, classes, size, channels. Raises UsageError."""
    try:
        if options.model is not None:
            model_info(options.model)  # a misspelt one is told before a file is read
        state = checkpoint.read(options.checkpoint)
        if state.get("format") == checkpoint.FORMAT:
            checkpoint.trained(state, options.checkpoint)
            for name in ("source", "set", "mean", "std"):
                if getattr(options, name):
                    raise UsageError(f"{options.checkpoint} already has these settings: --{name} is for a state_dict")
            if options.model not in (None, state["model"]):
                raise UsageError(f"{options.checkpoint} is a {state['model']}, but --model is {options.model}")
            return checkpoint.build(state, options.checkpoint, not options.no_ema), state
        if options.model is None:
            raise UsageError(f"{options.checkpoint} has no name of its model: give it with --model")
        model = create_model(options.model, **_shape(options, state))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    checkpoint.fit(model, state, options.checkpoint, options.source or "mvmodels")
    known = {"model": options.model, "size": model_info(options.model).input_size}
    return model.eval(), {**known, "channels": dict(options.set).get("in_chans", 3)}


def _shape(options: argparse.Namespace, state: dict[str, Any]) -> dict[str, Any]:
    """Settings of a state_dict's model: as many classes as there are names for."""
    names = {} if options.classes is None else {"num_classes": len(_names(options.classes))}
    return {**names, **dict(options.set)}


def _names(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return text.removesuffix("\n").split("\n")


def _predict(options: argparse.Namespace) -> int:
    where, chosen = device(options.device), backend(options.backend)
    model, known = load(options)
    size = options.size or known["size"]
    # All are read before anything is said of the first.
    pictures = [read_picture(path, size, size, known["channels"], options.crop) for path in options.image]
    pictures = [_normalised(picture, options.mean, options.std) for picture in pictures]
    names = known.get("classes") if options.classes is None else _names(options.classes)
    answers: list[tuple[str, list[dict[str, Any]]]] = []
    # Elsewhere, and in other dtypes, the packed weights would not be used.
    if torch.device(where).type == "cpu" and not options.original:
        mvkernels.swap(model, inference=True)
    with mvkernels.use_backend(chosen), torch.inference_mode():
        model.to(where)
        for path, picture in zip(options.image, pictures):
            probabilities = _probabilities(model, picture[None].to(where), known["model"])
            if names is not None and len(names) != len(probabilities):
                raise UsageError(f"{options.classes} has {len(names)} names for {len(probabilities)} classes")
            top = probabilities.topk(min(options.top_k, len(probabilities)))
            answers.append((str(path), _top(top.values, top.indices, names)))
    if options.json:
        images = [{"image": image, "classes": classes} for image, classes in answers]
        print_json({"model": known["model"], "checkpoint": str(options.checkpoint), "images": images})
        return 0
    for image, classes in answers:
        print(image)
        for found in classes:
            print(f"  {100 * found['probability']:6.2f} %  {found['name']}")
    return 0


def _probabilities(model: nn.Module, picture: Tensor, name: str) -> Tensor:
    try:
        logits = model(picture)
    except mvkernels.BackendUnavailable:
        raise
    except (ValueError, RuntimeError) as error:  # of a size that the model does not take, or too large for the memory
        raise UsageError(f"{name} cannot run an image of {picture.shape[-2]} x {picture.shape[-1]}: {error}") from None
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError(f"{name} is not an image classifier")
    if not logits.isfinite().all():
        raise UsageError(f"{name} returns numbers that are not finite: its weights may be damaged")
    return logits.float().softmax(1)[0].cpu()


def _normalised(picture: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """From -1 … 1 to what a model was trained on: (u - mean) / std of u in 0 … 1."""
    channels = len(picture)
    shift, scale = (torch.tensor(values or (0.5, 0.5, 0.5))[:channels, None, None] for values in (mean, std))
    return ((picture + 1.0) / 2.0 - shift) / scale


def _top(values: Tensor, indices: Tensor, names: Sequence[str] | None) -> list[dict[str, Any]]:
    return [
        {"index": int(i), "name": str(int(i)) if names is None else names[int(i)], "probability": round(float(p), 6)}
        for p, i in zip(values, indices)
    ]


if __name__ == "__main__":
    sys.exit(main())
