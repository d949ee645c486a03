"""A scale from numbers to colours whose steps look equally large, and its legend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .svg import picture

# Viridis (van der Walt and Smith, 2015; CC0) at every twentieth, straight lines between them.
VIRIDIS = (
    (68, 1, 84), (71, 19, 101), (72, 36, 117), (70, 52, 128), (65, 68, 135), (59, 82, 139),
    (53, 95, 141), (47, 108, 142), (42, 120, 142), (37, 132, 142), (33, 145, 140), (30, 156, 137),
    (34, 168, 132), (47, 180, 124), (68, 191, 112), (94, 201, 98), (122, 209, 81), (155, 217, 60),
    (189, 223, 38), (223, 227, 24), (253, 231, 37),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`, both finite; logarithmic where `log`, then both are above 0."""

    low: float
    high: float
    log: bool = False

    @staticmethod
    def of(values: Iterable[float], log: bool = False) -> Scale | None:
        """The scale that the finite values span (those above 0 where `log`), None without any."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        return Scale(min(known), max(known), log) if known else None

    def share(self, value: float) -> float:
        """0 at `low`, 1 at `high`, and no further."""
        if self.high <= self.low or value <= self.low:
            return 0.0
        if value >= self.high:
            return 1.0
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, share: float) -> float:
        """The inverse of `share`."""
        if self.log:
            return self.low * (self.high / self.low) ** share
        return self.low + share * (self.high - self.low)


def colour(share: float) -> tuple[int, int, int]:
    """sRGB at a share of the scale."""
    at = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    i = min(int(at), len(VIRIDIS) - 2)
    low, high = VIRIDIS[i], VIRIDIS[i + 1]
    mixed = (round(a + (at - i) * (b - a)) for a, b in zip(low, high, strict=True))
    return tuple(mixed)


def ink(rgb: tuple[int, int, int]) -> str:
    """Black or white, whichever is read better on `rgb`; contrast at least 4.5 (WCAG 2.2)."""
    return "#000" if luminance(rgb) > 0.179 else "#fff"


def luminance(rgb: tuple[int, int, int]) -> float:
    """Relative luminance of sRGB, 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in (v / 255 for v in rgb)]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def hexadecimal(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def scale_legend(scale: Scale, unit: str, say: Callable[[float], str]) -> str:
    """The colours in a bar with five numbers under it; one number where all values are equal."""
    width, height = 320, 44
    if scale.high <= scale.low:
        swatch = f'<rect x="0" y="6" width="24" height="14" fill="{hexadecimal(colour(0))}"/>'
        text = f"every value is {say(scale.low)}"
        drawn = f'{swatch}<text x="32" y="18">{text}</text>'
        return picture("Scale of colours", f"{unit}: {text}", (width, 26), drawn, "scale")
    steps = 64
    cell = width / steps
    drawn = "".join(
        f'<rect x="{i * cell:.2f}" y="4" width="{cell + 0.3:.2f}" height="14" '
        f'fill="{hexadecimal(colour(i / (steps - 1)))}"/>'
        for i in range(steps)
    )
    anchors = {0.0: "start", 1.0: "end"}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = share * (width - 1) + 0.5
        drawn += f'<path class=axis d="M{x:.1f} 18v4"/>'
        anchor, number = anchors.get(share, "middle"), say(scale.value(share))
        drawn += f'<text x="{x:.1f}" y="36" text-anchor={anchor}>{number}</text>'
    kind = "logarithmic" if scale.log else "linear"
    words = f"{unit}, {kind} from {say(scale.low)} to {say(scale.high)}"
    return picture("Scale of colours", words, (width, height), drawn, "scale")
