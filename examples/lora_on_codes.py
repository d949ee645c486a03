"""Compress the language model to 2 bits and train low-rank adapters beside the frozen codes."""

import argparse
import copy
import tempfile
from pathlib import Path

import novels
import torch

import reality_stone as rs
from reality_stone import metrics, training
from reality_stone.nn import lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=32, help="windows of 256 tokens")
    parser.add_argument("--training", type=int, default=128, help="windows of 256 tokens")
    parser.add_argument("--judging", type=int, default=16_384, help="tokens of the validation text")
    args = parser.parse_args()

    dense = novels.model()
    valid = novels.validation(args.judging)
    print(f"dense: perplexity {rs.perplexity(dense, valid):.3f}")

    model = copy.deepcopy(dense)
    rs.compress(model, args.bits, novels.calibration(args.calibration))
    bits, weights = metrics.stored(model)
    before = rs.evaluate(model, valid, reference=dense)
    print(f"{bits / weights:.3f} b/w: perplexity {before.perplexity:.3f}, KL {before.kl:.5f}")
    codes = {name: b.clone() for name, b in model.named_buffers()}

    # Each adapter starts at the part of its rank of what the codes left of the dense weight.
    lora.add_lora(model, args.rank, init="error", weights=dense)
    started = rs.evaluate(model, valid, reference=dense)
    print(f"with adapters: perplexity {started.perplexity:.3f}, KL {started.kl:.5f}")

    report = training.finetune_lora(model, novels.training(args.training), teacher=dense)
    after = rs.evaluate(model, valid, reference=dense)
    total = (bits + lora.lora_bits(model)) / weights
    print(
        f"after {len(report.losses)} steps on {report.trained:,} numbers of rank {args.rank} in "
        f"{report.seconds:.0f} s, {total:.3f} b/w with the adapters: "
        f"perplexity {after.perplexity:.3f}, KL {after.kl:.5f}"
    )
    assert all(torch.equal(b, codes[n]) for n, b in model.named_buffers()), "the codes stay"

    with tempfile.TemporaryDirectory() as scratch:
        file = lora.save_adapter(model, Path(scratch) / "adapter.safetensors")
        tokens = valid[:256][None]
        want = model(tokens).logits
        lora.remove_lora(model)
        lora.load_adapter(model, file)
        print(f"the adapters in a file: {file.stat().st_size:,} bytes, ", end="")
        print(f"read back to the same logits: {torch.equal(model(tokens).logits, want)}")


if __name__ == "__main__":
    main()
