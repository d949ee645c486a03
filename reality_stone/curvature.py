"""What an error at a layer's output costs the model: Fisher information, one moment per layer.

For loss differences near a minimum, KL(model || changed) is about half of tr F E H E^T summed over
layers, with E the error of a weight, H = E[x x^T] of its input and F = E[g g^T] of the gradients of
the log likelihood at its output, labels drawn from the model itself (K-FAC: Martens & Grosse 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Call, first_output, inference
from .nn.observe import watch

LARGEST = 4096  # outputs of a module whose moment is gathered: 64 MB


def output_curvature(
    model: nn.Module,
    calls: Sequence[Call],
    names: Sequence[str],
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """E[g g^T] (out, out) float32 at the output of each named module, in nats^2 per token.

    The model's output is next-token logits (..., vocabulary), or has them as `logits`. Modules that
    no call reaches and those with more than 4096 outputs are left out.
    """
    sums: dict[str, Tensor] = {}

    def gather(name: str, _: Tensor, grad: Tensor) -> None:
        if grad.shape[-1] <= LARGEST:
            grad = grad.float()
            moment = grad.t() @ grad
            sums[name] = sums[name].add_(moment) if name in sums else moment

    tokens = _backward(model, calls, names, gather, True, seed, progress)
    return {name: total.div_(max(1, tokens)).cpu() for name, total in sums.items()}


def output_power(
    model: nn.Module,
    calls: Sequence[Call],
    names: Sequence[str],
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """trace E[g g^T] / out at the output of each named module, of any size: what a small white
    error of unit power there costs, twice, in nats per token.

    Where the model gives neither `logits` nor, from token ids, a tensor, the cost is the squared
    error of its output relative to the output's own power. Modules no call reaches are left out.
    """
    sums: dict[str, float] = {}

    def gather(name: str, _: Tensor, grad: Tensor) -> None:
        power = grad.float().pow(2).sum(dtype=torch.float64).item() / grad.shape[-1]
        sums[name] = sums.get(name, 0.0) + power

    tokens = _backward(model, calls, names, gather, False, seed, progress)
    return {name: total / max(1, tokens) for name, total in sums.items()}


def is_language(call: Call, output: object) -> bool:
    """Whether a call's output is the logits of a language model."""
    tokens = [a for a in call.args[:1] if isinstance(a, Tensor) and not a.is_floating_point()]
    return hasattr(output, "logits") or (isinstance(output, Tensor) and bool(tokens))


def _backward(
    model: nn.Module,
    calls: Sequence[Call],
    names: Sequence[str],
    see: Callable[[str, Tensor, Tensor], None],
    likely: bool,
    seed: int,
    progress: bool,
) -> int:
    """Differentiate each call's surprise; `see` gets name, input and gradient. Counts tokens.
    likely: outputs are logits, whatever they look like."""
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(calls, desc="curvature", leave=False, disable=None if progress else True)
    with ExitStack() as stack:
        stack.enter_context(inference(model))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        for name in names:
            stack.callback(watch(model.get_submodule(name), partial(see, name)).remove)
        for call in bar:
            out = call.on(model)
            judge = _label_surprise if likely or is_language(call, out) else _probe
            value, count = judge(out, generator)
            value.backward()
            tokens += count
    return tokens


def _label_surprise(out: object, generator: torch.Generator) -> tuple[Tensor, int]:
    """Summed -log p of labels that the model itself draws, and their number."""
    log_p = getattr(out, "logits", out).float().log_softmax(-1).flatten(0, -2)
    labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return -log_p.gather(-1, labels.to(log_p.device)).sum(), log_p.shape[0]


def _probe(out: object, generator: torch.Generator) -> tuple[Tensor, int]:
    """The output along a random direction, and its rows, so that half of the curvature is the
    squared error in units of the output's own power."""
    y = first_output(out).float().flatten(0, -2)
    direction = torch.randn(y.shape, generator=generator).to(y.device)
    length = y.detach().pow(2).sum(-1).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return math.sqrt(2) * (direction * y).sum() / length, y.shape[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient; as before afterwards."""
    before = [p for p in model.parameters() if p.requires_grad]
    for p in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in before:
            p.requires_grad_(True)
