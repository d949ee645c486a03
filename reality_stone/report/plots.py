"""Lines and points over two axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .page import Section, paragraph
from .svg import legend, mark, picture, ticks

POINTS = 24  # as many are marked and told one by one


@dataclass(frozen=True)
class Series:
    """Points (x, y) of a plot; `line` joins them, `labels` writes y beside each."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    labels: bool = False


def line_plot(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
    note: str = "",
) -> Section:
    """Points and lines as SVG. `reference` (name, y) is a dashed horizontal line."""
    series = [
        Series(s.name, [p for p in s.points if all(map(math.isfinite, p))], s.line, s.labels)
        for s in series
    ]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([reference[1]] if reference else [])
    if not xs:
        return Section(title, paragraph("There are no finite values to draw.") + paragraph(note))
    frame = _Frame(ticks(min(xs), max(xs)), ticks(min(ys), max(ys)))
    words = [f"{s.name}: {_in_words(s)}" for s in series if s.points]
    drawn = frame.axes(x_label, y_label)
    if reference:
        name, y = reference
        words.append(f"{name}: {y:.5g}")
        drawn += frame.level(y, f"{name} {y:.5g}")
    drawn += "".join(frame.series(i, s) for i, s in enumerate(series))
    keys = legend(
        [(s.name, f"<g class=s{i % 3}>{mark(i, 10, 6)}</g>") for i, s in enumerate(series)]
    )
    said = f"{y_label} against {x_label}. " + "; ".join(words)
    plot = picture(title, said, (frame.WIDTH, frame.HEIGHT), drawn, "plot")
    return Section(title, f"<figure>{keys}{plot}</figure>" + paragraph(note))


def _in_words(s: Series) -> str:
    if len(s.points) <= POINTS // 2:
        return ", ".join(f"{y:.5g} at {x:.4g}" for x, y in s.points)
    return f"from {s.points[0][1]:.5g} to {s.points[-1][1]:.5g} in {len(s.points)} points"


@dataclass(frozen=True)
class _Frame:
    """Maps data to the plane of the drawing; text stays legible at a phone's width."""

    x_ticks: list[float]
    y_ticks: list[float]

    WIDTH, HEIGHT = 480, 330
    LEFT, RIGHT, TOP, BOTTOM = 58, 18, 26, 48

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return self.LEFT + share * (self.WIDTH - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.HEIGHT - self.BOTTOM - share * (self.HEIGHT - self.TOP - self.BOTTOM)

    def axes(self, x_label: str, y_label: str) -> str:
        right, bottom = self.WIDTH - self.RIGHT, self.HEIGHT - self.BOTTOM
        drawn = []
        for value in self.y_ticks:
            y = self.y(value)
            drawn.append(f'<path class=grid d="M{self.LEFT} {y:.1f}H{right}"/>')
            drawn.append(
                f'<text x="{self.LEFT - 6}" y="{y + 4.5:.1f}" text-anchor=end>{value:.6g}</text>'
            )
        for value in self.x_ticks:
            x = self.x(value)
            drawn.append(f'<path class=axis d="M{x:.1f} {bottom}v5"/>')
            drawn.append(
                f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor=middle>{value:.6g}</text>'
            )
        drawn.append(f'<path class=axis d="M{self.LEFT} {bottom}H{right}"/>')
        middle = (self.LEFT + right) / 2
        drawn.append(
            f'<text x="{middle:.0f}" y="{self.HEIGHT - 8}" text-anchor=middle>'
            f"{escape(x_label)}</text>"
        )
        drawn.append(f'<text x="4" y="14">{escape(y_label)}</text>')
        return "".join(drawn)

    def level(self, y: float, text: str) -> str:
        at, right = self.y(y), self.WIDTH - self.RIGHT
        return (
            f'<path class=level d="M{self.LEFT} {at:.1f}H{right}"/>'
            f'<text class=level x="{self.LEFT + 6}" y="{at - 6:.1f}">{escape(text)}</text>'
        )

    def series(self, index: int, s: Series) -> str:
        points = [(self.x(x), self.y(y)) for x, y in s.points]
        drawn = ""
        if s.line and len(points) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            drawn += f'<path class=line d="M{path}"/>'
        if len(points) <= POINTS:
            drawn += "".join(mark(index, x, y) for x, y in points)
        if s.labels:
            for (x, y), (_, value) in zip(points, s.points, strict=True):
                end = "end" if x > self.WIDTH - 70 else "start"
                shift = -8 if end == "end" else 8
                side = 18 if index % 2 else -8  # every other series writes below its points
                drawn += (
                    f'<text x="{x + shift:.1f}" y="{y + side:.1f}" text-anchor={end}>'
                    f"{value:.4g}</text>"
                )
        return f"<g class=s{index % 3}>{drawn}</g>"
