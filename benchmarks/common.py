"""What the programs about speed share: codecs, options, and the files they write."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from reality_stone import bench, cli, codec
from reality_stone.codecs import REGISTRY, Codec
from reality_stone.compare import settings
from reality_stone.report.machine import machine

GROUPS = {
    "usual": ("trellis(bits=2)", "trellis(bits=4)", "uniform(bits=4)", "uniform(bits=8)",
              "palette(bits=3)", "hierarchical", "cyclic", "bitfield"),
    "trellis": tuple(f"trellis(bits={bits})" for bits in (1.5, 2, 2.5, 3, 3.5, 4)),
    "uniform": ("uniform(bits=2)", "uniform(bits=3)", "uniform(bits=4)", "uniform(bits=8)"),
    "palette": ("palette(bits=2)", "palette(bits=3)", "palette(bits=4)", "hierarchical"),
    "cyclic": ("cyclic", "cyclic(activation=int8)", "cyclic(word=32, block=8)", "bitfield",
               "bitfield(word=22, block=4)", "cyclic_scalar"),
    "others": ("adaptive_precision", "block_sparse", "hybrid", "seed64", "sparse", "ultra",
               "vq_cyclic", "residual"),
}  # fmt: skip

RATES = {"trellis": (1.5, 2, 2.5, 3, 3.5, 4), "uniform": (2, 3, 4, 8)}  # where any is possible


def parser(doc: str) -> argparse.ArgumentParser:
    """Described by the first line of `doc`, with --json and --plot."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--json", type=Path, metavar="FILE")
    found.add_argument("--plot", metavar="FILE", help="PNG, SVG or PDF")
    return found


def parse_with_device(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, --device among them; ends with one sentence where there is no such device."""
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = options.parse_args()
    try:
        bench.check_device(args.device)
    except ValueError as error:
        options.exit(1, f"{error}\n")
    return args


def add_codecs(options: argparse.ArgumentParser) -> None:
    which = options.add_mutually_exclusive_group()
    which.add_argument("--group", choices=(*GROUPS, "all"), default="usual", help="of codecs")
    which.add_argument(
        "--codecs", type=cli.configured, metavar="CODEC,...", help="instead of a group"
    )


def chosen(args: argparse.Namespace) -> list[Codec]:
    """The codecs that the options name."""
    if args.codecs:
        return args.codecs
    groups = GROUPS if args.group == "all" else [args.group]
    return list(dict.fromkeys(codec(name) for group in groups for name in GROUPS[group]))


def every() -> list[Codec]:
    """All codecs at all their rates."""
    others = [name for name in REGISTRY if name not in RATES]
    return settings(others) + [c for name, bits in RATES.items() for c in settings([name], bits)]


def save(path: Path | None, question: str, rows: Sequence[dict], **more: object) -> None:
    """Write rows with what they answer and the machine they were measured on."""
    if path is not None:
        date = time.strftime("%Y-%m-%d")
        found = {"question": question, "machine": machine(date), **more, "results": list(rows)}
        path.write_text(json.dumps(found, indent=1))
