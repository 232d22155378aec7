"""The ``mvkernels`` command: info, verify, bench, swap, export, tune.

Exit status: 0, success; 1, a result is wrong or slower than before; 2, the request is invalid or cannot be done;
130, Ctrl-C; 141, the reader of a pipe has closed it.
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
"""Each has a file in this folder, whose ``command(options, json)`` runs it. With --json, ``json`` prints a document."""


def _list(value: str) -> list[str]:
    return [part for part in value.split(",") if part]


def _positive(value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not allowed, want at least 1")
    return number


def _not_negative(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number") from None
    if not 0 <= number < math.inf:  # nor is it nan
        raise argparse.ArgumentTypeError(f"{value} is not allowed, want a finite number of at least 0")
    return number


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    main = Parser(prog="mvkernels", description="Fused attention kernels for mobile vision models.")
    commands = main.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        return sub

    command("info", "Show versions, devices, which backends can run, and why the others cannot.")

    verify = command("verify", "Check outputs and gradients of every op against the float64 reference.")
    verify.add_argument("--op", nargs="+", default=[], metavar="OP", help="ops to check (default: all)")
    verify.add_argument("--backend", nargs="+", default=[], choices=BACKENDS,
                        help="backends to check (default: all that can run)")  # fmt: skip
    verify.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES, help="dtypes (default: all)")
    verify.add_argument("--suite", default="small", choices=("small", "full"), help="which shapes (default small)")
    verify.add_argument("--device", default="cpu", help="device to run on (default cpu)")

    bench = command("bench", "Time the ops, and the same work without mvkernels.")
    bench.add_argument("op", nargs="*", help="ops to time (default: all)")
    bench.add_argument("--suite", default="small", choices=("small", "full"), help="which shapes (default small)")
    bench.add_argument("--shape", nargs="+", default=[], metavar="PART", help="only shapes whose name contains PART")
    bench.add_argument("--batch", nargs="+", type=_positive, default=[1], help="batch sizes (default 1)")
    bench.add_argument("--mode", nargs="+", default=["fwd"], choices=("fwd", "bwd", "full"),
                       help="fwd: the forward; bwd: the backward; full: both (default fwd)")  # fmt: skip
    bench.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="dtypes (default float32)")
    bench.add_argument("--layout", nargs="+", default=[], choices=("channels_last", "channels_first"),
                       help="memory layouts of the maps (default: those of each model)")  # fmt: skip
    bench.add_argument("--backend", nargs="+", default=[], choices=BACKENDS,
                       help="backends to time (default: all kernels that can run, else the reference)")  # fmt: skip
    bench.add_argument("--against", type=_list, default=["eager", "sdpa", "compile"], metavar="PEER,...",
                       help="what to compare with: eager, sdpa, compile (the default is these three), thirdparty "
                       "(modules of timm, transformers and diffusers, and FlexAttention)")  # fmt: skip
    bench.add_argument("--device", default="cpu", help="device to run on (default cpu)")
    bench.add_argument("--threads", type=_positive, default=1, help="CPU threads (default 1)")
    bench.add_argument("--rounds", type=_positive, help="samples of each measurement (default: see --min-time)")
    bench.add_argument("--min-time", type=_not_negative, default=0.3,
                       help="average seconds to spend on each measurement (default 0.3)")  # fmt: skip
    bench.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    bench.add_argument("--csv", metavar="FILE", help="write the rows to this file")
    bench.add_argument("--plot", metavar="FILE.png", help="draw the speed-ups as bars")
    bench.add_argument("--roofline", metavar="FILE.png", help="draw a roofline: FLOP/s against FLOPs per byte")
    bench.add_argument("--read", metavar="FILE.csv", help="do not measure: read the rows from this file")
    bench.add_argument("--compare", metavar="OLD.csv",
                       help="compare with the times in an earlier file; exit status 1 if a row is slower")  # fmt: skip
    bench.add_argument("--ab", metavar="COMMIT",
                       help="time this checkout and COMMIT in turns; exit status 1 if this one is slower")  # fmt: skip
    bench.add_argument("--tolerance", type=_not_negative, default=0.05,
                       help="relative change that --compare and --ab ignore (default 0.05)")  # fmt: skip
    bench.add_argument("--html", metavar="FOLDER",
                       help="do not measure: write FOLDER/index.html from the CSV files in FOLDER")  # fmt: skip
    bench.add_argument("--allocator", default="kept", choices=("kept", "default"),
                       help="kept (default): freed memory stays with the process, to time no page faults")  # fmt: skip

    swap = command("swap", "Swap the attention of a model, verify the result, and time it.")
    swap.add_argument(
        "model", metavar="FAMILY:MODEL", help="for example timm:mobilevit_xs or diffusers:dc-ae-f32c32-in-1.0"
    )
    swap.add_argument("--pretrained", action="store_true", help="download weights (default: random weights)")
    swap.add_argument("--image", metavar="FILE",
                      help="image to run (default: a photograph of scikit-learn if installed, else noise)")  # fmt: skip
    swap.add_argument("--batch", type=_positive, default=1, help="batch size (default 1)")
    swap.add_argument("--size", type=_positive, help="side of the image in pixels (default: that of the model)")
    swap.add_argument("--backend", choices=("auto", *BACKENDS), help="backend of the swapped blocks (default auto)")
    swap.add_argument("--device", default="cpu", help="device to run on (default cpu)")
    swap.add_argument("--threads", type=_positive, default=1, help="CPU threads (default 1)")
    swap.add_argument("--rounds", type=_positive, help="samples of each time (default: as many as fit in a second)")
    swap.add_argument("--inference", action="store_true",
                      help="also swap for inference on packed weights; verify and time that too")  # fmt: skip
    swap.add_argument("--compile", action="store_true", help="also time the original under torch.compile")
    swap.add_argument("--allocator", default="kept", choices=("kept", "default"), help="see mvkernels bench --help")

    export = command("export", "Swap a model, write it for another runtime, and check the file.")
    export.add_argument(
        "model", metavar="FAMILY:MODEL", help="for example transformers:mobilevit_s or mvmodels:mobile_former_26m"
    )
    export.add_argument("--to", required=True, choices=("torch", "onnx", "openvino", "executorch", "coreml"),
                        help="format to write")  # fmt: skip
    export.add_argument("--output", metavar="FILE", help="file to write (default: the model's name, in this folder)")
    export.add_argument("--size", type=_positive, help="side of the input in pixels (default: that of the model)")
    export.add_argument("--batch", type=_positive, help="batch size (default 1, or 2 with --dynamic)")
    export.add_argument("--dynamic", action="store_true", help="let batch, height and width of the input change")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--swap", action="store_true", help="export the swapped model (the default)")
    which.add_argument("--original", action="store_true", help="export the original model")
    export.add_argument(
        "--fused",
        action="store_true",
        help="keep this library's ops as single nodes, for a runtime that loads its kernels (onnx, executorch)",
    )
    export.add_argument("--pretrained", action="store_true", help="download weights (default: random weights)")
    export.add_argument("--threads", type=_positive, default=1, help="CPU threads of the runtime (default 1)")

    tune = commands.add_parser("tune", help="Measure launch configurations on this GPU.", add_help=False)
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
