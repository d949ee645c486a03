"""How fast is a product beside torch and other libraries?

    python benchmarks/linear.py [--group trellis] [--device cuda] [--json FILE] [--plot FILE]

Forward at batch 1, 8, 128 and 512, and forward with the gradient of the input at 128 and 512, at
the shapes of a large and of a small model. Prints times, the ratio to torch float32 (bfloat16 on a
GPU) and the share of the nearer of the machine's limits. Peers run in the same turns where they
are installed; one that is missing or fails is printed as such.
"""

from __future__ import annotations

import torch
from common import add_codecs, chosen, parse_with_device, parser, save

from reality_stone import bench, cli, show
from reality_stone.draw import draw_benchmark

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (768, 768), (3072, 768)]
BATCHES = {"none": [1, 8, 128, 512], "input": [128, 512]}


def main() -> None:
    options = parser(__doc__)
    add_codecs(options)
    options.add_argument("--shapes", type=cli.shapes, default=SHAPES, metavar="OUTxIN,...")
    options.add_argument("--batches", type=cli.counts, help="default 1,8,128,512; backward 128,512")
    options.add_argument("--backward", nargs="*", choices=("none", "input", "all"),
                         default=list(BATCHES), help="default none input")  # fmt: skip
    options.add_argument("--no-peers", action="store_true")
    options.add_argument("--turns", type=int, default=11)
    options.add_argument("--limit", type=float, default=12.0, help="seconds a shape and batch")
    args = parse_with_device(options)
    peers = () if args.no_peers else bench.PEERS
    found = []
    for backward in args.backward:
        how = bench.How(backward, device=args.device, turns=args.turns, limit=args.limit)
        batches = args.batches or BATCHES.get(backward, BATCHES["input"])
        for shape in args.shapes:
            rows = list(bench.bench([shape], batches, chosen(args), peers, how))
            print(show.benchmark(rows), end="\n\n", flush=True)
            found += rows
    results = [row for row in found if isinstance(row, bench.Result)]
    failed = [row.to_json() for row in found if isinstance(row, bench.Failed)]
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    save(
        args.json, __doc__.splitlines()[0], [row.to_json() for row in results],
        device=device, failed=failed,
    )  # fmt: skip
    if args.plot:
        draw_benchmark(results, args.plot)


if __name__ == "__main__":
    main()
