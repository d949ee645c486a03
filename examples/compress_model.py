"""Compress the language model that ships with the examples, save it, load it: the same logits."""

import argparse
import tempfile
from pathlib import Path

import novels
import torch

import reality_stone as rs
from reality_stone import checkpoint, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of 256 tokens")
    parser.add_argument("--out", type=Path, help="where to save; a temporary folder if not given")
    args = parser.parse_args()

    model = novels.model()
    report = rs.compress(model, args.bits, novels.calibration(args.windows))
    report.print()

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch) / "novels_lm_packed"
        # The dense rest (the embedding, the norms) goes back to the float16 it came from.
        rs.save(model, folder, source=novels.MODEL, dense_dtype=torch.float16)
        loaded = rs.from_pretrained(folder)
        before = (novels.MODEL / checkpoint.WEIGHTS).stat().st_size
        after = (folder / checkpoint.WEIGHTS).stat().st_size
    print(f"model.safetensors: {show.size(before)} before, {show.size(after)} after")

    tokens = novels.validation(256)[None]
    with torch.no_grad():
        same = torch.equal(model(tokens).logits, loaded(tokens).logits)
    print(f"logits before saving and after loading are the same: {same}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
