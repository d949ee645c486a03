"""Training low-rank adapters beside frozen codes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.adapter import in_half
from ..nn.lora import adapters, add_lora, lora_parameters, remove_lora
from .loop import TrainingReport, cut, train
from .precision import training_precision
from .resume import State, describe


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
    precision: str = "float32",
    state: str | os.PathLike[str] | None = None,
    save_every: int = 50,
    progress: bool = True,
) -> TrainingReport:
    """Train adapters on a compressed language model, in place; all else stays as it is.

    A model without adapters gets them (`nn.lora.add_lora` with rank, alpha, dropout and targets);
    those it has are trained further as they are (`add_lora` with init="error" starts them nearer
    the dense model). batches, teacher, the schedule, precision and state are those of
    `finetune`; `lr` is Adam's own. Afterwards the adapters hold float16 values where that loses
    nothing of note. Raises ValueError when there is nothing to train.
    """
    steps = cut(batches, batch, epochs)
    new = not adapters(model)
    if new:
        add_lora(model, rank, alpha, dropout, targets)
    params = lora_parameters(model)
    run = None
    try:
        training_precision(precision, params[0].device)  # refuses a word it does not know
        if state is not None:
            settings = {
                "mode": "lora", "lr": lr, "epochs": epochs, "batch": batch, "warmup": warmup,
                "clip": clip, "precision": precision,
            }  # fmt: skip
            run = _open(state, model, settings, steps, teacher, save_every)
    except BaseException:
        if new:
            remove_lora(model)
        raise
    report = TrainingReport(**run.record["report"]) if run else TrainingReport()
    if run is not None and run.stage == "finished":
        return report
    groups = [{"params": params, "lr": lr}]
    train(
        model, groups, steps, teacher, warmup=warmup, clip=clip, progress=progress,
        precision=precision, state=run, report=report,
    )  # fmt: skip
    with torch.no_grad():
        for p in params:
            p.copy_(in_half(p))
    if run is not None:
        run.save("finished", report=report.to_json())
    return report


def _open(
    directory: str | os.PathLike[str],
    model: nn.Module,
    settings: dict[str, Any],
    steps: list[Tensor],
    teacher: nn.Module | None,
    every: int,
) -> State:
    """The state of a run, put into the adapters where there is one."""
    found = adapters(model)
    settings |= {
        f"adapter of {name!r}": f"rank {a.rank}, alpha {a.alpha}, dropout {a.dropout}"
        for name, a in found.items()
    }
    settings |= describe(model, steps, teacher, codes_move=False)
    tensors = {f"{name}.{k}": p for name, a in found.items() for k, p in a.named_parameters()}
    run = State(directory, settings, tensors, every)
    run.restore()
    return run
