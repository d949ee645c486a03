"""Compressing with the curvature at the outputs of layers: gain, bounds, refusals, interrupts."""

import copy

import pytest
import torch
from torch import nn

import reality_stone as rs
from reality_stone import curvature
from reality_stone.blocks import Call, calls_from
from reality_stone.codecs import Uniform
from reality_stone.curvature import OutputSide, output_curvature, some_rows
from reality_stone.nn import RBELinear

CODEC = "uniform(bits=2, group=32)"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Next(nn.Module):
    """Logits of the next token from this one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 32)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def chain(rows: int, seed: int) -> torch.Tensor:
    """(rows, 32) tokens, each of three likely ones after the last."""
    g = torch.Generator().manual_seed(seed)
    after = torch.randint(32, (32, 3), generator=torch.Generator().manual_seed(0))
    tokens = [torch.randint(32, (rows,), generator=g)]
    for _ in range(31):
        tokens.append(after[tokens[-1], torch.randint(3, (rows,), generator=g)])
    return torch.stack(tokens, 1)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model, tokens = Next(), chain(64, 1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 1.5  # of log 3 at best: it has learned what there is to weigh
    return model.eval()


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


TOKENS = chain(64, 2)
OPTIONS = {"calibration": TOKENS, "codec": CODEC, "skip": ["head"], "progress": False}


def codes(model):
    return {n: m.codes for n, m in model.named_modules() if isinstance(m, RBELinear)}


@pytest.mark.parametrize("codec", [CODEC, "trellis(bits=2)", "residual"])
def test_curvature_brings_a_trained_model_closer_to_the_dense_one(trained, codec):
    kl = {}
    for curved in (False, True):
        model = copy.deepcopy(trained)
        report = rs.compress(model, **OPTIONS | {"codec": codec}, curvature=curved)
        assert len(report.layers) == 4
        kl[curved] = rs.kl_divergence(model, trained, chain(32, 3), context=32)
    print(codec, kl)
    assert kl[True] < 0.9 * kl[False]
