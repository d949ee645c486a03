"""Tokens per second of a 1-billion-parameter Llama at batch 1, dense and packed.

    python benchmarks/generate.py [--device cuda --graph] [--json FILE] [--plot FILE.png]
    python benchmarks/generate.py --profile "trellis(bits=2)"     # where one token's time goes

Llama-3.2-1B's shapes with random weights, or random codes in the same layout as real ones. A turn
of a model reads the prompt and then writes greedily with a KV cache; models take turns, A B A B.
Packed models have packed linear layers in the blocks; embedding and head share one table of the
codec --table ("dense": in the activations' dtype). Activations and norms of packed models are
float32 on the CPU and bfloat16 on a GPU. Bytes of a token are those of all weights it multiplies
by; the share of bandwidth is of what a copy of a large tensor reaches (bytes read and written).
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import llama
import torch
from torch import Tensor, nn
from transformers import StaticCache

from reality_stone.nn import Compressed

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = ("float32", "bfloat16", "trellis(bits=2)", "trellis(bits=4)", "uniform(bits=4)")


class Writer:
    """Greedy text of one model at batch 1, in a cache of fixed size."""

    def __init__(self, model: nn.Module, prompt: Tensor, tokens: int):
        self.model, self.prompt, self.tokens = model, prompt, tokens
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens)
        self.token = prompt[:, -1:].clone()
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def read(self, prompt: Tensor) -> None:
        logits = self.model(
            prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def start(self) -> None:
        self.cache.reset()
        self.read(self.prompt)

    def step(self) -> None:
        if self.graph is None:
            self.read(self.token)
        else:
            self.graph.replay()

    def capture(self) -> None:
        """Keep one step as a CUDA graph, which takes the Python out of every later one."""
        self.start()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.read(self.token)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.read(self.token)
        self.graph = graph

    def turn(self) -> tuple[float, float]:
        """Seconds for the prompt, and for each token after it."""
        device = self.prompt.device
        llama.synchronize(device)
        begin = time.perf_counter()
        self.start()
        llama.synchronize(device)
        middle = time.perf_counter()
        for _ in range(self.tokens):
            self.step()
        llama.synchronize(device)
        return middle - begin, (time.perf_counter() - middle) / self.tokens


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device, size = llama.device_of(args.device), llama.SIZES[args.size].with_layers(args.layers)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(size.vocabulary, (1, args.prompt), generator=generator).to(device)
    writers, rows = {}, {}
    for case in args.cases:
        before = llama.held(device)
        model = make(case, args, size, device)
        writers[case] = Writer(model, prompt, args.tokens)
        writers[case].turn()  # the first touches every page
        if args.graph:
            writers[case].capture()
        gc.collect()
        rows[case] = describe(model) | {"resident_bytes": llama.held(device) - before}
    times, copies = {case: [] for case in writers}, []
    copy = copier(args.copy_mb << 20, device)
    for _ in range(args.turns):
        for case, writer in writers.items():
            times[case].append(writer.turn())
        copies.append(copy())
    bandwidth = llama.middle(copies)[0]
    results = llama.machine(device) | {
        "size": args.size, "layers": size.layers, "prompt": args.prompt, "tokens": args.tokens,
        "turns": args.turns, "table": args.table, "graph": args.graph,
        "copy_bytes_per_second": bandwidth, "cases": [],
    }  # fmt: skip
    for case, row in rows.items():
        prompts, tokens = zip(*times[case], strict=True)
        seconds, spread = llama.middle(tokens)
        results["cases"].append(
            {"case": case, **row, "prompt_seconds": llama.middle(prompts)[0],
             "token_seconds": seconds, "spread": spread, "tokens_per_second": 1 / seconds,
             "bandwidth_share": row["token_bytes"] / seconds / bandwidth}
        )  # fmt: skip
    results["profiles"] = {
        case: profile(writers[case]) for case in args.profile if device.type == "cpu"
    }
    return results


def make(case: str, args: argparse.Namespace, size: llama.Size, device: torch.device) -> nn.Module:
    if case in DENSE:
        return llama.build(size, DENSE[case], device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return llama.build(size, dtype, device, case, None if args.table == "dense" else args.table)


def describe(model: nn.Module) -> dict[str, Any]:
    """Sizes in memory. The table is read by the head, so a token reads every weight once."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, Compressed))]
    read = {id(t): t for m in layers for t in (*m.parameters(), *m.buffers())}
    weights = sum(m.out_features * m.in_features for m in llama.linears(model).values())
    blocks = sum(
        t.nbytes for m in llama.linears(model).values() for t in (*m.parameters(), *m.buffers())
    )
    return {
        "weights": weights + model.config.vocab_size * model.config.hidden_size,
        "bits_per_block_weight": 8 * blocks / weights,
        "tensor_bytes": llama.tensor_bytes(model),
        "token_bytes": sum(t.nbytes for t in read.values()),
    }


