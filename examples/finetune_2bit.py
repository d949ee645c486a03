"""Compress the language model to 2 bits and train it: tables, blocks, codes, adapters."""

import argparse
import copy

import novels

import reality_stone as rs

STAGES = {
    "tables": {"mode": "tables"},
    "blocks, then tables": {"mode": "tables", "blockwise": True},
    "codes, then tables": {"mode": "codes"},
    "adapters of rank 8": {"mode": "lora", "rank": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--calibration", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--training", type=int, default=128, help="windows of 256 tokens")
    parser.add_argument("--judging", type=int, default=16_384, help="tokens of the validation text")
    parser.add_argument("--block-steps", type=int, help="default: an eighth of --training")
    args = parser.parse_args()

    dense = novels.model()
    valid = novels.validation(args.judging)
    print(f"dense: perplexity {rs.perplexity(dense, valid):.3f}")

    packed = copy.deepcopy(dense)
    rate = rs.compress(packed, args.bits, novels.calibration(args.calibration)).bits_per_weight
    judge(f"one shot, {rate:.3f} b/w", packed, valid, dense)

    # Each starts from the one-shot model, so that they can be compared.
    batches = novels.training(args.training)
    for name, options in STAGES.items():
        model = copy.deepcopy(packed)
        done = rs.finetune(
            model, batches, teacher=dense, precision="auto",
            block_steps=args.block_steps or max(1, args.training // 8), **options,
        )  # fmt: skip
        judge(f"{name}, {len(done.losses)} steps, {done.seconds:.0f} s", model, valid, dense)


def judge(name, model, valid, dense) -> None:
    found = rs.evaluate(model, valid, reference=dense)
    print(f"{name}: perplexity {found.perplexity:.3f}, KL {found.kl:.5f}", flush=True)


if __name__ == "__main__":
    main()
