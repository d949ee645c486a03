"""The page itself: sections of tables, facts and texts in one HTML file that loads nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .style import STYLE

FOLDED = 20  # rows; a longer table starts closed


@dataclass(frozen=True)
class Section:
    """A heading and the HTML under it."""

    title: str
    body: str


def html_report(
    path: str | os.PathLike[str], title: str, *sections: Section, lead: str = ""
) -> Path:
    """Write the page, whole or not at all, and return its path. `lead` is one paragraph of text."""
    path = check_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    opening = f"<p class=lead>{escape(lead)}</p>" if lead else ""
    body = "".join(f"<section><h2>{escape(s.title)}</h2>{s.body}</section>\n" for s in sections)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(
            "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
            '<meta name=viewport content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n<h1>{escape(title)}</h1>{opening}\n{body}</main>\n</body>\n</html>\n",
            encoding="utf-8",
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def check_page(path: str | os.PathLike[str]) -> Path:
    """The path to write a page to. Raises ValueError where `html_report` could not."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: this is a directory, a page is a file")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: nothing can be written in {parent}")
    return path


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> Section:
    """Rows of text, the first cell of each its name; a long table can be unfolded."""
    head = "".join(f"<th scope=col>{escape(c)}</th>" for c in columns)
    lines = "".join(
        f"<tr><th scope=row>{breakable(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    body = scrolling(title, grid) + paragraph(note)
    if len(rows) > FOLDED:
        body = f"<details><summary>{len(rows)} rows</summary>{body}</details>"
    return Section(title, body)


def facts(title: str, values: Mapping[str, str]) -> Section:
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items())
    return Section(title, f"<dl>{lines}</dl>")


def tiles(title: str, values: Iterable[tuple[str, str, str]]) -> Section:
    """The few numbers that matter most: (name, number, what it is beside)."""
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(number)}</b>{escape(beside)}</dd></div>"
        for name, number, beside in values
    )
    return Section(title, f"<dl class=tiles>{cards}</dl>")


def texts(title: str, prompt: str, continuations: Mapping[str, str], note: str = "") -> Section:
    """The same prompt (in bold) as each model goes on from it."""
    blocks = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>"
        f"<blockquote><p><b>{escape(prompt)}</b>{escape(text)}</p></blockquote></figure>"
        for name, text in continuations.items()
    )
    return Section(title, blocks + paragraph(note))


def sentences(title: str, *texts: str) -> Section:
    """A section of notes alone, one paragraph each."""
    return Section(title, "".join(map(paragraph, texts)))


def paragraph(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>" if text else ""


def scrolling(label: str, grid: str) -> str:
    # Focusable, so that a wide table can be scrolled from the keyboard.
    return f'<div class=scroll role=region tabindex=0 aria-label="{escape(label)}">{grid}</div>'


def breakable(name: str) -> str:
    """A dotted name that may be cut into lines after its dots."""
    return escape(name).replace(".", ".<wbr>")


def percent(value: float) -> str:
    """A share with three digits or so: 12.3 %, 1.23 %, 0.012 %."""
    if value >= 0.1:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.2f} %" if value >= 1e-3 else f"{100 * value:.2g} %"