def copier(size: int, device: torch.device):
    """A function that copies a tensor of `size` bytes and gives the bytes moved per second."""
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)

    def copy() -> float:
        llama.synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        llama.synchronize(device)
        return 2 * source.nbytes / (time.perf_counter() - begin)

    return copy


def profile(writer: Writer) -> dict[str, float]:
    """Milliseconds of a token by what they are spent on; the profiler itself adds to all of them.

    Layers are timed from outside their Module call, ops from the dispatcher on.
    """
    named = {
        "head": [writer.model.lm_head],
        "linear": list(llama.linears(writer.model).values()),
        "embedding": [writer.model.model.embed_tokens],
        "norm": [m for m in writer.model.modules() if type(m).__name__.endswith("RMSNorm")],
    }
    spans: list[Any] = []
    hooks = []
    for name, modules in named.items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: spans.append(
                torch.profiler.record_function(f"part:{name}").__enter__())))  # fmt: skip
            hooks.append(
                module.register_forward_hook(lambda *_: spans.pop().__exit__(None, None, None))
            )
    writer.start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        begin = time.perf_counter()
        for _ in range(writer.tokens):
            writer.step()
        total = time.perf_counter() - begin
    for hook in hooks:
        hook.remove()
    found = {f"{name} layers": 0.0 for name in named} | {
        "linear ops": 0.0, "attention op": 0.0, "other ops": 0.0
    }  # fmt: skip
    for event in seen.events():
        name, milliseconds = event.name, event.cpu_time_total / 1e3 / writer.tokens
        parent = event.cpu_parent
        if name.startswith("part:"):
            found[f"{name[5:]} layers"] += milliseconds
        elif parent is not None and parent.name == "part:linear" and name.endswith("::linear"):
            found["linear ops"] += milliseconds
        elif parent is None and name == "aten::scaled_dot_product_attention":
            found["attention op"] += milliseconds
        elif parent is None:
            found["other ops"] += milliseconds
    whole = 1e3 * total / writer.tokens
    parts = sum(v for k, v in found.items() if k != "linear ops")
    return {"token": whole, **found, "python between": whole - parts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=llama.SIZES, default="1b")
    parser.add_argument("--layers", type=int, help="blocks; those of the size by default")
    parser.add_argument("--cases", nargs="*", default=CASES, help="dtypes and codecs")
    parser.add_argument("--table", default="uniform(bits=4)", help="codec of embedding and head")
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=16, help="written in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--copy-mb", type=int, default=512, help="size of the tensor copied")
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph per token")
    parser.add_argument("--profile", nargs="*", default=[], metavar="CASE", help="CPU only")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    args = parser.parse_args(argv)
    results = measure(args)
    cases, copy = results["cases"], results["copy_bytes_per_second"]
    print(
        f"{args.size}, {results['layers']} blocks, {results['gpu'] or results['isa']}, "
        f"{results['threads']} threads, table {args.table}; copy {copy / 1e9:.1f} GB/s"
    )
    for row in cases:
        print(
            f"{row['case']:18} {row['tokens_per_second']:8.2f} tokens/s (+-{row['spread']:.0%}, "
            f"{cases[0]['token_seconds'] / row['token_seconds']:.2f} x), "
            f"prompt {row['prompt_seconds']:.2f} s, {row['bits_per_block_weight']:.2f} b/w, "
            f"resident {row['resident_bytes'] / 1e6:.0f} MB, "
            f"{row['token_bytes'] / 1e6:.0f} MB/token, {row['bandwidth_share']:.0%} of bandwidth"
        )
    for case, parts in results["profiles"].items():
        print(f"\none token of {case}, ms:")
        for name, milliseconds in parts.items():
            print(f"  {name:18} {milliseconds:8.2f}  {milliseconds / parts['token']:.1%}")
    llama.write_json(args.json, results)
    llama.bars(
        args.plot,
        f"{args.size}, batch 1, {results['gpu'] or results['isa']}, {results['threads']} threads",
        [(row["case"], row["tokens_per_second"]) for row in cases],
        "tokens per second",
        [copy / row["token_bytes"] for row in cases],
        "weights read at the speed of a copy",
    )


if __name__ == "__main__":
    main()
