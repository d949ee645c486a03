"""What a training says of itself: losses of each step, and of each block before and after."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import tensorfile
from ..training import TrainingReport
from .page import Section
from .plots import Series, line_plot

DRAWN = 200  # points of one curve; of more steps each point is the mean of several


@dataclass(frozen=True)
class Log:
    """A training read from a file. before, after: perplexity and KL where they were measured."""

    name: str
    mode: str
    training: TrainingReport
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Log:
        """What `reality-stone finetune --json` printed, or `TrainingReport.to_json()` in a file.

        Raises FileNotFoundError, or ValueError in one sentence.
        """
        path = Path(path)
        found = tensorfile.read_json(path)
        record = found.get("training", found) if isinstance(found, dict) else None
        if not isinstance(record, dict) or not _is_numbers(record.get("losses")):
            raise ValueError(f"{path}: this is no training report: it has no list of losses")
        blocks = record.get("blocks", [])
        if not isinstance(blocks, list) or not all(_is_block(block) for block in blocks):
            raise ValueError(f"{path}: the blocks of this training report cannot be read")
        counts = {key: record.get(key, 0) for key in ("tokens", "skipped", "trained", "seconds")}
        if not _is_numbers(list(counts.values())):
            raise ValueError(f"{path}: the counts of this training report cannot be read")
        losses = [math.nan if loss is None else float(loss) for loss in record["losses"]]
        sides = {key: _measured(path, found, key) for key in ("before", "after")}
        training = TrainingReport(losses, blocks=blocks, **counts)
        return Log(path.stem, str(found.get("mode", "training")), training, **sides)


def _is_numbers(values: Any) -> bool:
    """JSON has no words for infinity and NaN: null stands for both."""
    return isinstance(values, list) and all(
        value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        for value in values
    )


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, dict)
        and {"before", "after", "accepted"} <= block.keys()
        and _is_numbers([block["before"], block["after"]])
    )


def _measured(path: Path, found: dict[str, Any], key: str) -> dict[str, Any] | None:
    side = found.get(key)
    if side is None:
        return None
    if not isinstance(side, dict) or not _is_numbers([side.get("perplexity"), side.get("kl")]):
        raise ValueError(f"{path}: what was measured {key} the training cannot be read")
    return side


def training_curves(name: str, runs: Sequence[tuple[str, TrainingReport]]) -> list[Section]:
    """Losses of all runs one after the other, and the blocks' of each run that has them."""
    sections, curves, notes, at = [], [], [], 0
    for stage, done in runs:
        label = stage if len(runs) > 1 else ""
        if done.losses or not done.blocks:
            title = f"loss of each step, {label}" if label else "loss of each step"
            points, width = thin(list(enumerate(done.losses, at + 1)))
            curves.append(Series(title, points))
            told = f"{len(done.losses)} steps, {done.tokens:,} tokens, {done.seconds:.0f} s"
            told += f"; each point is the mean of {width} steps." if width > 1 else "."
            notes.append(f"{label}: {told}" if label else told)
            at += len(done.losses)
        if done.blocks:
            title = f"Block by block: {name}" + (f", {label}" if label else "")
            sections.append(_blocks(title, done.blocks))
    if curves:
        note = " ".join(notes)
        sections.append(
            line_plot(f"Training: {name}", curves, "step", "loss, nats per token", note=note)
        )
    return sections


def _blocks(title: str, blocks: Sequence[dict[str, Any]]) -> Section:
    before = [_number(block["before"]) for block in blocks]
    kept = [_number(b["after"] if b["accepted"] else b["before"]) for b in blocks]
    series = [
        Series("before", list(enumerate(before, 1))),
        Series("after", list(enumerate(kept, 1))),
    ]
    return line_plot(title, series, "block", "loss on held-out calls")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def thin(points: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """At most DRAWN points, each the mean of as many neighbours as the second result says."""
    width = -(-len(points) // DRAWN) or 1
    if width == 1:
        return points, 1
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(_mean(x for x, _ in g), _mean(y for _, y in g)) for g in groups], width


def _mean(values) -> float:
    """Over the finite ones."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
