"""Time and memory of a training step of a Llama: 2-bit codes beside bfloat16 and LoRA on NF4.

    python benchmarks/training_step.py [--device cuda] [--layers 16] [--json FILE] [--plot FILE.png]

Llama-3.2-1B's shapes (4 of its 16 blocks by default), random weights, next-token cross entropy of
random tokens, AdamW; activations, embedding and head are bfloat16 in every case. Each case runs in
a process of its own; seconds are the median step after the first. Memory is the largest resident
set over that before the model was built, or on a GPU the most that torch had allocated.

    bfloat16              every weight is trained
    bfloat16 lora         LoRA (peft) on frozen bfloat16 layers
    nf4 lora              the same on layers of bitsandbytes' NF4, as in QLoRA
    CODEC tables          tables and scales of packed layers are trained, codes stay
    CODEC lora            this package's LoRA beside packed layers

In all but the first, embedding, head and norms are frozen. A case whose libraries are missing, or
that fails, says so in its row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llama
import torch
from torch import nn

from reality_stone.nn.lora import add_lora, lora_parameters
from reality_stone.training import table_parameters

CASES = (
    "bfloat16", "bfloat16 lora", "nf4 lora", "trellis(bits=2) tables", "trellis(bits=2) lora",
)  # fmt: skip


def build(case: str, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model of a case; what it trains, and nothing else, requires a gradient."""
    size = llama.SIZES[args.size].with_layers(args.layers)
    what, _, how = case.rpartition(" ")
    dense = case == "bfloat16" or what in ("bfloat16", "nf4")
    model = llama.build(size, torch.bfloat16, device, None if dense else what)
    model.config.use_cache = False
    if case == "bfloat16":
        return model.train()
    model.requires_grad_(False)
    if what == "nf4":
        to_nf4(model)
    if dense:
        model = peft_lora(model, args.rank)
    elif how == "lora":
        add_lora(model, rank=args.rank)
        trained = lora_parameters(model)
    elif how == "tables":
        trained = table_parameters(model)
    else:
        raise SystemExit(f"case {case!r} must be 'bfloat16', or end in lora or tables")
    if not dense:
        for p in trained:
            p.requires_grad_(True)
    return model.train()


def libraries(case: str) -> tuple[str, ...]:
    peft = ("peft",) if case in ("bfloat16 lora", "nf4 lora") else ()
    return (*peft, "bitsandbytes") if case.startswith("nf4") else peft


def to_nf4(model: nn.Module) -> None:
    """Give the layers of the blocks bitsandbytes' 4-bit weights (NF4, blocks of 64)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in llama.linears(model).items():
        made = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        llama.put(model, name, made.to(layer.weight.device))


def peft_lora(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = sorted({name.rpartition(".")[2] for name in llama.linears(model)})
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    device = llama.device_of(args.device)
    torch.manual_seed(0)
    for name in libraries(case):  # before memory is counted, and at once where one is missing
        importlib.import_module(name)
    start = llama.held(device, most=True)
    model = build(case, args, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-6)
    generator = torch.Generator().manual_seed(0)
    vocabulary = llama.SIZES[args.size].vocabulary
    seconds, losses = [], []
    for _ in range(args.steps + 1):
        tokens = torch.randint(vocabulary, (args.batch, args.context), generator=generator)
        tokens = tokens.to(device)
        llama.synchronize(device)
        begin = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        llama.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    median, spread = llama.middle(seconds[1:])
    return {
        "case": case, "error": None, "seconds": median, "spread": spread, "losses": losses,
        "tokens_per_second": args.batch * args.context / median,
        "peak_bytes": llama.held(device, most=True) - start, "model_bytes": model_bytes(model),
        "trained": sum(p.numel() for p in trained),
    }  # fmt: skip


def model_bytes(model: nn.Module) -> int:
    """Bytes of the model's tensors, with the scales that NF4 keeps beside its parameters."""
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    return llama.tensor_bytes(model) + sum(s.absmax.nbytes for s in states if s is not None)


def in_process(case: str, argv: list[str]) -> dict[str, Any]:
    """The row of a case, measured in a process of its own."""
    command = [sys.executable, str(Path(__file__)), *argv, "--one", case]
    return row_of(case, subprocess.run(command, capture_output=True, text=True))


def row_of(case: str, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the process printed last, or `error`: the signal that ended it or its last words."""
    if done.returncode < 0:
        return {"case": case, "error": f"ended by signal {-done.returncode}"}
    if done.returncode:
        return {"case": case, "error": (done.stderr.strip() or "no message").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def line(row: dict[str, Any], first: dict[str, Any]) -> str:
    if row["error"]:
        return f"{row['case']:24} not measured: {row['error']}"
    ratio = "" if first["error"] else f", {row['seconds'] / first['seconds']:.2f} x"
    return (
        f"{row['case']:24} {row['seconds']:7.3f} s (+-{row['spread']:.0%}{ratio}), "
        f"{row['tokens_per_second']:7.0f} tokens/s, peak {row['peak_bytes'] / 1e6:6.0f} MB, "
        f"model {row['model_bytes'] / 1e6:6.0f} MB, {row['trained']:,} trained"
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=llama.SIZES, default="1b")
    parser.add_argument("--layers", type=int, default=4, help="blocks")
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="timed, after one more")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    device = llama.device_of(args.device)
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        rows.append(in_process(case, argv))
        print(line(rows[-1], rows[0]), flush=True)
    results = llama.machine(device) | {
        "size": args.size, "layers": args.layers, "batch": args.batch, "context": args.context,
        "steps": args.steps, "rank": args.rank, "cases": rows,
    }  # fmt: skip
    llama.write_json(args.json, results)
    measured = [row for row in rows if not row["error"]]
    title = f"{args.size}, {args.layers} blocks, {args.batch} x {args.context} tokens a step"
    if measured:
        llama.bars(
            args.plot, title,
            [(f"{r['case']} ({r['peak_bytes'] / 1e9:.2f} GB)", r["seconds"]) for r in measured],
            "seconds a step",
        )  # fmt: skip


if __name__ == "__main__":
    main()
