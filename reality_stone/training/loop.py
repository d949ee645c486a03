"""The loop of every recipe: one batch a step, Adam on some parameters, the rest as it is."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..blocks import inference
from ..evaluate import logits
from ..nn.adapter import Adapter
from .precision import training_precision
from .resume import State, random_state


@dataclass
class TrainingReport:
    """losses: one per optimiser step (nats per token); tokens: predicted tokens seen.

    blocks: what the block-wise stage did, {"name", "before", "after", "accepted"} (BlockReport) of
    each block since the run was last started.
    """

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    skipped: int = 0  # steps left out because the loss or a gradient was not finite
    trained: int = 0  # parameters trained
    seconds: float = 0.0  # of all stages
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict:
        return asdict(self)


def train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    steps: Sequence[Tensor],
    teacher: nn.Module | None = None,
    *,
    warmup: float,
    clip: float,
    progress: bool,
    precision: str = "float32",
    state: State | None = None,
    report: TrainingReport | None = None,
) -> TrainingReport:
    """Adam on these parameter groups alone, one of `steps` a step; adds to `report`.

    With a `state` that holds a run, goes on where that stopped; saves every `state.every` steps
    and when interrupted between two changes of the parameters.
    """
    params = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimiser.param_groups]
    report = TrainingReport() if report is None else report
    report.trained = sum(p.numel() for p in params)
    at = 0
    if state is not None and state.stage == "train":
        at, rates = state.record["at"], state.record["rates"] or rates
        state.restore_optimiser(optimiser)
    device = params[0].device
    autocast = training_precision(precision, device)
    start, before, whole = time.perf_counter(), report.seconds, True

    def save() -> None:
        report.seconds = before + time.perf_counter() - start
        state.save("train", optimiser, random, at=at, rates=rates, report=report.to_json())

    with (
        _only(model, params),
        inference(teacher) if teacher is not None else nullcontext(),
        tqdm(
            total=len(steps), initial=at, desc="finetune", leave=False,
            disable=None if progress else True,
        ) as bar,
    ):  # fmt: skip
        random = random_state(device)  # as it was before step `at`
        try:
            while at < len(steps):
                if state is not None and at and at % state.every == 0:
                    save()
                loss = _loss(model, teacher, steps[at], autocast)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(params, clip)
                value = loss.item()
                finite = math.isfinite(value) and bool(norm.isfinite())
                factor = cosine(len(report.losses), len(steps), warmup)
                for group, rate in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                whole = False
                if finite:
                    optimiser.step()
                    report.losses.append(value)
                    report.tokens += steps[at][:, 1:].numel()
                else:
                    report.skipped += 1
                random = random_state(device)
                at += 1
                whole = True
                if report.skipped == 1 and not finite:
                    warnings.warn("a training step was not finite and is skipped", stacklevel=3)
                bar.update()
                bar.set_postfix_str(f"loss {value:.4f}")
        except KeyboardInterrupt:
            if state is None:
                raise
            if whole:  # else the parameters are between two steps, and the last save stands
                save()
            raise KeyboardInterrupt(state.how_to_go_on) from None
    report.seconds = before + time.perf_counter() - start
    return report


def cut(batches: Tensor | Iterable[Tensor], batch: int, epochs: int) -> list[Tensor]:
    """The batches of all steps. ValueError where there are none."""
    steps = list(batches.split(batch) if isinstance(batches, Tensor) else batches) * epochs
    if not steps:
        raise ValueError("there are no batches to train on")
    return steps


def _loss(
    model: nn.Module,
    teacher: nn.Module | None,
    tokens: Tensor,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    with autocast():
        out = logits(model, tokens)
        if teacher is not None:
            with torch.no_grad():
                wanted = logits(teacher, tokens)
    log_p = out[:, :-1].float().log_softmax(-1)
    if teacher is None:
        return -log_p.gather(-1, tokens[:, 1:, None]).mean()
    log_q = wanted[:, :-1].float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def relative(params: Iterable[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Parameter groups whose steps are `lr` of each parameter's root mean square."""
    return [
        {"params": [p], "lr": lr * max(1e-8, p.detach().square().mean().sqrt().item())}
        for p in params
    ]


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
