"""Compress a Hugging Face directory, load it with transformers, train it with Trainer, save, load.

As a user of transformers would: nothing but `import reality_stone` is new.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import novels
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import reality_stone as rs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=novels.MODEL, help="a dense Hugging Face directory")
    parser.add_argument("--bits", default="2", help="per weight")
    parser.add_argument("--codec", default="trellis")
    parser.add_argument("--windows", type=int, default=64, help="training text, 256 tokens each")
    parser.add_argument("--judging", type=int, default=16_384, help="tokens of the validation text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        roundtrip(args, Path(directory))


def roundtrip(args: argparse.Namespace, work: Path) -> None:
    command = [sys.executable, "-m", "reality_stone", "compress", args.model, work / "packed"]
    options = ["--bits", args.bits, "--codec", args.codec]
    subprocess.run([*map(str, command), *options], check=True)

    model = AutoModelForCausalLM.from_pretrained(work / "packed", dtype=torch.float32)
    judge("compressed", model, args.judging)

    settings = TrainingArguments(
        str(work / "run"), num_train_epochs=1, per_device_train_batch_size=8, learning_rate=2e-4,
        save_strategy="no", report_to=[], logging_steps=4,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in novels.training(args.windows)]
    trainer = Trainer(model, settings, train_dataset=data)
    trainer.train()
    model.eval()
    judge("trained", model, args.judging)

    trainer.save_model(str(work / "trained"))
    again = AutoModelForCausalLM.from_pretrained(work / "trained")
    ours = rs.from_pretrained(work / "trained")
    ids = novels.validation(args.judging)[None, :256]
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(again(ids).logits, logits)
        assert torch.equal(ours(ids).logits, logits)
    print("saved and loaded again: the same logits")


def judge(name: str, model: torch.nn.Module, tokens: int) -> None:
    print(f"{name}: perplexity {rs.perplexity(model, novels.validation(tokens)):.3f}", flush=True)


if __name__ == "__main__":
    main()
