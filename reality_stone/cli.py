"""The `reality-stone` command: parse, call, print."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__, show
from .codecs import REGISTRY, Codec
from .codecs import codec as make_codec

BENCH_CODECS = "trellis(bits=2),trellis(bits=4),uniform(bits=4),uniform(bits=8)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 1 failed, 2 bad usage, 130 interrupted."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its sentence
        return int(stop.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = args.run(args)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as stop:
        _say(f"interrupted: {stop}" if str(stop) else "interrupted")
        return 130
    except BrokenPipeError:
        # The reader has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        _say(f"error: {_sentence(error)}")
        return 1


# --- verbs ---


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import diagnose

    found = diagnose()
    _print(args, found.to_json(), lambda: show.diagnosis(found))
    return 1 if found.problems else 0


def _calibration(args: argparse.Namespace):
    from .jobs import Calibration

    if not args.calibration:
        return None
    return Calibration(args.calibration, args.samples, args.context, args.seed)


def _plan(args: argparse.Namespace) -> int:
    from .jobs import plan_directory

    found = plan_directory(args.directory, args.bits, args.codec, _calibration(args), args.skip)
    if args.out:
        found.save(args.out)
    if args.plot:
        found.plot(args.plot)
    _print(args, found.to_json(), lambda: str(found))
    return 0


def _compress(args: argparse.Namespace) -> int:
    from .jobs import compress_directory
    from .plan import Plan

    plan = Plan.load(args.plan) if args.plan else None
    report = compress_directory(
        args.source, args.target, args.bits, args.codec, _calibration(args), plan=plan,
        resume=args.resume, curvature=args.curvature,
    )  # fmt: skip
    if report is not None:  # of several processes the first has it
        _print(args, report.to_json(), lambda: str(report))
    return 0


def _decompress(args: argparse.Namespace) -> int:
    import torch

    from .streaming import decompress_checkpoint

    dtype = args.dtype and getattr(torch, args.dtype)
    found = decompress_checkpoint(args.source, args.target, dtype)
    _print(args, vars(found), lambda: show.decompressed(found))
    return 0


def _eval(args: argparse.Namespace) -> int:
    from .jobs import evaluate_directory

    found = evaluate_directory(args.directory, args.text, args.reference, args.context, args.tokens)
    _print(args, found.to_json(), lambda: show.evaluation(found))
    return 0


def _finetune(args: argparse.Namespace) -> int:
    from .jobs import Calibration, Judge, finetune_directory

    windows = args.windows if args.steps is None else args.steps * args.batch
    judge = None if args.judge is None else Judge(args.judge, args.judge_tokens)
    found = finetune_directory(
        args.directory, args.target, Calibration(args.text, windows, args.context, args.seed),
        args.teacher, args.mode, judge, args.state, lr=args.lr, batch=args.batch,
        epochs=args.epochs, rank=args.rank, blockwise=args.blockwise, precision=args.precision,
    )  # fmt: skip
    _print(args, found.to_json(), lambda: show.training(found))
    return 0


def _report(args: argparse.Namespace) -> int:
    from . import report

    request = report.Request(
        args.directory, args.reference, args.text, args.context, args.tokens, args.bench,
        args.training,
    )  # fmt: skip
    found = report.report_directory(request, args.out, args.date)
    _print(args, found.to_json() | {"page": args.out}, lambda: show.report(found, args.out))
    return 0 if found.contents.sound else 1


def _inspect(args: argparse.Namespace) -> int:
    from .inspection import inspect

    found = inspect(args.path)
    _print(args, found.to_json(), lambda: show.contents(found))
    return 0 if found.sound else 1


def _compare(args: argparse.Namespace) -> int:
    from . import compare

    codecs = compare.settings(args.codecs, args.bits)
    found = list(compare.compare(args.file, codecs, args.limit))
    rows = [row for row in found if isinstance(row, compare.Row)]
    skipped = [row for row in found if isinstance(row, compare.Skipped)]
    if args.csv:
        compare.write_csv(rows, args.csv)
    if args.plot:
        compare.plot(rows, args.plot, os.path.basename(args.file))
    means = compare.summary(rows)
    value = {
        "rows": [row.to_json() for row in rows],
        "summary": [row.to_json() for row in means],
        "skipped": [vars(row) for row in skipped],
    }
    _print(args, value, lambda: show.comparison(rows, means, skipped))
    return 0 if rows else 1


def _bench(args: argparse.Namespace) -> int:
    from . import bench
    from .draw import draw_benchmark

    how = bench.How(backward=args.backward, accuracy=args.accuracy, device=args.device)
    peers = bench.PEERS if args.peers else ()
    found = list(bench.bench(args.shapes, args.batches, args.codecs, peers, how))
    results = [row for row in found if isinstance(row, bench.Result)]
    if args.plot:
        draw_benchmark(results, args.plot)
    failed = [row.to_json() for row in found if isinstance(row, bench.Failed)]
    value = {"results": [row.to_json() for row in results], "failed": failed}
    _print(args, value, lambda: show.benchmark(found))
    return 0


# --- parsing ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reality-stone", description="Trainable compressed layers for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"reality-stone {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str):
        one = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        one.add_argument("--json", action="store_true", help="print JSON on stdout")
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        one.set_defaults(run=run)
        return one

    def calibrated(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--calibration", metavar="FILE", help="text, plain or .xz: better at low bits"
        )
        one.add_argument("--samples", type=_count, default=128, help="windows (default 128)")
        one.add_argument("--context", type=_count, default=256, help="tokens each (default 256)")
        one.add_argument("--seed", type=int, default=5, help="of their choice (default 5)")

    verb("doctor", _doctor, "what is installed, which kernels run, and a self-test")

    one = verb("compress", _compress, "compress a Hugging Face language model")
    one.add_argument("source", metavar="IN", help="directory of the dense model")
    one.add_argument("target", metavar="OUT", help="directory to write")
    rate = one.add_mutually_exclusive_group()
    rate.add_argument(
        "--bits", type=_positive, default=2.5,
        help="bits per weight (default 2.5); between the codec's rates, planned layer by layer",
    )  # fmt: skip
    rate.add_argument("--plan", metavar="FILE", help="what `plan --out` wrote, instead of --bits")
    one.add_argument(
        "--codec", type=_codec, default="trellis",
        help='a name, used at --bits, or settings as in "uniform(bits=4, group=64)"',
    )  # fmt: skip
    calibrated(one)
    one.add_argument(
        "--curvature", action="store_true",
        help="with --calibration: weigh errors by their cost in likelihood too",
    )  # fmt: skip
    one.add_argument("--resume", action="store_true", help="go on with an interrupted run")

    one = verb("plan", _plan, "choose a rate for each layer, before compressing")
    one.add_argument("directory", metavar="DIR", help="directory of the dense model")
    one.add_argument("--bits", type=_positive, default=2.5, help="on average (default 2.5)")
    one.add_argument(
        "--codec", type=_codec, default="trellis", help="a name, or settings but for their bits"
    )
    one.add_argument(
        "--skip", metavar="PATTERN", action="append", default=[], help="layers that stay dense"
    )
    calibrated(one)
    one.add_argument("--out", metavar="FILE", help="write the plan as JSON, for `compress --plan`")
    one.add_argument("--plot", metavar="FILE", help="write rates and loss as PNG, SVG or PDF")

    one = verb("decompress", _decompress, "write a compressed model as a dense one again")
    one.add_argument("source", metavar="IN", help="directory of the compressed model")
    one.add_argument("target", metavar="OUT", help="directory to write")
    one.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"),
        help="of the decoded weights (default: what the model had)",
    )  # fmt: skip

    one = verb("eval", _eval, "perplexity of a model on a text, and its KL from a dense one")
    one.add_argument("directory", metavar="DIR", help="dense or compressed model")
    one.add_argument("--text", metavar="FILE", required=True, help="text, plain or .xz")
    one.add_argument("--reference", metavar="DIR", help="dense model to take the KL from")
    one.add_argument("--context", type=_context, default=256, help="tokens a window (default 256)")
    one.add_argument("--tokens", type=_count, default=65536, help="tokens to use (default 65536)")

    one = verb("finetune", _finetune, "train a compressed model; an interrupted run goes on")
    one.add_argument("directory", metavar="DIR", help="compressed model")
    one.add_argument("target", metavar="OUT", help="directory to write")
    one.add_argument("--text", metavar="FILE", required=True, help="text, plain or .xz")
    one.add_argument("--teacher", metavar="DIR", help="dense model to come close to")
    one.add_argument(
        "--mode", choices=("tables", "codes", "lora"), default="tables",
        help="tables and scales, codes too (needs --teacher), or adapters (default tables)",
    )  # fmt: skip
    size = one.add_mutually_exclusive_group()
    size.add_argument("--windows", type=_count, default=512, help="of text (default 512)")
    size.add_argument("--steps", type=_count, help="as many windows as N batches take")
    one.add_argument("--context", type=_context, default=256, help="tokens a window (default 256)")
    one.add_argument("--lr", type=_step, help="default 1e-3 of a table's size, for lora 2e-3")
    one.add_argument("--batch", type=_count, default=8, help="windows a step (default 8)")
    one.add_argument("--epochs", type=_count, default=1, help="times through (default 1)")
    one.add_argument("--rank", type=_count, default=16, help="of adapters (default 16)")
    one.add_argument("--blockwise", action="store_true", help="tables block by block first")
    one.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="float32",
        help="of the forward pass (default float32)",
    )  # fmt: skip
    one.add_argument("--state", metavar="DIR", help="where the run is kept (default OUT.state)")
    one.add_argument("--judge", metavar="FILE", help="text to measure on before and after")
    one.add_argument("--judge-tokens", type=_count, default=16384, help="default 16384")
    one.add_argument("--seed", type=int, default=5, help="of the choice of windows (default 5)")

    one = verb("report", _report, "one HTML page about a compressed model")
    one.add_argument("directory", metavar="DIR", help="compressed model")
    one.add_argument("--reference", metavar="DENSE_DIR", help="dense model to compare it with")
    one.add_argument("--text", metavar="FILE", help="text, plain or .xz, to measure perplexity on")
    one.add_argument("--context", type=_context, default=256, help="tokens a window (default 256)")
    one.add_argument("--tokens", type=_count, default=65536, help="tokens to use (default 65536)")
    one.add_argument("--bench", action="store_true", help="time its matrices on this machine")
    one.add_argument(
        "--training", metavar="LOG.json", nargs="+", default=[],
        help="what finetune --json printed: loss curves",
    )  # fmt: skip
    one.add_argument("--out", metavar="FILE", default="report.html", help="default report.html")
    one.add_argument("--date", metavar="TEXT", default="", help="to stand on the page")

    one = verb("inspect", _inspect, "what is in a compressed file, and where it is damaged")
    one.add_argument("path", metavar="DIR_OR_FILE")

    one = verb("compare", _compare, "rate, distortion and speed of codecs on a safetensors file")
    one.add_argument("file", metavar="FILE.safetensors")
    one.add_argument(
        "--codecs", type=_codecs, default=list(REGISTRY), help="names or settings, with commas"
    )
    one.add_argument(
        "--bits", type=_rates, help="rates for names (default: all of a few, or 2,3,4)"
    )
    one.add_argument("--limit", type=_count, metavar="N", help="only the first N matrices")
    one.add_argument("--csv", metavar="FILE", help="write the rows as CSV")
    one.add_argument("--plot", metavar="FILE", help="write the curve as PNG, SVG or PDF")

    one = verb("bench", _bench, "time the linear of codecs beside torch")
    one.add_argument(
        "--shapes", type=shapes, default=[(4096, 4096)], help="OUTxIN,... (default 4096x4096)"
    )
    one.add_argument("--batches", type=counts, default=[1, 8, 128], help="default 1,8,128")
    one.add_argument(
        "--codecs", type=configured, default=BENCH_CODECS, help=f"default {BENCH_CODECS}"
    )
    one.add_argument(
        "--backward", nargs="?", choices=("input", "all"), const="all", default="none",
        help="and backward: gradients of the input, or (default) of params too",
    )  # fmt: skip
    one.add_argument(
        "--accuracy", choices=("auto", "exact", "int8"), default="auto",
        help="of the codecs' products; int8: activations in 8 bits where a kernel takes them "
        "(default auto)",
    )  # fmt: skip
    one.add_argument("--peers", action="store_true", help="other libraries too, where installed")
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    one.add_argument("--plot", metavar="FILE", help="write speeds as PNG, SVG or PDF")
    return parser


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Have argparse print the sentence of a ValueError instead of one of its own."""

    def run(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, OverflowError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return run


def _number(text: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise ValueError(f"wanted a whole number from {least} up, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 32:
        raise ValueError(f"bits must be above 0 and at most 32, got {text!r}")
    return value


def _learning_rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"the learning rate must be above 0 and finite, got {text!r}")
    return value


def _one_codec(text: str) -> str | Codec:
    return text if text in REGISTRY else make_codec(text)


def _shape(text: str) -> tuple[int, int]:
    out, cross, n = text.strip().lower().partition("x")
    if not cross:
        raise ValueError(f"a shape is OUTxIN, got {text!r}")
    return _number(out, 1), _number(n, 1)


def split(text: str) -> list[str]:
    """Parts between commas that are not inside brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


# What an option's text means; programs in benchmarks/ take the public ones too.
_count = _argument(lambda text: _number(text, 1))
_context = _argument(lambda text: _number(text, 2))
_positive = _argument(_rate)
_step = _argument(_learning_rate)
_codec = _argument(_one_codec)
counts = _argument(lambda text: [_number(part, 1) for part in split(text)])
_rates = _argument(lambda text: [_rate(part) for part in split(text)])
shapes = _argument(lambda text: [_shape(part) for part in split(text)])
_codecs = _argument(lambda text: [_one_codec(part) for part in split(text)])
configured = _argument(lambda text: [make_codec(part) for part in split(text)])


# --- printing ---


def _print(args: argparse.Namespace, value: dict, text: Callable[[], str]) -> None:
    print(json.dumps(_finite(value), indent=1, allow_nan=False) if args.json else text())


def _finite(value: Any) -> Any:
    """JSON has no words for infinity and NaN: null."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sentence(error: BaseException) -> str:
    """One line, whatever the error says."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if not isinstance(error, (ValueError, OSError, ImportError)):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text[:1000] or type(error).__name__


def _warn(message: Warning | str, *_: Any) -> None:
    _say(f"warning: {' '.join(str(message).split())}")


def _say(text: str) -> None:
    print(f"reality-stone: {text}", file=sys.stderr, flush=True)
