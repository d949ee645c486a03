"""What do gradients cost beside the forward?

    python benchmarks/gradients.py [--group all] [--shape 4096x4096] [--json FILE] [--plot FILE]

Times the product, the gradient of its input and that of the params in the same turns and prints
both in ratio to the product; for torch the params are the weight. Params are to take at most 1.5
times the product.
"""

from __future__ import annotations

import torch
from common import add_codecs, chosen, parse_with_device, parser, save

from reality_stone import cli, ops, show
from reality_stone.bench import contenders, timing
from reality_stone.draw import Bar, draw_bars
from reality_stone.packed import Packed

WANTED = 1.5


def cases(one: contenders.Contender, shape: tuple[int, int], batch: int, device: str) -> dict:
    """The three products by name, each a function of a running number."""
    x = torch.randn(batch, shape[1], device=device).to(one.dtype)
    g = torch.randn(batch, shape[0], device=device).to(one.dtype)

    def copy(i: int):
        return one.copies[i % len(one.copies)]

    def whole(p: Packed) -> tuple:
        return p.codes, list(p.params.values()), p.codec.spec, p.shape

    if one.kind == "torch":
        return {
            "forward": lambda i: torch.nn.functional.linear(x, copy(i)),
            "input": lambda i: g @ copy(i),
            "params": lambda i: g.T @ x,
        }
    return {
        "forward": lambda i: ops.linear(x, *whole(copy(i))),
        "input": lambda i: ops.linear_grad_input(g, *whole(copy(i))),
        "params": lambda i: ops.linear_grad_params(g, x, *whole(copy(i))),
    }


@torch.no_grad()
def measure(codecs, shape: tuple[int, int], batch: int, device: str) -> list[dict]:
    """A row a layer: seconds of the three, and the two ratios."""
    layers = contenders.dense(shape, device)
    layers |= {codec.spec: contenders.packed(codec, shape, device) for codec in codecs}
    runs = {
        (name, what): timing.graphed(run, len(one.copies)) if device == "cuda" else run
        for name, one in layers.items()
        for what, run in cases(one, shape, batch, device).items()
    }
    clock = timing.device_seconds if device == "cuda" else timing.host_seconds
    found = timing.interleaved(runs, limit=20, clock=clock)
    rows = []
    for name, one in layers.items():
        part = {what: found[name, what] for what in ("forward", "input", "params")}
        graph = len(one.copies) if device == "cuda" else 1
        row = {"shape": shape, "batch": batch, "what": name, "device": device}
        row |= {what: t.seconds / graph for what, t in part.items()}
        row |= {f"{what}_ratio": row[what] / row["forward"] for what in ("input", "params")}
        rows.append(row | {"spread": max(t.spread for t in part.values())})
    return rows


def main() -> None:
    options = parser(__doc__)
    add_codecs(options)
    options.add_argument("--shape", type=cli.shapes, default=[(4096, 4096)], metavar="OUTxIN")
    options.add_argument("--batches", type=cli.counts, default=[8, 128, 512])
    args = parse_with_device(options)
    rows = []
    for shape in args.shape:
        for batch in args.batches:
            rows += measure(chosen(args), shape, batch, args.device)
    head = ("layer", "shape", "batch", "forward ms", "input x", "params x", "spread", "")
    print(show.table(head, (
        (show.codec(r["what"]), f"{r['shape'][0]} x {r['shape'][1]}", r["batch"],
         f"{r['forward'] * 1e3:.3f}", f"{r['input_ratio']:.2f}", f"{r['params_ratio']:.2f}",
         f"{100 * r['spread']:.0f} %", "over" if r["params_ratio"] > WANTED else "")
        for r in rows
    )))  # fmt: skip
    print(f"ratios to the layer's own forward; over: params above {WANTED}; "
          f"{torch.get_num_threads()} threads, {ops.isa()}")  # fmt: skip
    save(args.json, __doc__.splitlines()[0], rows)
    if args.plot:
        panels: dict[str, list[Bar]] = {}
        for r in rows:
            title = f"{r['shape'][0]} x {r['shape'][1]}, batch {r['batch']}"
            panels.setdefault(title, []).extend(
                Bar(f"{show.codec(r['what'])}, {what}", r[f"{what}_ratio"],
                    f"{r[what] * 1e3:.3g} ms", what)
                for what in ("input", "params")
            )  # fmt: skip
        draw_bars(panels, args.plot, "times the forward", WANTED, len(args.batches))


if __name__ == "__main__":
    main()
