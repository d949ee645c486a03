"""Swap the nn.Linear layers of a small network for RBELinear and train their tables."""

import argparse

import torch
from torch import nn

import reality_stone as rs


def task(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the plane and which of two interleaved spirals they are on."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (count,), generator=generator)
    angle = 12 * torch.rand(count, generator=generator).sqrt() + 0.5
    turned = angle + torch.pi * label
    points = torch.stack((turned.cos(), turned.sin()), 1) * angle[:, None] / 12
    return points + 0.02 * torch.randn(count, 2, generator=generator), label


def train(net: nn.Module, parameters, steps: int, lr: float) -> None:
    x, y = task(1024, seed=1)
    optimiser = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()


@torch.no_grad()
def judge(name: str, net: nn.Module) -> None:
    x, y = task(4096, seed=2)
    out = net(x)
    right = (out.argmax(-1) == y).float().mean()
    print(f"{name}: loss {nn.functional.cross_entropy(out, y):.4f}, accuracy {right:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # quickest for a net this small, and the same numbers every time
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
    train(net, net.parameters(), steps, lr=3e-3)
    judge("dense", net)

    layer = rs.nn.RBELinear.from_linear(net[2], "trellis", bits=2)
    net[2] = layer
    judge("the middle layer in 2-bit codes", net)
    codes = layer.codes.clone()
    train(net, layer.parameters(), steps // 2, lr=3e-3)
    judge("its tables and scales trained", net)
    assert torch.equal(codes, layer.codes), "the codes stay as they are"
    print(net)


if __name__ == "__main__":
    main()
