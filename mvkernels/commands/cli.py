"""The ``mvkernels`` command: info, verify, bench, swap, export, tune.

Exit status: 0, all is well; 1, something was computed wrongly; 2, what was asked for cannot be done; 130 after Ctrl-C;
141 where the reader of a pipe has gone.
Errors are one line on stderr. With ``--json`` stdout is one JSON document and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence

from mvkernels.commands.command import Parser, print_json, run
from mvkernels.dispatch.backend import requested
from mvkernels.report import UsageError, launched, restart_keeping_pages

DTYPES = ("float32", "float16", "bfloat16", "float64")
BACKENDS = ("reference", "cpp", "triton", "cuda")
COMMANDS = ("info", "verify", "bench", "swap", "export", "tune")
"""Each a file beside this one: ``command(options, json)`` runs it, where ``json`` prints a document if it is wanted."""


def _list(value: str) -> list[str]:
    return [part for part in value.split(",") if part]


def _positive(value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return number


def _not_negative(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None
    if not 0 <= number < math.inf:  # nor is it nan
        raise argparse.ArgumentTypeError(f"{value} is not a number from 0 on")
    return number


def parser() -> argparse.ArgumentParser:
    """The whole command line, without running any of it."""
    main = Parser(prog="mvkernels", description="Fused attention kernels for mobile vision models.")
    commands = main.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
        return sub

    command("info", "Version, devices, which backend can run and why the others cannot.")

    verify = command("verify", "Check values and gradients of every op against the float64 reference.")
    verify.add_argument("--op", nargs="+", default=[], metavar="OP", help="ops (default: all)")
    verify.add_argument("--backend", nargs="+", default=[], choices=BACKENDS, help="default: all that can run")
    verify.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    verify.add_argument("--suite", default="small", choices=("small", "full"))
    verify.add_argument("--device", default="cpu")

    bench = command("bench", "Time the ops against the same work done without this library.")
    bench.add_argument("op", nargs="*", help="ops (default: all)")
    bench.add_argument("--suite", default="small", choices=("small", "full"))
    bench.add_argument("--shape", nargs="+", default=[], metavar="PART", help="only shapes whose name has this in it")
    bench.add_argument("--batch", nargs="+", type=_positive, default=[1])
    bench.add_argument("--mode", nargs="+", default=["fwd"], choices=("fwd", "bwd", "full"),
                       help="bwd: the backward alone; full: forward and backward")  # fmt: skip
    bench.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    bench.add_argument("--layout", nargs="+", default=[], choices=("channels_last", "channels_first"))
    bench.add_argument("--backend", nargs="+", default=[], choices=BACKENDS)
    bench.add_argument("--against", type=_list, default=["eager", "sdpa", "compile"], metavar="PEER,...",
                       help="of eager, sdpa, compile (default: these) and thirdparty: modules of timm, transformers, "
                       "diffusers, and FlexAttention")  # fmt: skip
    bench.add_argument("--device", default="cpu")
    bench.add_argument("--threads", type=_positive, default=1)
    bench.add_argument("--rounds", type=_positive, help="samples of each (default: as --min-time allows)")
    bench.add_argument("--min-time", type=_not_negative, default=0.3, help="seconds for each on average (default 0.3)")
    bench.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    bench.add_argument("--csv", metavar="FILE")
    bench.add_argument("--plot", metavar="FILE.png", help="bars of speed-up")
    bench.add_argument("--roofline", metavar="FILE.png", help="work per second under the measured rates")
    bench.add_argument("--read", metavar="FILE.csv", help="measure nothing: take the rows from this file")
    bench.add_argument("--compare", metavar="OLD.csv", help="a ratio for each row; status 1 if one has become slower")
    bench.add_argument(
        "--ab", metavar="COMMIT", help="this checkout against another commit, in turns; status 1 if slower"
    )
    bench.add_argument("--tolerance", type=_not_negative, default=0.05, help="of --compare and --ab (default 0.05)")
    bench.add_argument("--html", metavar="FOLDER", help="measure nothing: write FOLDER/index.html of its CSV files")
    bench.add_argument(
        "--allocator",
        default="kept",
        choices=("kept", "default"),
        help="kept: freed memory stays with the process, so that page faults are not timed",
    )

    swap = command("swap", "Swap a model's attention, verify it, and time it.")
    swap.add_argument("model", metavar="FAMILY:MODEL", help="timm:mobilevit_xs, diffusers:dc-ae-f32c32-in-1.0, ...")
    swap.add_argument("--pretrained", action="store_true", help="download weights (default: random ones)")
    swap.add_argument("--image", metavar="FILE", help="a picture (default: a photograph of scikit-learn, else noise)")
    swap.add_argument("--batch", type=_positive, default=1)
    swap.add_argument("--size", type=_positive, default=256)
    swap.add_argument("--backend", choices=("auto", *BACKENDS))
    swap.add_argument("--device", default="cpu")
    swap.add_argument("--threads", type=_positive, default=1)
    swap.add_argument("--rounds", type=_positive)
    swap.add_argument("--compile", action="store_true", help="time the original under torch.compile too")
    swap.add_argument("--allocator", default="kept", choices=("kept", "default"))

    export = command("export", "Write a model for another runtime, swapped, and check the file there.")
    export.add_argument(
        "model", metavar="FAMILY:MODEL", help="transformers:mobilevit_s, mvmodels:mobile_former_26m, ..."
    )
    export.add_argument("--to", required=True, choices=("torch", "onnx", "openvino", "executorch", "coreml"))
    export.add_argument("--output", metavar="FILE", help="default: the model's name in this folder")
    export.add_argument("--size", type=_positive, help="side of the input (default: the model's own)")
    export.add_argument("--batch", type=_positive, help="default 1, and 2 with --dynamic")
    export.add_argument("--dynamic", action="store_true", help="batch, height and width may change")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--swap", action="store_true", help="export the swapped model (the default)")
    which.add_argument("--original", action="store_true", help="export the model as it is")
    export.add_argument("--pretrained", action="store_true", help="download weights (default: random ones)")
    export.add_argument("--threads", type=_positive, default=1, help="of the runtime that checks the file")

    tune = commands.add_parser("tune", help="Find launch configurations for this GPU.", add_help=False)
    tune.add_argument("rest", nargs=argparse.REMAINDER)
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else []
    return run(" ".join(["mvkernels", *named]), lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["tune"]:
        from mvkernels.commands import tune

        return tune.main(arguments[1:])
    options = parser().parse_args(arguments)
    try:
        requested(None)  # MVKERNELS_BACKEND
    except ValueError as error:
        raise UsageError(str(error)) from None
    if getattr(options, "allocator", "default") == "kept":
        restart_keeping_pages(launched(arguments))
    command = importlib.import_module(f"mvkernels.commands.{options.command}").command
    status: int = command(options, print_json if options.json else None)
    return status
