"""Plots of plans and of measurements, by matplotlib where it is installed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import show
from .allocation import DENSE, allocate, uniform_loss

if TYPE_CHECKING:
    from .bench import Result
    from .layer_plan import Plan

TARGETS = 40  # on the curve of loss against rate
PLOTTED = 8.0  # nominal bits; the curve beyond would squeeze the rest


@dataclass(frozen=True)
class Bar:
    """One value of a panel; bars of one `kind` have one colour."""

    label: str
    value: float
    note: str
    kind: str


def pyplot():
    """matplotlib.pyplot, drawing to files; ImportError that says how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib ({error}): pip install reality-stone[plot]"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_bars(
    panels: Mapping[str, Sequence[Bar]],
    path: str | os.PathLike[str],
    label: str,
    mark: float | None = None,
    columns: int = 1,
) -> None:
    """Horizontal bars, a panel a title; PNG, SVG or PDF by the file's ending. `mark` is a line."""
    plt = pyplot()
    if not panels:
        raise ValueError("there is nothing to plot: no results")
    rows = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure, grid = plt.subplots(
        rows, columns, squeeze=False, layout="constrained",
        figsize=(1 + 6 * columns, rows * (0.8 + 0.22 * most)),
    )  # fmt: skip
    kinds = list(dict.fromkeys(bar.kind for bars in panels.values() for bar in bars))
    colours = dict(zip(kinds, itertools.cycle(plt.get_cmap("tab10").colors), strict=False))
    for axes, (title, bars) in zip(grid.flat, panels.items(), strict=False):
        drawn = axes.barh(
            range(len(bars)), [b.value for b in bars], color=[colours[b.kind] for b in bars]
        )
        axes.bar_label(drawn, [b.note for b in bars], fontsize=6, padding=2)
        axes.set_yticks(range(len(bars)), [b.label for b in bars], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        if mark is not None:
            axes.axvline(mark, color="black", linestyle="--", linewidth=1)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    if len(kinds) > 1:
        patches = [plt.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in kinds]
        figure.legend(patches, kinds, loc="outside lower center", ncols=len(kinds), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_benchmark(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """How many times as fast as torch each layer is, a panel a shape, batch and backward."""
    panels: dict[str, list[Bar]] = {}
    for r in results:
        backward = {"none": "", "input": ", with dX", "all": ", with all gradients"}[r.backward]
        note = f"{r.seconds * 1e3:.3g} ms"
        if r.share is not None:
            note += f", {100 * r.share:.0f} % {r.bound}"
        panels.setdefault(f"{r.shape[0]} x {r.shape[1]}, batch {r.batch}{backward}", []).append(
            Bar(show.codec(r.what), r.speedup, note, r.kind)
        )
    columns = len({(r.batch, r.backward) for r in results})
    draw_bars(panels, path, f"times as fast as {results[0].against}", 1.0, min(columns, 4))


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Stored bits by layer, and predicted loss against rate beside that of one rate for all."""
    plt = pyplot()
    if not plan.curves:
        raise ValueError("there is nothing to plot: this plan holds no curves")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, max(4.0, 0.2 * len(plan.curves))), width_ratios=(3, 2)
    )
    chosen = [plan.chosen(layer) for layer in plan.curves]
    colours = plt.get_cmap("viridis")
    shade = [colours(min(c.bits, PLOTTED) / PLOTTED) for c in chosen]
    left.barh(range(len(chosen)), [c.bits for c in chosen], color=shade)
    left.axvline(plan.bits_per_weight, color="black", linestyle="--", linewidth=1)
    left.set_yticks(range(len(chosen)), [layer.name for layer in plan.curves], fontsize=7)
    left.invert_yaxis()
    left.set(xlabel="bits per weight, all counted", title="rates by layer")

    total = plan.weights
    rates = [c.rate for c in plan.curves[0].choices]
    shown = [rate for rate in rates if rate <= PLOTTED] or rates
    targets = [shown[0] + (shown[-1] - shown[0]) * i / TARGETS for i in range(TARGETS + 1)]
    points = []
    for target in targets:
        found = allocate(plan.curves, target)
        bits = sum(c.bits * x.weights for c, x in zip(found, plan.curves, strict=True)) / total
        points.append((bits, sum(c.loss for c in found)))
    even = [
        (sum(x.bits_at(rate) * x.weights for x in plan.curves) / total,
         uniform_loss(plan.curves, rate))
        for rate in shown if rate != DENSE
    ]  # fmt: skip
    right.plot(*zip(*points, strict=True), label="planned")
    right.plot(*zip(*even, strict=True), "o", label="one rate for all layers")
    right.plot(plan.bits_per_weight, plan.loss, "k*", markersize=12, label="this plan")
    right.set(xlabel="bits per weight, all counted", ylabel=f"predicted loss, {plan.measure}")
    right.set_yscale("log")
    right.set_title("loss against rate")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
