"""Small models that several test files train."""

import torch
from torch import nn

import reality_stone as rs


class Bigram(nn.Module):
    """Predicts the next token from this one through a compressible layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        self.head = nn.Linear(64, 32)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def bigrams() -> tuple[Bigram, Bigram]:
    """A dense model and the same at 2 bits."""
    torch.manual_seed(0)
    dense, packed = Bigram().eval(), Bigram().eval()
    packed.load_state_dict(dense.state_dict())
    rs.compress(packed, bits=2, codec="uniform", progress=False)
    return dense, packed
