"""Time and memory of one optimiser step of the shipped model: dense float32 beside packed layers.

    python benchmarks/step.py [--batch 8] [--context 256] [--steps 12]

Every setting runs in a process of its own: seconds are the median step (forward, backward, Adam) on
next-token cross entropy, megabytes the process's peak resident memory over that before the model
was loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import novels

import reality_stone as rs
from reality_stone.nn.lora import add_lora, lora_parameters
from reality_stone.training import table_parameters

SETTINGS = ["dense", "trellis(bits=2)", "trellis(bits=4)", "uniform(bits=4)", "cyclic", "lora"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--settings", nargs="*", default=SETTINGS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    first = None
    for setting in args.settings:
        numbers = ["--batch", args.batch, "--context", args.context, "--steps", args.steps]
        command = [sys.executable, __file__, "--one", setting, *map(str, numbers)]
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        first = first or found
        print(
            f"{setting:18} {found['seconds']:.3f} s ({found['seconds'] / first['seconds']:.2f} x), "
            f"{found['megabytes']:5.0f} MB, {found['trained']:,} trained",
            flush=True,
        )


def measure(setting: str, args: argparse.Namespace) -> dict:
    generator = torch.Generator().manual_seed(0)
    size = (args.batch, args.context)
    start = peak()
    if setting == "dense":
        model = novels.model()
        params = list(model.parameters())
    else:
        model = packed("trellis(bits=2)" if setting == "lora" else setting)
        if setting == "lora":
            add_lora(model, rank=8)
        params = lora_parameters(model) if setting == "lora" else table_parameters(model)
    own = {id(p) for p in params}
    for p in model.parameters():
        p.requires_grad_(id(p) in own)
    optimiser = torch.optim.Adam(params, lr=1e-6)
    times = []
    for _ in range(args.steps):
        tokens = torch.randint(4096, size, generator=generator)
        begin = time.perf_counter()
        log_p = model(tokens).logits[:, :-1].log_softmax(-1)
        (-log_p.gather(-1, tokens[:, 1:, None]).mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(times[2:]),
        "megabytes": peak() - start,
        "trained": sum(p.numel() for p in params),
    }


def packed(codec: str):
    """The model with fresh codes of this codec, loaded from a file: no dense layers in memory."""
    file = Path(f"out/step_{codec}")
    if not file.exists():
        code = (
            "import sys; sys.path.insert(0, 'examples'); import novels; import reality_stone as rs;"
            f"m = novels.model(); rs.compress(m, codec={codec!r} if '(' in {codec!r} else "
            f"rs.codec({codec!r}), progress=False);"
            f"rs.save(m, {str(file)!r}, source=novels.MODEL)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
    return rs.from_pretrained(file)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
