"""Does a plan beat the same number of bits spread without knowledge of the layers?

Compresses the shipped model (or any Hugging Face directory) at fractional rates: with the plan's
rates, and with baselines that raise layers from the rate below to the rate above, up to the same
size, in an order that knows nothing of sensitivity: every other layer first, from the front, from
the back, at random. Prints true bits per weight, perplexity and KL on held-out text.

    python benchmarks/plan.py [--bits 2,2.25,2.5,2.75,3] [--json FILE]
    python benchmarks/plan.py --sensitivity      # predicted loss beside the KL of one layer's error
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import reality_stone as rs
from reality_stone import hf
from reality_stone.allocation import LayerCurve
from reality_stone.jobs import Calibration
from reality_stone.nn import RBELinear

DATA = Path(__file__).parent.parent / "examples" / "data"
CONTEXT = 256
RANDOM = 3  # orders at random


class Remembered(nn.Module):
    """The dense model, run once for each batch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.known = model, {}

    def forward(self, tokens: Tensor) -> Tensor:
        key = tokens.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(tokens).logits
        return self.known[key]


def orders(layers: int) -> dict[str, list[int]]:
    """Ways to go through the layers that know nothing of them."""
    every = list(range(layers))
    found = {"alternating": every[::2] + every[1::2], "front": every, "back": every[::-1]}
    for seed in range(RANDOM):
        generator = torch.Generator().manual_seed(seed)
        found[f"random {seed}"] = torch.randperm(layers, generator=generator).tolist()
    return found


def blind(curves: tuple[LayerCurve, ...], bits: float, order: list[int]) -> rs.Plan:
    """The rate below for all layers, the rate above for as many as fit, in this order."""
    rates = [c.rate for c in curves[0].choices]
    low = max(i for i, rate in enumerate(rates) if rate <= bits)
    level = [low] * len(curves)
    left = sum((c.bits_at(bits) - c.choices[low].bits) * c.weights for c in curves)
    for i in order if left > 0 else ():
        step = (curves[i].choices[low + 1].bits - curves[i].choices[low].bits) * curves[i].weights
        if step <= left:
            level[i], left = low + 1, left - step
    entries = ((c.name, c.choices[k].codec) for c, k in zip(curves, level, strict=True))
    return rs.Plan(tuple(entries), bits, curves=curves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DATA / "novels_lm"))
    parser.add_argument("--valid", default=str(DATA / "novels_valid.txt.xz"))
    parser.add_argument("--train", default=str(DATA / "novels_train.txt.xz"))
    parser.add_argument("--bits", default="2.25,2.75,2.5,2,3")
    parser.add_argument("--sensitivity", action="store_true")
    parser.add_argument("--no-calibration", action="store_true")
    parser.add_argument("--json", type=Path, help="written after every row; goes on from there")
    args = parser.parse_args()
    tokenizer, dense = hf.load_tokenizer(args.model), hf.from_pretrained(args.model)
    valid = hf.tokenize_file(tokenizer, args.valid, tokens=65_536)
    windows = None
    if not args.no_calibration:
        text = hf.tokenize_file(tokenizer, args.train)
        windows = Calibration(args.train, 128, CONTEXT).windows(text)
    reference = Remembered(dense)
    done = {"rows": [], "plan": None}
    if args.json and args.json.exists():
        done = json.loads(args.json.read_text())

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(done, indent=1))

    def judge(name: str, plan: rs.Plan) -> None:
        if name in [row["method"] for row in done["rows"]]:
            return
        model, cpu = copy.deepcopy(dense), time.process_time()
        report = rs.compress(model, calibration=windows, plan=plan)
        cpu = time.process_time() - cpu
        found = rs.evaluate(model, valid, CONTEXT, reference)
        row = {"method": name, "bits": plan.bits, "predicted": plan.loss,
               "bits_per_weight": report.bits_per_weight, "perplexity": found.perplexity,
               "kl": found.kl, "cpu_seconds": cpu}  # fmt: skip
        done["rows"].append(row)
        keep()
        print(f"{name:24} {report.bits_per_weight:.4f} b/w  predicted {plan.loss:.5f}  perplexity "
              f"{found.perplexity:.3f}  KL {found.kl:.5f}  {cpu:.0f} s", flush=True)  # fmt: skip

    if done["plan"] is None:
        cpu = time.process_time()
        done["plan"] = rs.plan(dense, 2.5, windows).to_json()
        keep()
        print(f"planning took {time.process_time() - cpu:.0f} s of processor time", flush=True)
    curves = rs.Plan.from_json(done["plan"]).curves
    if args.sensitivity:
        sensitivity(dense, reference, curves, windows, valid[: 32 * CONTEXT])
        return
    targets = [float(part) for part in args.bits.split(",")]
    rates = [choice.rate for choice in curves[0].choices]
    for name, order in {"plan": None, **orders(len(curves))}.items():
        for bits in targets:
            if order is None:
                judge(f"plan {bits:g}", rs.Plan.solve(curves, bits))
            elif bits not in rates:
                judge(f"{name} {bits:g}", blind(curves, bits, order))
    for bits in targets:
        if bits in rates:
            judge(f"one rate {bits:g}", blind(curves, bits, []))


def sensitivity(
    dense: nn.Module, reference: nn.Module, curves: tuple, windows: Tensor | None, valid: Tensor
) -> None:
    """One layer at a time at 2 bits: the KL that was predicted and the KL there is."""
    whole = copy.deepcopy(dense)
    rs.compress(whole, 2, windows)
    pairs = []
    for curve in curves:
        layer, packed = dense.get_submodule(curve.name), whole.get_submodule(curve.name)
        assert isinstance(packed, RBELinear)
        model = copy.deepcopy(dense)
        model.get_submodule(curve.name).weight.data = packed.weight
        predicted = next(c.loss for c in curve.choices if c.rate == 2)
        kl = rs.evaluate(model, valid, CONTEXT, reference).kl
        pairs.append((predicted, kl))
        print(f"{curve.name:40} {layer.weight.numel():8} weights  predicted {predicted:.6f}  "
              f"KL {kl:.6f}  x {kl / predicted:.2f}", flush=True)  # fmt: skip
    logs = torch.tensor(pairs, dtype=torch.float64).log()
    ratio = logs[:, 1] - logs[:, 0]
    print(f"correlation of logarithms {torch.corrcoef(logs.t())[0, 1]:.3f}; KL over predicted "
          f"{ratio.mean().exp():.2f} times or over {ratio.std().exp():.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
