"""Perplexity and KL divergence of language models on a fixed protocol.

Tokens are cut into windows of `context` that do not overlap, each starting cold; the mean runs over
tokens 2..context of every window. A rest shorter than a window is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import metrics
from .blocks import inference


@dataclass(frozen=True)
class Evaluation:
    """perplexity = exp(mean negative log likelihood); kl = mean KL(reference || model) in nats."""

    perplexity: float
    kl: float | None
    tokens: int  # predicted tokens the means run over
    context: int
    seconds: float

    def to_json(self) -> dict:
        return asdict(self)


def windows(tokens: Tensor, context: int) -> Tensor:
    """(n,) or (m, context) token ids -> (m, context) windows."""
    if tokens.is_floating_point() or tokens.dim() not in (1, 2):
        raise ValueError(
            f"tokens must be integers (n,) or (m, {context}), "
            f"got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if context < 2:
        raise ValueError(f"context must be at least 2, got {context}")
    if tokens.dim() == 2:
        if tokens.shape[1] != context:
            raise ValueError(f"windows of {tokens.shape[1]} tokens do not fit context={context}")
        return tokens.long()
    count = tokens.numel() // context
    if count == 0:
        raise ValueError(f"{tokens.numel()} tokens are less than one window of {context}")
    return tokens[: count * context].view(count, context).long()


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token logits of a Hugging Face model or of a module that returns them."""
    out = model(tokens)
    return getattr(out, "logits", out)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tensor,
    context: int = 256,
    reference: nn.Module | None = None,
    batch: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Perplexity of `model`, and its KL divergence from `reference` where one is given."""
    data = windows(tokens, context)
    start, nll, kl, count = time.perf_counter(), 0.0, 0.0, 0
    with inference(model), inference(reference) if reference is not None else nullcontext():
        for part in _bar(data.split(batch), "evaluate", progress):
            part = part.to(_device(model))
            log_p = logits(model, part)[:, :-1].float().log_softmax(-1)
            nll -= log_p.gather(-1, part[:, 1:, None]).sum().item()
            count += part[:, 1:].numel()
            if reference is not None:
                log_q = logits(reference, part)[:, :-1].float().log_softmax(-1)
                kl += metrics.kl_divergence(log_p, log_q).sum().item()
    seconds = time.perf_counter() - start
    perplexity = math.exp(min(nll / count, 700.0)) if nll == nll else float("nan")
    return Evaluation(
        perplexity, kl / count if reference is not None else None, count, context, seconds
    )


def perplexity(model: nn.Module, tokens: Tensor, context: int = 256) -> float:
    """exp of the mean negative log likelihood over windows of `context` tokens."""
    return evaluate(model, tokens, context, progress=False).perplexity


def kl_divergence(
    model: nn.Module, reference: nn.Module, tokens: Tensor, context: int = 256
) -> float:
    """Mean KL(reference || model) per token in nats, on the same windows as `perplexity`."""
    return evaluate(model, tokens, context, reference, progress=False).kl


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _bar(parts: tuple[Tensor, ...], label: str, progress: bool) -> Iterator[Tensor]:
    # disable=None: silent unless stderr is a terminal.
    return tqdm(parts, desc=label, leave=False, disable=None if progress else True)
