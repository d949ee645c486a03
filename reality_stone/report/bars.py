"""Horizontal bars, whole or of several parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from .page import Section, paragraph
from .svg import legend, picture, ticks

PARTS = 7  # fills there are; see .p0 and on in the style


@dataclass(frozen=True)
class Bar:
    """One bar: `parts` are lengths by name, drawn one behind the other."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    label: str,
    say: Callable[[float], str],
    *,
    level: tuple[str, float] | None = None,
    note: str = "",
) -> Section:
    """Bars from 0 with their totals beside them. `say` writes a length in its unit; `level`
    (name, value) is a dashed vertical line."""
    width, left, right, row, top = 480, 14, 76, 42, 6
    longest = max([bar.total for bar in bars] + ([level[1]] if level else []) + [1e-12])
    marks = [tick for tick in ticks(0, longest) if tick <= longest * 1.0001]
    bottom = top + row * len(bars)

    def x(value: float) -> float:
        return left + value / longest * (width - left - right)

    drawn = written = ""  # what is written goes over what is drawn
    for tick in marks:
        drawn += f'<path class=grid d="M{x(tick):.1f} {top}V{bottom}"/>'
        written += (
            f'<text x="{x(tick):.1f}" y="{bottom + 17}" text-anchor=middle>{say(tick)}</text>'
        )
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    for i, bar in enumerate(bars):
        y, at = top + row * i, 0.0
        written += f'<text x="{left}" y="{y + 14}">{escape(bar.name)}</text>'
        for name, length in bar.parts.items():
            drawn += (
                f'<rect class=p{names.index(name) % PARTS} x="{x(at):.1f}" y="{y + 19}" '
                f'width="{max(0.0, x(at + length) - x(at)):.1f}" height="16">'
                f"<title>{escape(f'{bar.name}, {name}: {say(length)}')}</title></rect>"
            )
            at += length
        written += f'<text x="{x(at) + 6:.1f}" y="{y + 32}">{say(bar.total)}</text>'
    if level:
        drawn += f'<path class=level d="M{x(level[1]):.1f} {top}V{bottom}"/>'
    written += f'<text x="{left}" y="{bottom + 38}">{escape(label)}</text>'
    words = "; ".join(
        f"{bar.name}: {say(bar.total)}"
        + (f" ({', '.join(f'{n} {say(v)}' for n, v in bar.parts.items())})" if names[1:] else "")
        for bar in bars
    )
    if level:
        words += f"; {level[0]}: {say(level[1])}"
    keys = ""
    if len(names) > 1:
        sign = '<rect class=p{} x="2" y="0" width="12" height="12"/>'
        keys = legend([(name, sign.format(i % PARTS)) for i, name in enumerate(names)])
    chart = picture(title, f"{label}. {words}", (width, bottom + 46), drawn + written, "plot")
    return Section(title, f"<figure>{keys}{chart}</figure>" + paragraph(note))
