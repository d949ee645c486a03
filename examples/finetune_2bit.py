"""Compress the language model to 2 bits and train its tables towards the dense model."""

import argparse
import copy

import novels

import reality_stone as rs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=2)
    parser.add_argument("--calibration", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--training", type=int, default=256, help="windows of 256 tokens")
    parser.add_argument("--judging", type=int, default=16_384, help="tokens of the validation text")
    args = parser.parse_args()

    dense = novels.model()
    valid = novels.validation(args.judging)
    print(f"dense: perplexity {rs.perplexity(dense, valid):.3f}")

    model = copy.deepcopy(dense)
    rate = rs.compress(model, args.bits, novels.calibration(args.calibration)).bits_per_weight
    before = rs.evaluate(model, valid, reference=dense)
    print(f"{rate:.3f} b/w: perplexity {before.perplexity:.3f}, KL {before.kl:.5f}")

    training = rs.finetune(model, novels.training(args.training), teacher=dense)
    after = rs.evaluate(model, valid, reference=dense)
    print(
        f"after {len(training.losses)} steps in {training.seconds:.0f} s: "
        f"perplexity {after.perplexity:.3f}, KL {after.kl:.5f}"
    )


if __name__ == "__main__":
    main()
