"""What an error at a layer's output costs the model: Fisher information, one moment per layer.

For loss differences near a minimum, KL(model || changed) is about half of tr F E H E^T summed over
layers, with E the error of a weight, H = E[x x^T] of its input and F = E[g g^T] of the gradients of
the log likelihood at its output, labels drawn from the model itself (K-FAC: Martens & Grosse 2015).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Call, inference
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
    tokens = 0

    def gather(name: str):
        def see(_: Tensor, grad: Tensor) -> None:
            if grad.shape[-1] <= LARGEST:
                grad = grad.float()
                moment = grad.t() @ grad
                sums[name] = sums[name].add_(moment) if name in sums else moment

        return see

    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(calls, desc="curvature", leave=False, disable=None if progress else True)
    with ExitStack() as stack:
        stack.enter_context(inference(model))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        for name in names:
            stack.callback(watch(model.get_submodule(name), gather(name)).remove)
        for call in bar:
            out = call.on(model)
            log_p = getattr(out, "logits", out).float().log_softmax(-1).flatten(0, -2)
            labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
            (-log_p.gather(-1, labels.to(log_p.device)).sum()).backward()
            tokens += log_p.shape[0]
    return {name: total.div_(max(1, tokens)).cpu() for name, total in sums.items()}


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
