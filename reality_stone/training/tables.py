"""Training tables and scales end to end, after the blocks one by one if wanted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Compressed
from ..packed import round_to_half
from .loop import TrainingReport, cut, relative, train
from .lora import finetune_lora
from .precision import training_precision
from .resume import State, describe

MODES = ("tables", "codes", "lora")


def table_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The params (scales, tables) of every compressed layer, shared ones once."""
    found = {}
    for module in model.modules():
        if isinstance(module, Compressed):
            found |= {id(p): p for p in module.params if isinstance(p, nn.Parameter)}
    return list(found.values())


def finetune(
    model: nn.Module,
    batches: Tensor | Iterable[Tensor],
    teacher: nn.Module | None = None,
    mode: str = "tables",
    *,
    lr: float | None = None,
    epochs: int = 1,
    batch: int = 8,
    warmup: float = 0.05,
    clip: float = 1.0,
    rank: int = 16,
    blockwise: bool = False,
    block_windows: int = 128,
    block_steps: int = 100,
    precision: str = "float32",
    state: str | os.PathLike[str] | None = None,
    save_every: int = 50,
    progress: bool = True,
) -> TrainingReport:
    """Train a compressed language model, in place.

    batches: token ids (n, length), cut into `batch` rows a step, or an iterable of such batches.
    teacher: with one, the loss is KL(teacher || model) per token; else next-token cross entropy.
    mode: "tables" trains tables and scales; "codes" lets codes change too, block by block towards
    the teacher's blocks (`reconstruct`), then trains tables; "lora" trains adapters of `rank`
    (`finetune_lora`). blockwise: tables of each block in turn before all of them together.
    Both take the first `block_windows` rows and `block_steps` steps a block, and need a teacher.
    lr: 1e-3 of each param's root mean square, for "lora" 2e-3 of Adam's own; cosine to zero after
    `warmup` of the steps. precision: of the forward pass, "float32", "bfloat16" (autocast, of the
    teacher too) or "auto", the latter where the device computes in it.

    state: a directory that keeps the run, saved every `save_every` steps, after each block and on
    an interrupt. The same call then goes on from there, with the losses of a run that was never
    stopped; where settings, batches or model differ, ValueError names the difference. A finished
    run stays there, and the same call gives its result again: delete it once the model is saved.

    Afterwards params are held to float16 values where that loses nothing of note, so that the
    stored size does not grow. Raises ValueError when there is nothing to train.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'tables', 'codes' or 'lora', got {mode!r}")
    if mode == "lora":
        if blockwise:
            raise ValueError("blockwise goes with mode 'tables' or 'codes', not with 'lora'")
        return finetune_lora(
            model, batches, teacher, rank=rank, lr=2e-3 if lr is None else lr, epochs=epochs,
            batch=batch, warmup=warmup, clip=clip, precision=precision, state=state,
            save_every=save_every, progress=progress,
        )  # fmt: skip
    codes, lr = mode == "codes", 1e-3 if lr is None else lr
    blockwise = blockwise or codes
    if blockwise and teacher is None:
        what = "mode 'codes'" if codes else "blockwise"
        raise ValueError(f"{what} needs teacher=, the dense model")
    params = table_parameters(model)
    if not params:
        raise ValueError("the model has no compressed layers to train; call compress first")
    steps = cut(batches, batch, epochs)
    training_precision(precision, params[0].device)  # refuses a word it does not know
    run = None
    if state is not None:
        settings = {
            "mode": mode, "lr": lr, "epochs": epochs, "batch": batch, "warmup": warmup,
            "clip": clip, "precision": precision, "blockwise": blockwise,
        }  # fmt: skip
        if blockwise:
            settings |= {"block_windows": block_windows, "block_steps": block_steps}
        settings |= describe(model, steps, teacher, codes_move=codes)
        run = State(state, settings, _moving(model, codes), save_every)
        run.restore()
    report = TrainingReport(**run.record["report"]) if run else TrainingReport()
    if run is not None and run.stage == "finished":
        return report
    if blockwise and (run is None or run.stage in ("new", "blocks")):
        rows = _first(steps, block_windows)
        _blockwise(
            model, teacher, rows, report, run, codes=codes, steps=block_steps, batch=batch,
            precision=precision, progress=progress,
        )  # fmt: skip
        params = table_parameters(model)
    train(
        model, relative(params, lr), steps, teacher, warmup=warmup, clip=clip, progress=progress,
        precision=precision, state=run, report=report,
    )  # fmt: skip
    with torch.no_grad():
        for p in params:
            p.copy_(round_to_half(p))
    if run is not None:
        run.save("finished", report=report.to_json())
    return report


def _blockwise(
    model: nn.Module,
    teacher: nn.Module,
    batches: list[Tensor],
    report: TrainingReport,
    run: State | None,
    **options: Any,
) -> None:
    """The stage before the end-to-end one; its rows and its time go into the report."""
    from .blockwise import reconstruct

    start, before = time.perf_counter(), report.seconds
    done = [] if run is None else list(run.record["done"])

    def after(name: str) -> None:
        done.append(name)
        report.seconds = before + time.perf_counter() - start
        if run is not None:
            run.save("blocks", done=done, report=report.to_json())

    try:
        found = reconstruct(model, teacher, batches, skip=tuple(done), after=after, **options)
    except KeyboardInterrupt:
        if run is None:
            raise
        raise KeyboardInterrupt(run.how_to_go_on) from None
    report.blocks += [asdict(block) for block in found.blocks]
    report.seconds = before + time.perf_counter() - start
    if run is not None:
        run.save("train", at=0, rates=None, report=report.to_json())


def _first(steps: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Batches of the first `rows` rows."""
    found: list[Tensor] = []
    for tokens in steps:
        if rows <= 0:
            break
        found.append(tokens[:rows])
        rows -= found[-1].shape[0]
    return found


def _moving(model: nn.Module, codes: bool) -> dict[str, Tensor]:
    """What a run changes: tables and scales, codes where they move."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Compressed) and layer.codec is not None:
            parts = layer.named_parameters(recurse=False)
            found |= {f"{name}.{own}": p for own, p in parts if own != "bias"}
            if codes:
                found |= {f"{name}.{own}": b for own, b in layer.named_buffers(recurse=False)}
    return found
