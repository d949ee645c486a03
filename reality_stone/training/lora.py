"""Training low-rank adapters beside frozen codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..nn.adapter import in_half
from ..nn.lora import adapters, add_lora, lora_parameters
from .tables import TrainingReport, cut, train


def finetune_lora(
    model: nn.Module,
    batches: Tensor | Iterable[Tensor],
    teacher: nn.Module | None = None,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    lr: float = 2e-3,
    epochs: int = 1,
    batch: int = 8,
    warmup: float = 0.05,
    clip: float = 1.0,
    progress: bool = True,
) -> TrainingReport:
    """Train adapters on a compressed language model, in place; all else stays as it is.

    A model without adapters gets them (`nn.lora.add_lora` with rank, alpha, dropout and targets);
    those it has are trained further as they are (`add_lora` with init="error" starts them nearer
    the dense model). batches, teacher and the schedule are those of
    `finetune`; `lr` is Adam's own. Afterwards the adapters hold float16 values where that loses
    nothing of note. Raises ValueError when there is nothing to train.
    """
    steps = cut(batches, batch, epochs)
    if not adapters(model):
        add_lora(model, rank, alpha, dropout, targets)
    params = lora_parameters(model)
    groups = [{"params": params, "lr": lr}]
    report = train(model, groups, steps, teacher, warmup=warmup, clip=clip, progress=progress)
    with torch.no_grad():
        for p in params:
            p.copy_(in_half(p))
    return report
