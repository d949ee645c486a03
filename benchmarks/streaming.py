"""Memory and time of compressing a checkpoint that is larger than the memory it may take.

    python benchmarks/streaming.py DIRECTORY [--gb 4] [--codec uniform] [--bits 4] [--processes 1]

Writes a checkpoint of random bfloat16 weights in two shards (a Llama of 8 layers of the 8B's shape
at 4 GB) below DIRECTORY, compresses it and decompresses it in processes of their own, prints the
largest resident set of each as the kernel counted it (VmHWM), and removes all of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from reality_stone import shards, tensorfile
from reality_stone.tensorfile import Lazy

WIDTH, HIDDEN, KEYS, WORDS = 4096, 14336, 1024, 32000
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN), "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}  # fmt: skip
PROGRAM = """
import sys
from reality_stone.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read().split("\\n")
print(*[line for line in status if line.startswith(("VmHWM", "RssAnon"))], file=sys.stderr)
sys.exit(code)
"""


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    found = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}


def random_chunks(shape: tuple[int, ...], seed: int) -> Iterator[memoryview]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.Size(shape).numel()
    while left:
        count = min(left, 1 << 22)
        yield tensorfile.as_bytes(torch.randn(count, generator=generator).mul_(0.02).bfloat16())
        left -= count


def write_checkpoint(directory: Path, gigabytes: float) -> int:
    """Write it in two shards; the bytes of all tensors."""
    ends = 2 * 2 * WORDS * WIDTH
    layers = max(1, round((gigabytes * 1e9 - ends) / (2 * sum(map(product, LAYER.values())))))
    shapes = tensors(layers)
    total = 2 * sum(map(product, shapes.values()))
    directory.mkdir(parents=True)
    files: dict[str, dict[str, Lazy]] = {shards.shard_name(k, 2): {} for k in range(2)}
    names: dict[str, str] = {}
    written = 0
    for seed, (name, shape) in enumerate(shapes.items()):
        file = shards.shard_name(int(2 * written >= total), 2)
        files[file][name] = Lazy(
            torch.bfloat16, shape, lambda shape=shape, seed=seed: random_chunks(shape, seed)
        )
        names[name] = file
        written += 2 * product(shape)
    for file, own in files.items():
        tensorfile.write(directory / file, own, {})
    (directory / shards.INDEX).write_text(shards.index_text(names, total))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
        "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": WORDS,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return total


def product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def measure(what: str, *arguments: str, processes: int = 1) -> None:
    team = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--no-python"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *(team if processes > 1 else []), *([sys.executable] * (processes > 1)),
         "-c", PROGRAM, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    memory = [line for line in done.stderr.splitlines() if "VmHWM" in line]
    print(f"{what}: {seconds:.0f} s, {'; '.join(memory)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--codec", default="uniform")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--no-decompress", action="store_true")
    args = parser.parse_args()
    place = args.directory / "streaming"
    try:
        start = time.perf_counter()
        total = write_checkpoint(place / "dense", args.gb)
        print(f"dense: {total / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        measure(
            f"compress with {args.codec} at {args.bits} bits", "compress", str(place / "dense"),
            str(place / "packed"), "--codec", args.codec, "--bits", args.bits,
            processes=args.processes,
        )  # fmt: skip
        print(f"packed: {size(place / 'packed') / 1e9:.2f} GB", flush=True)
        if not args.no_decompress:
            measure("decompress", "decompress", str(place / "packed"), str(place / "back"))
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
