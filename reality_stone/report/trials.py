"""The page of one model at several rates: what the demo shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import show
from ..compress import Report
from ..evaluate import Evaluation
from ..training import TrainingReport
from .curves import training_curves
from .machine import machine
from .maps import layer_map
from .page import Section, facts, html_report, table, texts
from .plots import Series, line_plot


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe: the model as measured after it, and how it was trained."""

    name: str
    evaluation: Evaluation
    training: TrainingReport | None = None


@dataclass(frozen=True)
class Trial:
    """One model as it was measured; `compression` and `training` where it had them, or `stages`
    where it was trained in several.

    matrix_bytes: what is stored for the compressed matrices; file_bytes: the whole checkpoint.
    """

    name: str
    bits_per_weight: float
    matrix_bytes: int
    file_bytes: int
    evaluation: Evaluation
    tokens_per_second: float
    text: str
    compression: Report | None = None
    training: TrainingReport | None = None
    stages: Sequence[Stage] = ()


COLUMNS = ("model", "b/w", "perplexity", "to dense", "KL", "matrices", "file", "tokens/s")


def trial_rows(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """The cells of COLUMNS; the first trial is the dense model the others are compared with."""
    base = trials[0].evaluation.perplexity
    return [
        (
            t.name,
            f"{t.bits_per_weight:.3f}",
            f"{t.evaluation.perplexity:.3f}",
            f"{t.evaluation.perplexity / base:.4f}",
            "" if t.evaluation.kl is None else f"{t.evaluation.kl:.5f}",
            show.size(t.matrix_bytes),
            show.size(t.file_bytes),
            f"{t.tokens_per_second:.0f}",
        )
        for t in trials
    ]


def model_report(
    path: str | os.PathLike[str],
    title: str,
    trials: Sequence[Trial],
    prompt: str,
    details: Mapping[str, str],
) -> Path:
    """The page of a model at several rates: `trials` begins with the dense one.

    `details` (command, data, time) are shown beside the description of the machine.
    """
    dense, *others = trials
    trained = [t for t in others if t.training is not None or t.stages]
    one_shot = [t for t in others if t not in trained]
    judged = dense.evaluation
    smallest = min(t.matrix_bytes for t in others)
    best = min(
        (t for t in others if t.matrix_bytes < 1.01 * smallest),
        key=lambda t: t.evaluation.perplexity,
    )
    lead = (
        f"{best.name}: {dense.matrix_bytes / best.matrix_bytes:.1f} times smaller matrices at "
        f"{best.bits_per_weight:.3f} bits per weight, everything counted; perplexity "
        f"{best.evaluation.perplexity:.3f}, dense {judged.perplexity:.3f}."
    )
    plots = [
        line_plot(
            "Perplexity by rate",
            [
                Series(
                    name,
                    sorted((t.bits_per_weight, t.evaluation.perplexity) for t in group),
                    labels=True,
                )
                for name, group in (("one shot", one_shot), ("tables trained", trained))
                if group
            ],
            "bits per weight",
            "perplexity",
            ("dense", judged.perplexity),
        )
    ]
    for t in trained:
        plots += _stages(t)
    compressions = {t.name: t.compression for t in one_shot if t.compression is not None}
    return html_report(
        path,
        title,
        table(
            "Summary",
            COLUMNS,
            trial_rows(trials),
            "b/w, matrices: all that is stored for the compressed matrices (codes, scales, tables, "
            "padding). file: the whole checkpoint, dense embedding included. Perplexity over "
            f"{judged.tokens:,} tokens in cold windows of {judged.context}. KL(dense || model) in "
            "nats per token. tokens/s: greedy generation of one sequence with KV cache, median "
            "over turns.",
        ),
        *plots,
        layer_map("Error and bits of each layer", compressions),
        texts("Text", prompt, {t.name: t.text for t in trials if t.text}),
        facts("How and where this was measured", {**details, **machine()}),
        lead=lead,
    )


def _stages(trial: Trial) -> list[Section]:
    """Losses of all stages, and a table of what was measured after each of several."""
    stages = trial.stages or [Stage("training", trial.evaluation, trial.training)]
    runs = [(stage.name, stage.training) for stage in stages if stage.training is not None]
    sections = training_curves(trial.name, runs)
    if len(stages) > 1:
        rows = [
            (
                stage.name,
                f"{stage.evaluation.perplexity:.3f}",
                "" if stage.evaluation.kl is None else f"{stage.evaluation.kl:.5f}",
                "" if stage.training is None else f"{stage.training.seconds:.0f}",
            )
            for stage in stages
        ]
        columns = ("after stage", "perplexity", "KL", "seconds")
        sections.append(table(f"Stages: {trial.name}", columns, rows))
    return sections
