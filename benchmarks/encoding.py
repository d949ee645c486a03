"""How fast does a core encode, and what does a fast search cost in error?

    python benchmarks/encoding.py [--codecs "trellis(bits=2)"] [--json FILE] [--plot FILE]
    python benchmarks/encoding.py --device cuda --codecs "trellis(bits=2)"

Every codec at all its rates, one thread, on a Gaussian matrix: million weights a second of
processor time, the fitting of params in it, and the normalised squared error. A trellis is searched
both ways. On a GPU it is the op alone, for params that are there, by the host's clock.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
from common import every, parse_with_device, parser, save
from torch import Tensor

from reality_stone import cli, ops, show
from reality_stone.codecs import Codec, Residual, Trellis
from reality_stone.draw import Bar, draw_bars
from reality_stone.packed import Packed

WANTED = 5.0  # Mw/s
SEARCH = {"exact": 0.25, "fast": 1.5}  # of a trellis
ON_GPU = 12.0  # of a trellis searched exactly


def both_searches(codecs: list[Codec]) -> list[Codec]:
    """Each trellis once with every search."""
    found: list[Codec] = []
    for one in codecs:
        searched = isinstance(one, Trellis)
        found += [replace(one, search=search) for search in SEARCH] if searched else [one]
    return list(dict.fromkeys(found))


def wanted(one: Codec) -> float:
    if isinstance(one, Residual):
        return wanted(one.base)
    return SEARCH[one.search] if isinstance(one, Trellis) else WANTED


def wanted_on_gpu(one: Codec) -> float:
    return ON_GPU if isinstance(one, Trellis) and one.search == "exact" else 0.0


def on_gpu(one: Codec, weight: Tensor) -> tuple[Packed, float]:
    """A Packed and the seconds of its op on the device of `weight`, waiting for it included."""
    params = one.initial_params(weight.cpu(), 0)
    given = [p.to(weight.device) for p in params.values()]
    torch.cuda.synchronize()
    started = time.perf_counter()
    codes, fitted = ops.encode(weight, None, given, one.spec)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    named = {name: p.cpu() for name, p in zip(params, fitted, strict=True)}
    return Packed(one, tuple(weight.shape), codes.cpu(), named), seconds


def on_core(one: Codec, weight: Tensor) -> tuple[Packed, float]:
    """A Packed and the processor's seconds for it."""
    started = time.process_time()
    packed = one.encode(weight)
    return packed, time.process_time() - started


def measure(codecs: list[Codec], shape: tuple[int, int], turns: int, device: str) -> list[dict]:
    """A row a codec; encodings of all take turns."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given, encode = weight.to(device), on_core if device == "cpu" else on_gpu
    seconds: dict[Codec, list[float]] = {one: [] for one in codecs}
    packed: dict[Codec, Packed] = {}
    for one in codecs:
        encode(one, given[:32])  # warm: pages, tables, kernels
    for _ in range(turns):
        for one in codecs:
            packed[one], taken = encode(one, given)
            seconds[one].append(taken)
    rows = []
    for one, taken in seconds.items():
        median = statistics.median(taken)
        rows.append({
            "what": one.spec,
            "bits_per_weight": packed[one].bits_per_weight,
            "nmse": ((weight - packed[one].decode()).norm() / weight.norm()).item() ** 2,
            "mws": weight.numel() / 1e6 / median,
            "wanted": wanted(one) if device == "cpu" else wanted_on_gpu(one),
            "spread": (max(taken) - min(taken)) / 2 / median,
            "seconds": taken,
        })  # fmt: skip
    return rows


def searches(rows: list[dict]) -> list[str]:
    """The error of each fast search over that of the exact one."""
    nmse = {row["what"]: row["nmse"] for row in rows}
    return [
        f"{show.codec(what)}: {100 * (error / nmse[exact] - 1):+.2f} % error of the exact search"
        for what, error in nmse.items()
        if (exact := what.replace("search=fast", "search=exact")) != what and exact in nmse
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--codecs", type=cli.configured, help="default: all, at all rates")
    options.add_argument("--shape", type=cli.shapes, default=[(256, 4096)], metavar="OUTxIN")
    options.add_argument("--turns", type=int, default=3)
    args = parse_with_device(options)
    torch.set_num_threads(1)
    rows = measure(both_searches(args.codecs or every()), args.shape[0], args.turns, args.device)
    head = ("codec", "b/w", "Mw/s", "wanted", "spread", "nmse", "")
    print(show.table(head, (
        (show.codec(r["what"]), f"{r['bits_per_weight']:.3f}", f"{r['mws']:.2f}", r["wanted"],
         f"{100 * r['spread']:.0f} %", f"{r['nmse']:.5f}",
         "below" if r["mws"] < r["wanted"] else "")
        for r in rows
    )))  # fmt: skip
    for line in searches(rows):
        print(line)
    where = f"one thread, {ops.isa()}" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, Gaussian {args.shape[0][0]} x {args.shape[0][1]}")
    save(args.json, __doc__.splitlines()[0], rows, shape=args.shape[0], device=where)
    if args.plot:
        bars = [
            Bar(show.codec(r["what"]), r["mws"], f"{r['mws']:.3g}", f"wanted {r['wanted']:g}")
            for r in sorted(rows, key=lambda r: r["mws"])
        ]
        draw_bars({f"encoding, {where}": bars}, args.plot, "million weights a second")


if __name__ == "__main__":
    main()
