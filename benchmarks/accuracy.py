"""How far are products from float64?

    python benchmarks/accuracy.py [--codecs CODEC,...] [--json FILE] [--plot FILE]

The product and the gradient of its input, of every codec at all its rates, with accuracy "auto",
"exact" and, of the product, "int8": the norm of the error over that of the float64 product with the
decoded weight. "auto" is to stay within 3e-3; "int8" is "auto" where a codec has no kernel for it.
"""

from __future__ import annotations

import torch
from common import every, parse_with_device, parser, save

from reality_stone import bench, cli, ops, show
from reality_stone.codecs import Codec
from reality_stone.draw import Bar, draw_bars

WANTED = 3e-3
COLUMNS = ("forward_auto", "forward_exact", "forward_int8", "input_auto", "input_exact")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def measure(codec: Codec, shape: tuple[int, int], batches: list[int], device: str) -> list[dict]:
    """A row a batch, with the error of each product in each mode."""
    packed = bench.random_packed(codec, shape)
    weight = packed.decode().double()
    packed = packed.to(device)
    whole = (packed.codes, list(packed.params.values()), codec.spec, shape)
    rows = []
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, shape[1], generator=generator)
        g = torch.randn(batch, shape[0], generator=generator)
        y, dx = x.double() @ weight.T, g.double() @ weight
        row = {"what": codec.spec, "batch": batch}
        for column in COLUMNS:
            what, mode = column.split("_")
            with ops.accuracy(mode):
                if what == "forward":
                    row[column] = relative(ops.linear(x.to(device), *whole).cpu(), y)
                else:
                    row[column] = relative(ops.linear_grad_input(g.to(device), *whole).cpu(), dx)
        rows.append(row)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--codecs", type=cli.configured, help="default: all, at all rates")
    options.add_argument("--shape", type=cli.shapes, default=[(1024, 4096)], metavar="OUTxIN")
    options.add_argument("--batches", type=cli.counts, default=[1, 8, 128])
    args = parse_with_device(options)
    held = [name for name in COLUMNS if not name.endswith("int8")]
    codecs = args.codecs or every()
    rows = [
        row for codec in codecs
        for row in measure(codec, args.shape[0], args.batches, args.device)
    ]  # fmt: skip
    head = ("codec", "batch", *(name.replace("_", " ") for name in COLUMNS), "")
    print(show.table(head, (
        (show.codec(r["what"]), r["batch"], *(f"{r[name]:.1e}" for name in COLUMNS),
         "" if max(r[name] for name in held) <= WANTED else "over")
        for r in rows
    )))  # fmt: skip
    print(f"relative error of {args.shape[0][0]} x {args.shape[0][1]}, float32 activations, "
          f"{args.device}, {ops.isa()}; over: above {WANTED:g}")  # fmt: skip
    save(args.json, __doc__.splitlines()[0], rows, shape=args.shape[0], device=args.device)
    if args.plot:
        panels = {
            f"batch {batch}, {name.replace('_', ' ')}": [
                Bar(show.codec(r["what"]), r[name], f"{r[name]:.1e}", name.split("_")[1])
                for r in rows if r["batch"] == batch
            ]
            for batch in args.batches for name in COLUMNS
        }  # fmt: skip
        draw_bars(panels, args.plot, "relative error", WANTED, len(COLUMNS))


if __name__ == "__main__":
    main()
