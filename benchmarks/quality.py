"""Which format keeps a language model best at how many bits?

Compresses the shipped model (or any Hugging Face directory) with each method, layer by layer in
execution order, and prints true bits per weight, perplexity, its ratio to dense and KL divergence.
Peers run beside ours where they are installed (hqq, bitsandbytes); one that is missing or fails is
printed as such. Their bits per weight count scales and zeros as they store them.

    python benchmarks/quality.py [--every] [--train TEXT] [--only trellis] [--json FILE]
    python benchmarks/quality.py --curvature [--bits 2.25] [--also TEXT]

--every judges each codec of the registry at all its rates instead of the usual choices.
--curvature judges each of ours without and with the curvature at outputs; --bits adds rates that
are planned layer by layer, --also texts to measure on beside the held-out one.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import reality_stone as rs
from reality_stone import compare, hf
from reality_stone.jobs import Calibration
from reality_stone.targets import choose

DATA = Path(__file__).parent.parent / "examples" / "data"
CONTEXT = 256
ALSO = 32_768  # tokens of a further text
OURS = [
    *(f"trellis(bits={b})" for b in (1.5, 2, 2.5, 3, 3.5, 4)),
    "residual(base=trellis(bits=2), rest=sparse(percent=1))",
    "uniform(bits=2, group=64)",
    "uniform(bits=3, group=128)",
    "uniform(bits=4, group=128)",
]
CURVED = [
    *(f"trellis(bits={b})" for b in (1.5, 2, 2.5, 3, 3.5, 4)),
    "uniform(bits=4, group=64)",
    "palette(bits=2)",
]


def hqq(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Half-quadratic quantization with float16 scales and zeros."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
    )
    return Quantizer.dequantize(codes, meta).float(), bits + 32 / group


def nf4(weight: Tensor, group: int) -> tuple[Tensor, float]:
    """bitsandbytes NF4 with float32 scales."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=group, quant_type="nf4", compress_statistics=False
    )
    return functional.dequantize_4bit(codes, state).float(), 4 + 32 / group


PEERS: dict[str, Callable[[Tensor], tuple[Tensor, float]]] = {
    "hqq 4 bits, group 64": lambda w: hqq(w, 4, 64),
    "hqq 3 bits, group 64": lambda w: hqq(w, 3, 64),
    "hqq 2 bits, group 64": lambda w: hqq(w, 2, 64),
    "bitsandbytes nf4, group 64": lambda w: nf4(w, 64),
}


@torch.no_grad()
def compress_with(model: nn.Module, method: Callable[[Tensor], tuple[Tensor, float]]) -> float:
    """Replace every weight our codecs would replace by the method's; its bits per weight."""
    bits = weights = 0.0
    for name in choose(model, 4, "uniform").codecs:
        weight = model.get_submodule(name).weight
        value, stored = method(weight.data)
        weight.copy_(value.view_as(weight))
        bits, weights = bits + stored * weight.numel(), weights + weight.numel()
    return bits / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DATA / "novels_lm"))
    parser.add_argument("--valid", default=str(DATA / "novels_valid.txt.xz"))
    parser.add_argument("--train", default=str(DATA / "novels_train.txt.xz"))
    parser.add_argument("--every", action="store_true", help="every codec at all its rates")
    parser.add_argument("--curvature", action="store_true", help="ours without and with it")
    parser.add_argument("--bits", type=float, action="append", default=[], help="planned rates")
    parser.add_argument("--also", action="append", default=[], help="further texts to measure on")
    parser.add_argument("--only", default="", help="methods whose name holds this text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer, dense = hf.load_tokenizer(args.model), hf.from_pretrained(args.model)
    valid = hf.tokenize_file(tokenizer, args.valid, tokens=65_536)
    windows = Calibration(args.train, 128, CONTEXT).windows(hf.tokenize_file(tokenizer, args.train))
    base = rs.evaluate(dense, valid, CONTEXT)
    print(f"dense perplexity {base.perplexity:.3f} over {base.tokens} tokens", flush=True)
    also = {Path(t).name: hf.tokenize_file(tokenizer, t, tokens=ALSO) for t in args.also}
    for name, tokens in also.items():
        found = rs.evaluate(dense, tokens, CONTEXT)
        print(f"dense perplexity {found.perplexity:.3f} on {name}", flush=True)
    rows = []

    def judge(name: str, compress: Callable[[nn.Module], float]) -> None:
        if args.only not in name:
            return
        model, start, cpu = copy.deepcopy(dense), time.perf_counter(), time.process_time()
        try:
            bits = compress(model)
        except Exception as error:  # a peer may fail in any way; the table says so
            print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
            return
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        found = rs.evaluate(model, valid, CONTEXT, dense)
        ratio = found.perplexity / base.perplexity
        rows.append({"method": name, "bits_per_weight": bits, "ratio": ratio, "kl": found.kl,
                     "perplexity": found.perplexity, "seconds": seconds,
                     "cpu_seconds": cpu, "also": {}})  # fmt: skip
        print(f"{name:60} {bits:6.3f} b/w  perplexity {found.perplexity:7.3f}  x {ratio:.4f}  "
              f"KL {found.kl:.5f}  {seconds:5.1f} s, {cpu:5.1f} of CPU",
              flush=True)  # fmt: skip
        for text, tokens in also.items():
            found = rs.evaluate(model, tokens, CONTEXT, dense)
            rows[-1]["also"][text] = found.to_json()
            print(f"    {text:56}             perplexity {found.perplexity:7.3f}            "
                  f"KL {found.kl:.5f}", flush=True)  # fmt: skip

    def calibrated(
        curvature: bool, bits: float = 2.5, codec: str = "trellis"
    ) -> Callable[[nn.Module], float]:
        def run(model: nn.Module) -> float:
            report = rs.compress(model, bits, windows, codec, curvature=curvature)
            return report.bits_per_weight

        return run

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps({"dense": base.to_json(), "rows": rows}, indent=1))

    if args.curvature:
        runs = {spec: {"codec": spec} for spec in CURVED}
        runs |= {f"{bits:g} bits, planned": {"bits": bits} for bits in args.bits}
        for name, options in runs.items():
            judge(name, calibrated(False, **options))
            judge(f"{name}, curvature", calibrated(True, **options))
        write()
        return
    every = [c.spec for c in compare.settings(rs.codecs())]
    for spec in every if args.every else OURS:
        judge(spec, calibrated(False, codec=spec))
    uncalibrated = ("trellis(bits=2)", "uniform(bits=3, group=128)", "uniform(bits=4, group=128)")
    for spec in () if args.every else uncalibrated:
        judge(f"{spec}, no calibration", lambda m, s=spec: rs.compress(m, codec=s).bits_per_weight)
    for name, method in () if args.every else PEERS.items():
        judge(name, lambda m, f=method: compress_with(m, f))
    write()


if __name__ == "__main__":
    main()
