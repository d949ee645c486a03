"""Swap the nn.Linear layers of a small network for RBELinear and train their tables."""

import argparse

import torch
from torch import nn

import reality_stone as rs


def task(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the plane and which of two interleaved spirals they are on."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (count,), generator=generator)
    angle = 9 * torch.rand(count, generator=generator).sqrt() + 0.5
    turned = angle + torch.pi * label
    points = torch.stack((turned.cos(), turned.sin()), 1) * angle[:, None] / 9
    return points + 0.02 * torch.randn(count, 2, generator=generator), label


def train(net: nn.Module, parameters, steps: int, lr: float) -> None:
    x, y = task(4096, seed=1)
    optimiser = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    x, y = task(4096, seed=2)
    return (net(x).argmax(-1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 2)
    )
    train(net, net.parameters(), steps, lr=3e-3)
    print(f"dense: accuracy {accuracy(net):.4f}")

    net[2] = rs.nn.RBELinear.from_linear(net[2], "trellis", bits=2)
    print(f"one layer at {net[2].bits_per_weight:.3f} b/w: accuracy {accuracy(net):.4f}")
    codes = net[2].codes.clone()
    train(net, net[2].parameters(), steps // 2, lr=3e-3)
    print(f"its tables trained: accuracy {accuracy(net):.4f}")
    assert torch.equal(codes, net[2].codes), "table training leaves the codes alone"
    print(net)


if __name__ == "__main__":
    main()
