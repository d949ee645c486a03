"""Train a small network on handwritten digits with 4 and 16 levels a weight, from scratch."""

import argparse
import time

import torch
from torch import nn

from reality_stone import training
from reality_stone.nn import RBELinear
from reality_stone.quantizers import STE, Gumbel

BATCH = 50


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (n, 64) in [-1, 1] and labels: 1347 to train on, 450 to judge by."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("scikit-learn is missing: pip install scikit-learn") from None
    data = load_digits()
    x, y = torch.tensor(data.data).float() / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, judge = order[450:], order[:450]
    return x[train], y[train], x[judge], y[judge]


def accuracy(make, epochs: int, seed: int, data) -> tuple[float, float]:
    """Percent right of the finished network, and bits per weight; make(steps) gives a quantizer."""
    x, y, judge_x, judge_y = data
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    steps = epochs * (len(x) // BATCH)
    if make is not None:
        training.latent(model, quantizer=lambda name: make(steps))
    rates = ((p, 3e-4 if "quantizer" in name else 3e-3) for name, p in model.named_parameters())
    optimiser = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in rates])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    if make is not None:
        training.finalize(model)
    bits = sum(m.packed.bits for m in model if isinstance(m, RBELinear)) / (64 * 128 + 128 * 10)
    with torch.no_grad():
        return 100 * (model(judge_x).argmax(-1) == judge_y).double().mean().item(), bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    data = digits()
    rows = {
        "float": None,
        "STE, 4 levels": lambda steps: STE(4, zero=False),
        "STE, 16 levels": lambda steps: STE(16),
        "Gumbel, 4 levels": lambda steps: Gumbel.annealed(4, steps, room=2),
        "Gumbel, 16 levels": lambda steps: Gumbel.annealed(16, steps, room=2),
    }
    print(f"{'':18} {'b/w':>5} {'mean':>6}  each seed")
    for name, make in rows.items():
        start = time.perf_counter()
        found = [accuracy(make, args.epochs, seed, data) for seed in range(args.seeds)]
        right, bits = [f[0] for f in found], found[0][1] or 32
        each = " ".join(f"{r:.2f}" for r in right)
        seconds = time.perf_counter() - start
        print(f"{name:18} {bits:5.2f} {sum(right) / len(right):6.2f}  {each}  ({seconds:.1f} s)")


if __name__ == "__main__":
    main()
