"""Heat maps: tables whose cells are coloured, so that they are read and scrolled as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..compress import LayerReport, Report
from .colour import Scale, colour, hexadecimal, ink, scale_legend
from .page import Section, breakable, paragraph, percent, scrolling, sentences
from .structure import Grid, below, common, grid

WIDE = 12  # columns; in a map of more, cells are small and say their number when pointed at


@dataclass(frozen=True)
class Cell:
    """One field of a map: `value` chooses the colour, `text` says it, `small` stands below."""

    value: float
    text: str
    small: str = ""
    title: str = ""


def heat_map(
    title: str,
    corner: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Cell | None]],
    unit: str,
    say: Callable[[float], str],
    *,
    log: bool = False,
    empty: str = "",
    note: str = "",
) -> Section:
    """`rows` hold one cell a column, None where there is nothing (`empty` is written there)."""
    scale = Scale.of((c.value for row in rows.values() for c in row if c), log)
    if scale is None:
        return sentences(title, "There are no values to draw.", note)
    head = f"<th scope=col>{escape(corner)}</th>"
    head += "".join(f"<th scope=col>{escape(c)}</th>" for c in columns)
    body = "".join(
        f"<tr><th scope=row>{breakable(name)}</th>"
        + "".join(_field(cell, scale, empty) for cell in row)
        + "</tr>"
        for name, row in rows.items()
    )
    kind = "heat fine" if len(columns) > WIDE else "heat"
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    shape = "logarithmic" if log and scale.low < scale.high else "linear"
    caption = f"<figcaption>{escape(unit)}, {shape} scale</figcaption>"
    key = f"<figure class=key>{caption}{scale_legend(scale, unit, say)}</figure>"
    return Section(title, key + scrolling(title, table) + paragraph(note))


def _field(cell: Cell | None, scale: Scale, empty: str) -> str:
    if cell is None:
        return f"<td class=none>{escape(empty)}</td>"
    rgb = colour(scale.share(cell.value))
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    return (
        f'<td class=cell{title} style="background:{hexadecimal(rgb)};color:{ink(rgb)}">'
        f"<span>{escape(cell.text)}</span>{small}</td>"
    )


def block_map(
    title: str,
    values: Mapping[str, float],
    unit: str,
    say: Callable[[float], str],
    *,
    log: bool = False,
    note: str = "",
) -> Section:
    """One value for each layer by name: kinds of layers down, blocks across, or a strip of all
    layers where the names tell of no blocks. Layers that share a place are averaged."""
    placed = grid(list(values))
    rows: dict[str, list[Cell | None]] = {}
    for kind, cells in placed.rows.items():
        rows[kind] = [_mean(names, values, say) if names else None for names in cells]
    several = any(len(names) > 1 for cells in placed.rows.values() for names in cells)
    more = "A cell of several layers shows their mean." if several else ""
    return heat_map(
        title, _corner(placed), placed.columns, rows, unit, say, log=log,
        note=" ".join(filter(None, (note, more))),
    )  # fmt: skip


def _corner(placed: Grid) -> str:
    what = "layer by block" if placed.blocks else "layer"
    return f"{what} in {placed.shared}" if placed.shared else what


def _mean(names: Sequence[str], values: Mapping[str, float], say: Callable[[float], str]) -> Cell:
    own = [values[name] for name in names]
    mean = sum(own) / len(own)
    title = f"{names[0]}: {say(mean)}"
    if len(own) > 1:
        title = f"{len(own)} layers as {names[0]}: {say(mean)}, {say(min(own))} to {say(max(own))}"
    return Cell(mean, say(mean), title=title)


def layer_map(title: str, reports: Mapping[str, Report], note: str = "") -> Section:
    """Heat map, layers down and reports across: error of each layer, bits per weight below it."""
    cells = {name: {layer.name: layer for layer in r.layers} for name, r in reports.items()}
    names = list(dict.fromkeys(n for column in cells.values() for n in column))
    if not names:
        return sentences(title, "No layer was compressed.", note)
    shared = common(names)
    rows = {
        below(name, shared): [
            _measured(column[name]) if name in column else None for column in cells.values()
        ]
        for name in names
    }
    return heat_map(
        title, f"layer in {shared}" if shared else "layer", list(cells), rows,
        "Relative squared error of a layer's output on calibration data (of the weight, where "
        "there was none)", percent, log=True, empty="dense", note=note,
    )  # fmt: skip


def _measured(layer: LayerReport) -> Cell:
    error = layer.error if layer.hessian_error is None else layer.hessian_error
    return Cell(error, percent(error), f"{layer.bits_per_weight:.2f} b/w")
