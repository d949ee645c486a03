"""A GPT-2 from this package's layers, trained from nothing on the bytes of the shipped novels."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reality_stone import hf, training
from reality_stone.nn import RBEFFN, RBEAttention, RBEEmbedding, RBELayerNorm, RBELinear
from reality_stone.swap import plan_of

DATA = Path(__file__).parent / "data"
CONTEXT, DIM, HEADS, BLOCKS = 96, 128, 4, 2
CODEC = "uniform(bits=4, group=32)"
BOUND = 2.6  # nats a byte; the frequencies of the bytes alone give 3.1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([RBELayerNorm(DIM), RBELayerNorm(DIM)])
        self.attention = RBEAttention(DIM, HEADS, causal=True, codec=CODEC)
        self.ffn = RBEFFN(DIM, 4 * DIM, "gelu_tanh", codec=CODEC)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.ffn(self.norms[1](x))


class GPT2(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = RBEEmbedding(256, DIM, codec="uniform(bits=8, group=32)")
        self.places = RBEEmbedding(CONTEXT, DIM, codec="uniform(bits=8, group=32)")
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)), RBELayerNorm(DIM))
        self.head = RBELinear(DIM, 256, bias=False, codec=CODEC)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[-1]))
        return self.head(self.blocks(x))


def loss_of(model: nn.Module, text: Tensor, batch: int) -> Tensor:
    """Mean loss a byte on random pieces of a text."""
    starts = torch.randint(len(text) - CONTEXT - 1, (batch, 1))
    pieces = text[starts + torch.arange(CONTEXT + 1)]
    return cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def main(steps: int = 300) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, valid = (
        torch.tensor(list(hf.read_text(DATA / f"novels_{name}.txt.xz")[:2_000_000].encode()))
        for name in ("train", "valid")
    )
    model = training.latent(GPT2(), requantize_every=50)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(steps):
        loss = loss_of(model, train, 8)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    training.finalize(model).eval()
    with torch.no_grad():
        final = loss_of(model, valid, 64).item()
    print(f"{len(plan_of(model))} compressed layers: {final:.3f} nats a byte of the validation")
    print(f"text after {steps} steps, {time.perf_counter() - start:.0f} s")
    assert final < BOUND, f"the loss must fall below {BOUND}"


if __name__ == "__main__":
    main()
