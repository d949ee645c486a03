"""A Llama from this package's layers: the shipped weights, compressed, read text and write some."""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

import reality_stone as rs
from reality_stone import hf
from reality_stone.nn import RBEFFN, RBEAttention, RBEEmbedding, RBERMSNorm

DATA = Path(__file__).parent / "data"
CONFIG = json.loads((DATA / "novels_lm/config.json").read_text())
HEADS, BASE = CONFIG["num_attention_heads"], CONFIG["rope_parameters"]["rope_theta"]


class Block(nn.Module):
    def __init__(self, layer, at, codec):
        super().__init__()
        q, k, v, o = (layer(f"{at}.self_attn.{n}_proj") for n in "qkvo")
        up, down, gate = (layer(f"{at}.mlp.{n}_proj") for n in ("up", "down", "gate"))
        self.attention = RBEAttention.from_linears(q, k, v, o, HEADS, BASE, True, codec=codec)
        self.ffn = RBEFFN.from_linears(up, down, gate, "silu", codec)
        self.first = RBERMSNorm.from_norm(layer(f"{at}.input_layernorm"))
        self.second = RBERMSNorm.from_norm(layer(f"{at}.post_attention_layernorm"))

    def forward(self, x, cache):
        y, cache = self.attention(self.first(x), cache=cache)
        return x + y + self.ffn(self.second(x + y)), cache


class Llama(nn.Module):
    def __init__(self, codec, table="uniform(bits=8)"):
        super().__init__()
        weights = {n: w.float() for n, w in load_file(DATA / "novels_lm/model.safetensors").items()}

        def layer(name):
            weight = nn.Parameter(weights[f"{name}.weight"])
            made = nn.RMSNorm(len(weight), CONFIG["rms_norm_eps"])
            if weight.dim() == 2:
                made = nn.Linear(*weight.t().shape, bias=False, device="meta")
            made.weight = weight
            return made

        embedding = nn.Embedding.from_pretrained(weights["model.embed_tokens.weight"])
        self.embed = RBEEmbedding.from_embedding(embedding, table)
        names = [f"model.layers.{i}" for i in range(CONFIG["num_hidden_layers"])]
        self.blocks = nn.ModuleList(Block(layer, name, codec) for name in names)
        self.norm, self.head = RBERMSNorm.from_norm(layer("model.norm")), self.embed.head()

    def forward(self, ids, caches=None):
        """Logits of token ids (..., tokens); a list of caches, one a block, takes them in."""
        x = self.embed(ids)
        caches = caches or [block.attention.empty_cache(*ids.shape[:-1]) for block in self.blocks]
        for i, block in enumerate(self.blocks):
            x, caches[i] = block(x, caches[i])
        return self.head(self.norm(x))


@torch.no_grad()
def main(codec="uniform(bits=4, group=64)"):
    tokenizer = Tokenizer.from_file(str(DATA / "novels_lm/tokenizer.json"))
    valid = hf.tokenize_file(tokenizer, DATA / "novels_valid.txt.xz", tokens=2048)
    near, model = Llama("uniform(bits=8)").eval(), Llama(codec).eval()
    found, before = rs.evaluate(model, valid, reference=near), rs.perplexity(near, valid)
    print(f"perplexity at 8 bits {before:.3f}, {codec} {found.perplexity:.3f}, KL {found.kl:.4f}")
    assert found.perplexity < 1.1 * before
    caches, start = [block.attention.empty_cache() for block in model.blocks], time.perf_counter()
    ids = new = valid[:16]
    while len(ids) < 80:  # each token is read once
        ids = torch.cat((ids, new := model(new, caches)[-1:].argmax(-1)))
    print(f"{64 / (time.perf_counter() - start):.0f} tokens/s: {tokenizer.decode(ids.tolist())!r}")


if __name__ == "__main__":
    main()
