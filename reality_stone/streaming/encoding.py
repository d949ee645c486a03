"""Encoding matrices that are read as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..codecs import Codec
from ..codecs.base import check_finite
from ..packed import Packed
from .layout import Target
from .recipes import Recipe

SLAB = 1 << 20  # weights that are float32 at once where a codec takes rows one by one


def encode(target: Target, seed: int, given: Mapping[str, Tensor]) -> tuple[Packed, float]:
    """The matrix as compress would encode it, and |W - Q|^2 / |W|^2."""
    codec, weight = target.entry.codec, target.weight
    if rows_are_alone(codec, target.entry.shape):
        return _by_rows(codec, weight, seed + target.index)
    whole = weight.read().float()
    packed = codec.encode(whole, seed=seed + target.index, label=target.entry.name, given=given)
    decoded, rows = packed.decode(), _rows(whole.shape)
    return packed, _share(zip(decoded.split(rows), whole.split(rows), strict=True))


def rows_are_alone(codec: Codec, shape: tuple[int, int]) -> bool:
    """Whether the codes and params of some tile rows do not depend on the rest of the matrix."""
    own = all(p.axis == "both" or (p.axis, p.name) == ("out", "scale") for p in codec.params(shape))
    return own and codec.blocks(shape)[0] == 1 and not codec.refits


def _by_rows(codec: Codec, weight: Recipe, seed: int) -> tuple[Packed, float]:
    shape = (weight.shape[0], weight.shape[1])
    rows = _rows(shape, codec.tile(shape).rows)
    parts: list[Packed] = []
    errors: list[tuple[float, float]] = []
    for slab in weight.slabs(rows):
        if not bool(slab.isfinite().all()):
            check_finite(weight.read().float(), codec.name)
        parts.append(codec.encode(slab, seed=seed))
        errors.append(_squares(parts[-1].decode(), slab.float()))
    if not parts:
        return codec.encode(weight.read(), seed=seed), 0.0
    params = {name: torch.cat([p.params[name] for p in parts]) for name in parts[0].params}
    packed = Packed(codec, shape, torch.cat([p.codes for p in parts]), params)
    return packed, _ratio(errors)


def _rows(shape: Sequence[int], tile: int = 1) -> int:
    """Rows of a slab, whole tiles."""
    return max(1, SLAB // max(1, shape[1]) // tile) * tile


def _squares(decoded: Tensor, weight: Tensor) -> tuple[float, float]:
    error = (decoded - weight).pow_(2).sum(dtype=torch.float64)
    return error.item(), weight.pow(2).sum(dtype=torch.float64).item()


def _share(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    return _ratio([_squares(*pair) for pair in pairs])


def _ratio(squares: list[tuple[float, float]]) -> float:
    error, power = sum(e for e, _ in squares), sum(p for _, p in squares)
    return error / power if power else float(error != 0)


class Weights(Sequence[Tensor]):
    """Matrices of a checkpoint, each read when it is asked for."""

    def __init__(self, targets: Sequence[Target]):
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i):
        return self.targets[i].weight.read()


def common_tables(targets: Sequence[Target], seed: int) -> dict[str, Tensor]:
    """The tables that layers of a codec share, as compress fits them: "NUMBER OF CODEC.NAME"."""
    found: dict[str, Tensor] = {}
    for i, codec in enumerate(dict.fromkeys(t.entry.codec for t in targets)):
        if codec.common:
            own = Weights([t for t in targets if t.entry.codec == codec])
            tables = codec.fit_common(own, seed)
            found |= {f"{i}.{name}": table for name, table in tables.items()}
    return found


def given_tables(targets: Sequence[Target], tables: Mapping[str, Tensor]) -> dict[Codec, dict]:
    """common_tables by codec."""
    codecs = enumerate(dict.fromkeys(t.entry.codec for t in targets))
    return {c: {n: tables[f"{i}.{n}"] for n in c.common} for i, c in codecs}
