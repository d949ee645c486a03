"""What drawings share: a picture that says in words what it shows, round numbers for an axis."""

from __future__ import annotations

import math
import zlib
from html import escape


def picture(title: str, words: str, size: tuple[float, float], drawn: str, kind: str) -> str:
    """An SVG of class `kind` that is as wide as its place; `words` stand for it where it is not
    seen."""
    width, height = size
    # Ids need only differ within a page, and must be the same for the same content.
    key = f"{zlib.crc32(f'{title}|{words}'.encode()):08x}"
    return (
        f'<svg class={kind} viewBox="0 0 {width:g} {height:g}" role=img '
        f'aria-labelledby="t{key} d{key}"><title id=t{key}>{escape(title)}</title>'
        f"<desc id=d{key}>{escape(words)}</desc>{drawn}</svg>"
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that cover the range."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    unit = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (unit * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def mark(kind: int, x: float, y: float) -> str:
    """Told apart by shape as well as by colour: circle, square, diamond."""
    if kind % 3 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if kind % 3 == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5-5.5 5.5-5.5-5.5z"/>'


def legend(entries: list[tuple[str, str]]) -> str:
    """(name, SVG of 20 by 12) in a row."""
    items = "".join(
        f"<li><svg viewBox='0 0 20 12' aria-hidden=true>{sign}</svg>{escape(name)}</li>"
        for name, sign in entries
    )
    return f"<ul class=legend>{items}</ul>"
