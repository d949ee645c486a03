"""How much of the loss of 2-bit encoding each kind of training takes back, on the shipped model.

    python benchmarks/training.py --train TRAIN.txt.xz --other OTHER.txt --json out.json

Gap closed: 1 - ln(perplexity / dense) / ln(one-shot / dense), by the protocol of
docs/measurements.md. Stages start from the same one-shot encoding:

    tables     tables and scales, end to end (KL to the dense model)
    blockwise  the same, after each block's tables were trained to the dense block's output
    codes      codes found anew block by block, then tables end to end
    latent     the yardstick: float master weights of all layers, end to end, encoded at the end
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import novels

import reality_stone as rs
from reality_stone import hf
from reality_stone.evaluate import windows
from reality_stone.training import finalize, latent, reconstruct
from reality_stone.training.loop import cosine
from reality_stone.training.precision import training_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="*", default=["tables", "blockwise", "codes", "latent"])
    parser.add_argument("--train", help="training text; the shipped one by default")
    parser.add_argument("--other", help="a text of another kind, judged before and after")
    parser.add_argument("--tokens", type=int, default=65_536, help="to judge on")
    parser.add_argument("--pieces", type=int, default=60, help="of 100,000 characters of the text")
    parser.add_argument("--windows", type=int, default=3200, help="of 256 tokens, end to end")
    parser.add_argument("--block-windows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100, help="of each phase of a block")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--json")
    args = parser.parse_args()

    dense = novels.model()
    tokenizer = novels.tokenizer()
    judges = {"novels": novels.validation(args.tokens)}
    if args.other:
        judges["other"] = hf.tokenize_file(tokenizer, args.other, tokens=args.tokens)
    file = args.train or novels.DATA / "novels_train.txt.xz"
    pieces = windows(hf.tokenize_file(tokenizer, file, pieces=args.pieces), novels.CONTEXT)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(1))
    pieces = pieces[order]
    block_data = pieces[: args.block_windows]
    data = pieces.repeat(-(-args.windows // len(pieces)), 1)[: args.windows]
    print(f"{len(pieces):,} windows of training text", flush=True)

    floor = {name: rs.perplexity(dense, ids) for name, ids in judges.items()}
    packed = copy.deepcopy(dense)
    start = time.perf_counter()
    rate = rs.compress(packed, 2, novels.calibration(), progress=False).bits_per_weight
    results = {"dense": floor, "bits_per_weight": rate, "rows": []}
    first: dict[str, float] = {}

    def report(name: str, model, seconds: float, **more) -> None:
        row = {"stage": name, "seconds": seconds, **more}
        for judge, ids in judges.items():
            found = rs.evaluate(model, ids, reference=dense, progress=False)
            first.setdefault(judge, found.perplexity)
            gap = math.log(found.perplexity / floor[judge])
            closed = 1 - gap / math.log(first[judge] / floor[judge])
            row[judge] = {"perplexity": found.perplexity, "kl": found.kl, "closed": closed}
        row["resident_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results["rows"].append(row)
        words = ", ".join(
            f"{j} {row[j]['perplexity']:.3f} (KL {row[j]['kl']:.5f}, {row[j]['closed']:.1%})"
            for j in judges
        )
        print(f"{name:24} {seconds:6.0f} s  {words}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))

    report("one-shot", packed, time.perf_counter() - start)
    for stage in args.stages:
        model, begin = copy.deepcopy(packed), time.perf_counter()
        if stage == "latent":
            train_latent(model, dense, data, args)
        else:
            if stage != "tables":
                found = reconstruct(
                    model, dense, block_data, codes=stage == "codes", steps=args.steps
                )
                blocks = found.to_json()["blocks"]
                report(f"{stage}, blocks", model, time.perf_counter() - begin, blocks=blocks)
            end_to_end(model, dense, data, args.lr)
        report(f"{stage}, end to end", model, time.perf_counter() - begin)


def end_to_end(model, dense, data, lr) -> None:
    with training_precision("auto", torch.device("cpu"))():
        rs.finetune(model, data, teacher=dense, lr=lr)


def train_latent(model, dense, data, args) -> None:
    """Float master weights from the dense model's, straight through the trellis."""
    for name, layer in model.named_modules():
        if isinstance(layer, rs.nn.RBELinear):
            parent, _, leaf = name.rpartition(".")
            weight = copy.deepcopy(dense.get_submodule(name))
            setattr(model.get_submodule(parent), leaf, weight)
    keep = [n for n, m in model.named_modules() if n.endswith("lm_head")]
    latent(model, "trellis(bits=2)", requantize_every=50, hessian=True, skip=keep)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p], "lr": 1e-3 * p.detach().square().mean().sqrt().item()} for p in params
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    steps = data.split(8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: cosine(i, len(steps), 0.05))
    model.train()
    for tokens in steps:
        with training_precision("auto", torch.device("cpu"))():
            log_p = model(tokens).logits[:, :-1].float().log_softmax(-1)
            with torch.no_grad():
                log_q = dense(tokens).logits[:, :-1].float().log_softmax(-1)
        loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        schedule.step()
    finalize(model)
    model.eval()


if __name__ == "__main__":
    main()
