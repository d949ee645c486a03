"""Code descent on one layer of the shipped model: from codes rounded one by one to better ones."""

import argparse
from pathlib import Path

import novels
import torch
from torch import Tensor, nn

import reality_stone as rs
from reality_stone.nn import RBELinear

CODECS = ("uniform(bits=2, group=32)", "cyclic", "palette(bits=2)", "trellis(bits=2)")


def inputs(model: nn.Module, name: str, windows: int) -> Tensor:
    """What the layer sees (tokens, in) in text of the calibration set."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for tokens in novels.calibration(windows).split(8):
            model(tokens)
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def descend(dense: nn.Linear, codec: str, x: Tensor, args) -> list[float]:
    """Relative squared errors of the output on held-out tokens, before and after each trial."""
    train, judge, held = x.split([len(x) - 2 * (len(x) // 4), len(x) // 4, len(x) // 4])
    layer = RBELinear.from_linear(dense, codec).requires_grad_(False)
    power = dense(train).square().mean()

    def error(x: Tensor) -> Tensor:
        return (layer(x) - dense(x)).square().mean() / power

    errors = [error(held).item()]
    order = torch.Generator().manual_seed(0)
    with rs.optim.CodeDescent(layer, gather=1, share=args.share) as codes:
        for _ in range(args.steps):
            batch = train[torch.randint(len(train), (args.batch,), generator=order)]
            error(batch).backward()
            codes.step(lambda: error(judge))
            with torch.no_grad():
                errors.append(error(held).item())
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.02)
    args = parser.parse_args()
    model = novels.model()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    name = args.layer or linears[len(linears) // 2]
    dense = model.get_submodule(name).requires_grad_(False)
    x = inputs(model, name, args.windows)
    curves = {}
    for codec in CODECS:
        curve = curves[codec] = descend(dense, codec, x, args)
        print(f"{name} {codec:28} {curve[0]:.4f} -> {curve[-1]:.4f}")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained")
    for codec, curve in curves.items():
        axes.plot([e / curve[0] for e in curve], label=f"{codec}, from {curve[0]:.3f}")
    axes.set(xlabel="trial", ylabel="held-out error of the output over that of the first codes")
    axes.legend(loc="upper right")
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/code_descent.png")


if __name__ == "__main__":
    main()
