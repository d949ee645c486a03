"""Llama-shaped models of random weights, dense and packed, in seconds, for the programs here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from reality_stone import codec as make_codec
from reality_stone import ops
from reality_stone.bench import random_packed
from reality_stone.nn import RBEEmbedding, RBELinear


@dataclass(frozen=True)
class Size:
    """The shape of a Llama whose head is tied to its embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    def with_layers(self, layers: int | None) -> Size:
        return self if layers is None else replace(self, layers=layers)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )


SIZES = {
    "1b": Size(2048, 16, 32, 8, 8192, 128256),  # Llama-3.2-1B
    "tiny": Size(64, 2, 4, 2, 128, 256),
}


def build(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    codec: str | None = None,
    table: str | None = None,
) -> LlamaForCausalLM:
    """A model in `dtype`; with `codec` the linear layers of its blocks are packed, with `table` its
    embedding and head, which share it. Layers of equal shape hold equal codes, each its own."""
    config = size.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).eval()
    if codec is not None:
        made = {}
        for name, layer in linears(model).items():
            shape = (layer.out_features, layer.in_features)
            if shape not in made:
                made[shape] = random_packed(make_codec(codec), shape).to(device)
            put(model, name, RBELinear.in_place_of(layer, made[shape]))
    if table is not None:
        shape = (size.vocabulary, size.hidden)
        packed = random_packed(make_codec(table), shape).to(device)
        model.model.embed_tokens = RBEEmbedding.in_place_of(model.model.embed_tokens, packed)
        model.lm_head = model.model.embed_tokens.head()
    else:
        model.tie_weights()
    _fill(model, device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model


def _fill(model: nn.Module, device: torch.device) -> None:
    """Random values for what has none yet: matrices keep the size of what they multiply."""
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.is_meta:
                continue
            if id(p) not in filled:
                value = torch.ones(p.shape, dtype=p.dtype, device=device)
                if p.dim() > 1:
                    value.uniform_(-1, 1).mul_(math.sqrt(3 / p.shape[1]))
                filled[id(p)] = nn.Parameter(value)
            setattr(module, name, filled[id(p)])


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks, dense or packed, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, RBELinear)) and not name.endswith("lm_head")
    }


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


def held(device: torch.device, most: bool = False) -> int:
    """Bytes in memory now, or the most so far: of the process, or of torch's tensors on a GPU."""
    if device.type == "cuda":
        ask = torch.cuda.max_memory_allocated if most else torch.cuda.memory_allocated
        return ask(device)
    field = "VmHWM:" if most else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def device_of(word: str) -> torch.device:
    """The device; SystemExit with one sentence where it is not there."""
    device = torch.device(word)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {word}: this torch ({torch.__version__}) sees no CUDA GPU")
    return device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Median, and half of the middle 80 % as a share of it."""
    ordered = sorted(values)
    cut, median = len(ordered) // 10, statistics.median(ordered)
    return median, (ordered[-1 - cut] - ordered[cut]) / 2 / median


def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement has to say of where it was made."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type, "gpu": gpu, "threads": torch.get_num_threads(), "isa": ops.isa(),
        "torch": torch.__version__,
    }  # fmt: skip


def write_json(path: str | None, results: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(results, indent=1) + "\n")


def bars(path: str | None, title: str, rows: Sequence[tuple[str, float]], axis: str,
         marks: Sequence[float] = (), mark: str = "") -> None:  # fmt: skip
    """Horizontal bars from the top down; a mark on each where `marks` are given."""
    if not path:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    names, values = zip(*rows, strict=True)
    drawn = axes.barh(range(len(rows)), values, color="tab:blue")
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    if marks:
        axes.plot(marks, range(len(rows)), "|", color="black", markersize=16, label=mark)
        axes.legend()
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)
