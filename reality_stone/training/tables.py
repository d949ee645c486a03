"""Training tables and scales while the codes stay."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..blocks import inference
from ..evaluate import logits
from ..nn import RBELinear
from ..nn.adapter import Adapter
from ..packed import round_to_half


@dataclass
class TrainingReport:
    """losses: one per optimiser step (nats per token); tokens: predicted tokens seen."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    skipped: int = 0  # steps left out because the loss or a gradient was not finite
    trained: int = 0  # parameters trained
    seconds: float = 0.0

    def to_json(self) -> dict:
        return asdict(self)


def table_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The params (scales, tables) of every compressed layer, shared ones once."""
    found = {}
    for module in model.modules():
        if isinstance(module, RBELinear):
            found |= {id(p): p for p in module.params if isinstance(p, nn.Parameter)}
    return list(found.values())


def finetune(
    model: nn.Module,
    batches: Tensor | Iterable[Tensor],
    teacher: nn.Module | None = None,
    mode: str = "tables",
    *,
    lr: float = 1e-3,
    epochs: int = 1,
    batch: int = 8,
    warmup: float = 0.05,
    clip: float = 1.0,
    progress: bool = True,
) -> TrainingReport:
    """Train a compressed language model's tables and scales, in place.

    batches: token ids (n, length), cut into `batch` rows a step, or an iterable of such batches.
    teacher: with one, the loss is KL(teacher || model) per token; else next-token cross entropy.
    lr: step relative to each param's root mean square; cosine to zero after `warmup` of the steps.

    Afterwards params are held to float16 values where that loses nothing of note, so that the
    stored size does not grow. Raises ValueError when there is nothing to train.
    """
    if mode != "tables":
        raise ValueError(f"mode must be 'tables' in this release, got {mode!r}")
    params = table_parameters(model)
    if not params:
        raise ValueError("the model has no compressed layers to train; call compress first")
    steps = cut(batches, batch, epochs)
    groups = [
        {"params": [p], "lr": lr * max(1e-8, p.detach().square().mean().sqrt().item())}
        for p in params
    ]
    report = train(model, groups, steps, teacher, warmup=warmup, clip=clip, progress=progress)
    with torch.no_grad():
        for p in params:
            p.copy_(round_to_half(p))
    return report


def train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    steps: Sequence[Tensor],
    teacher: nn.Module | None = None,
    *,
    warmup: float,
    clip: float,
    progress: bool,
) -> TrainingReport:
    """The loop of every recipe: Adam on these parameter groups alone, one batch a step."""
    params = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: cosine(i, len(steps), warmup))
    report = TrainingReport(trained=sum(p.numel() for p in params))
    start = time.perf_counter()
    with (
        _only(model, params),
        tqdm(steps, desc="finetune", leave=False, disable=None if progress else True) as bar,
    ):
        for tokens in bar:
            loss = _loss(model, teacher, tokens)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, clip)
            if not (math.isfinite(loss.item()) and bool(norm.isfinite())):
                report.skipped += 1
                if report.skipped == 1:
                    warnings.warn("a training step was not finite and is skipped", stacklevel=3)
                continue
            optimiser.step()
            schedule.step()
            report.losses.append(loss.item())
            report.tokens += tokens[:, 1:].numel()
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    report.seconds = time.perf_counter() - start
    return report


def cut(batches: Tensor | Iterable[Tensor], batch: int, epochs: int) -> list[Tensor]:
    """The batches of all steps. ValueError where there are none."""
    steps = list(batches.split(batch) if isinstance(batches, Tensor) else batches) * epochs
    if not steps:
        raise ValueError("there are no batches to train on")
    return steps


def _loss(model: nn.Module, teacher: nn.Module | None, tokens: Tensor) -> Tensor:
    log_p = logits(model, tokens)[:, :-1].float().log_softmax(-1)
    if teacher is None:
        return -log_p.gather(-1, tokens[:, 1:, None]).mean()
    with torch.no_grad():
        log_q = logits(teacher, tokens)[:, :-1].float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def cosine(step: int, steps: int, warmup: float) -> float:
    ramp = max(1, int(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


@contextmanager
def _only(model: nn.Module, params: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for these params alone, in eval mode (no dropout against a teacher) but for
    adapters, whose dropout is their own."""
    wanted = {id(p) for p in params}
    own = {m: m.training for m in model.modules() if isinstance(m, Adapter)}
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(id(p) in wanted)
    try:
        with inference(model):
            for adapter in own:
                adapter.train()
            yield
    finally:
        for adapter, flag in own.items():
            adapter.train(flag)
        for p, flag in before:
            p.requires_grad_(flag)
            p.grad = None
