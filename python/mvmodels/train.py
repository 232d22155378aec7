"""Train a model of this package: ``python -m mvmodels.train --model mobilevit_xxs --data FOLDER``.

DATA is a folder with a folder of pictures for each class (or with train and val, each like that), or "digits" for
scikit-learn's. Checkpoints go to --output: last.pt, from which --resume goes on as if nothing had happened, and
best.pt, the best weights. Under torchrun every process trains on its share of each batch's pictures.

Exit status: 0, trained; 2, what was asked for cannot be done, in one line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mvkernels.commands.command import Parser, print_json, run
from mvkernels.report import Progress, UsageError, machine, table
from mvmodels import checkpoint
from mvmodels.command import backend, device, number, setting
from mvmodels.data import Digits, Pictures, folder_data
from mvmodels.engine import Options, Trainer, say
from mvmodels.registry import model_info

_PROG = "python -m mvmodels.train"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = Parser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = main.add_argument
    add("--model", required=True, help="name of a model, see mvmodels.list_models()")
    add("--data", default="digits", metavar="FOLDER|digits", help="folder of images, or digits (default)")
    add("--output", type=Path, metavar="DIR", help="checkpoints and logs (default: runs/MODEL)")
    add("--resume", action="store_true", help="continue from DIR/last.pt, if it exists")
    add("--save-every", type=number(int, 0), default=0, metavar="STEPS", help="save every STEPS steps too")
    add("--epochs", type=number(int, 1), default=12, help="epochs (default 12)")
    add("--batch-size", type=number(int, 1), default=64, help="batch size of each process (default 64)")
    add("--lr", type=number(float, 0), default=2e-3, help="highest learning rate (default 2e-3)")
    add("--lr-min", type=number(float, 0), help="learning rate at the start and the end (default: a tenth of --lr)")
    add("--warmup", type=number(int, 0), metavar="STEPS", help="steps of warm-up (default: a twentieth of all)")
    add("--weight-decay", type=number(float, 0), default=0.01, help="weight decay (default 0.01)")
    add("--smoothing", type=number(float, 0, 1), default=0.1, help="label smoothing (default 0.1)")
    add("--ema", type=number(float, 0, 1), default=5e-4, help="share of each step in the moving average; 0: no average")
    add("--clip", type=number(float, 0), default=0.0, metavar="NORM", help="limit of the gradient norm (default: none)")
    add(
        "--size",
        type=number(int, 8, most=checkpoint.LARGEST),
        help="side of the images in pixels (default: 32 for digits, else that of the model)",
    )
    add("--multi-scale", choices=("variable", "fixed"), help="sizes from --scales, with a variable or fixed batch")
    add("--scales", type=number(int, 8, most=checkpoint.LARGEST), nargs=2, default=(160, 320), metavar=("MIN", "MAX"))
    add("--held-out", type=number(float, 0, 1), default=0.1, help="share of a folder without train and val")
    add("--no-flip", action="store_true", help="do not mirror images of a folder")
    add(
        "--set",
        type=setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the model",
    )
    add("--seed", type=number(int, 0), default=0)
    add("--device", help="default: cuda if there is one, else cpu; under torchrun each process has its own GPU")
    add("--backend", default="auto", help="backend of the fused ops: auto, reference, cpp, triton, cuda (default auto)")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--workers", type=number(int, 0), help="processes that read images (default: 0 for digits, else up to 4)")
    add("--threads", type=number(int, 1), help="CPU threads of torch")
    add("--no-tensorboard", action="store_true")
    add("--json", action="store_true", help="print the final figures as one JSON document on stdout")
    return main


def data_sets(where: str, options: Options) -> tuple[Pictures, Pictures]:
    """To train on and to test on. Raises UsageError for what cannot be read."""
    channels = options.settings.get("in_chans", 1 if where == "digits" else 3)
    known, kind = ((1,), "grey") if where == "digits" else ((1, 3), "grey (1) or of three colours (3)")
    if isinstance(channels, int) and channels > 0 and channels not in known:
        raise UsageError(f"in_chans is {channels}, the pictures of {where} are {kind}")
    if where == "digits":
        return Digits(False, options.size), Digits(True, options.size)
    data = folder_data(where, options.size, channels, options.flip, options.held_out, seed=options.seed)
    if len(data[0].classes) < 2:
        raise UsageError(f"{where} has only one class, {data[0].classes[0]}: want a folder for each of several classes")
    return data


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    return run(_PROG, lambda: _train(parser().parse_args(argv)))


def _train(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    options.output = output = arguments.output or Path("runs") / options.model
    train, test = data_sets(arguments.data, options)
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many:
        dist.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
    try:
        return _run(arguments, options, train, test, output)
    finally:
        if many:
            dist.destroy_process_group()


def _options(arguments: argparse.Namespace) -> Options:
    """What the command line asks for, checked before any data are read."""
    try:
        info = model_info(arguments.model)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    digits = arguments.data == "digits"
    where = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where == "cuda":
        where = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if where.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.set_device(device(where))
    options = Options(
        model=arguments.model,
        scales=tuple(arguments.scales),
        flip=not arguments.no_flip,
        settings=dict(arguments.set),
        size=arguments.size or (32 if digits else info.input_size),
        device=device(where),
        backend=backend(arguments.backend),
        workers=(0 if digits else min(4, _cores())) if arguments.workers is None else arguments.workers,
    )
    for name in (
        "epochs", "batch_size", "lr", "lr_min", "warmup", "weight_decay", "smoothing", "ema", "clip", "multi_scale",
        "held_out",
        "seed", "amp", "save_every",
    ):  # fmt: skip
        setattr(options, name, getattr(arguments, name))
    return options


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(arguments: argparse.Namespace, options: Options, train: Pictures, test: Pictures, output: Path) -> int:
    first = not (dist.is_initialized() and dist.get_rank() > 0)
    try:
        trainer = Trainer(options, train, test, report=_report if first else None)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    with contextlib.ExitStack() as stack:
        _by_the_first(lambda: stack.enter_context(checkpoint.claimed(output)))
        return _go(arguments, trainer, output, first)


def _by_the_first(action: Callable[[], Any]) -> None:
    """Done by the first process, before the others go on; where it raises UsageError, all do."""
    told: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except UsageError as error:
            told = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(told, 0)
    if told[0] is not None:
        raise UsageError(told[0])


def _go(arguments: argparse.Namespace, trainer: Trainer, output: Path, first: bool) -> int:
    options, last = trainer.options, output / "last.pt"
    if last.exists():
        if not arguments.resume:
            raise UsageError(f"{last} exists: continue it with --resume, or start a new run with another --output")
        trainer.restore(checkpoint.read_training(last), last)
        if first:
            say(f"resumed at step {trainer.step} of {trainer.steps}")
    progress = Progress(trainer.steps) if first else None
    if progress is not None:
        progress.done = trainer.step
        trainer.progress = progress
        trainer.board = None if arguments.no_tensorboard else _board(output / "tensorboard", trainer.step)
    try:
        result = trainer.run()
    finally:
        if progress is not None:
            progress.close()
        if trainer.board is not None:
            trainer.board.close()
    if first:
        _print({**result, "data": arguments.data, "backend": options.backend}, options.device, output, arguments.json)
    return 0


def _board(folder: Path, step: int) -> Any:
    """A TensorBoard writer that goes on at ``step``, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("tensorboard is not installed, nothing is logged for it: pip install 'mvkernels[train]'")
        return None
    return SummaryWriter(str(folder), purge_step=step)


def _report(row: dict[str, Any]) -> None:
    average = f", of the average {100 * row['ema_accuracy']:.2f} %" if "ema_accuracy" in row else ""
    say(
        f"epoch {row['epoch']}: loss {row['loss']:.4f}, accuracy {100 * row['accuracy']:.2f} %{average}, "
        f"{row['seconds']:.1f} s"
    )


def _print(result: dict[str, Any], where: str, output: Path, as_json: bool) -> None:
    if as_json:
        print_json({**result, "output": str(output), "machine": machine(where)})
        return
    shown = [name for name in result["history"][0] if name != "cpu_seconds"]
    print(table([[str(row[name]) for name in shown] for row in result["history"]], shown))
    print(f"best accuracy {100 * result['best_accuracy']:.2f} %, weights in {output / 'best.pt'}")


if __name__ == "__main__":
    sys.exit(main())
