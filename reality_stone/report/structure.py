"""Where a tensor stands in a model, read from its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

# The first that is found in a name decides.
GROUPS = {
    "norms": r"norm|(^|\.)ln(_|\d|\.|$)",
    "output head": r"(^|\.)(lm_head|embed_out|classifier|score|cls|head)(\.|$)",
    "embeddings": r"embed|(^|\.)(wte|wpe|shared)(\.|$)",
    "experts": r"experts?(\.|$)",
    "attention": r"attn|attention|(^|\.)[qkvo]_proj|(^|\.)(query|key|value)",
    "MLP": r"mlp|ffn|feed_?forward|intermediate|output\.dense"
    r"|(^|\.)((fc|gate|up|down)\w*|w[123])(\.|$)",
}


def group(name: str) -> str:
    """The part of a model that a tensor belongs to, "other" where its name does not tell."""
    low = name.lower()
    return next((g for g, pattern in GROUPS.items() if re.search(pattern, low)), "other")


def place(name: str) -> tuple[str, int | None]:
    """(kind, block): "h.3.mlp.experts.7.up" -> ("h.*.mlp.experts.*.up", 3). None without a
    number."""
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdecimal()]
    kind = ".".join("*" if part.isdecimal() else part for part in parts)
    return kind, numbers[0] if numbers else None


@dataclass(frozen=True)
class Grid:
    """Names in rows and columns: `rows` maps the kind to the names of each column.

    blocks: whether columns are blocks, otherwise there is one row of all names. shared: what the
    names have in common and rows and columns leave out.
    """

    columns: list[str]
    rows: dict[str, list[list[str]]]
    blocks: bool
    shared: str


def grid(names: Sequence[str]) -> Grid:
    """Kinds by blocks where any kind occurs in two blocks or more, else a strip."""
    places = {name: place(name) for name in names}
    kinds: dict[str, dict[int | None, list[str]]] = {}
    for name, (kind, block) in places.items():
        kinds.setdefault(kind, {}).setdefault(block, []).append(name)
    if not any(len(blocks) > 1 for blocks in kinds.values()):
        shared = common(list(names))
        return Grid([below(n, shared) for n in names], {"all": [[n] for n in names]}, False, shared)
    indices: list[int | None] = sorted({b for _, b in places.values() if b is not None})
    if any(b is None for _, b in places.values()):
        indices.append(None)  # layers outside the blocks
    shared = common([kind for kind in kinds if "*" in kind])
    rows = {
        below(kind, shared): [blocks.get(i, []) for i in indices] for kind, blocks in kinds.items()
    }
    return Grid(["outside" if i is None else str(i) for i in indices], rows, True, shared)


def common(names: list[str]) -> str:
    """The parts that all names begin with, but for the last part of each."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda x: len(set(x)) == 1, levels))


def below(name: str, shared: str) -> str:
    """A name without the parts in common."""
    return name[len(shared) + 1 :] if shared and name.startswith(f"{shared}.") else name
