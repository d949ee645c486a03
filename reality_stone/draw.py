"""Plots of plans, by matplotlib where it is installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .allocation import DENSE, allocate, uniform_loss

if TYPE_CHECKING:
    from .layer_plan import Plan

TARGETS = 40  # on the curve of loss against rate
PLOTTED = 8.0  # nominal bits; the curve beyond would squeeze the rest


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Stored bits by layer, and predicted loss against rate beside that of one rate for all."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib ({error}): pip install reality-stone[plot]"
        ) from None
    if not plan.curves:
        raise ValueError("there is nothing to plot: this plan holds no curves")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
