"""How the tensors of a model's state are made from those in the files of a dense checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import tensorfile
from ..tensorfile import Entry, Header


@dataclass(frozen=True)
class Recipe:
    """One tensor of the state, made of the tensors `parts`, which is one where `convert` is None.

    convert: the tensors of all parts -> {name in the state: tensor}. transposed: it is wanted with
    its two dimensions swapped.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Entry, ...]
    header: Header
    convert: Callable[[list[Tensor]], dict[str, Tensor]] | None = None
    transposed: bool = False

    @property
    def shard(self) -> Path:
        return self.parts[0].path

    def read(self) -> Tensor:
        tensors = [tensorfile.read_tensor(self.header, entry) for entry in self.parts]
        made = tensors[0] if self.convert is None else self.convert(tensors)[self.name]
        return made.t() if self.transposed else made

    def slabs(self, rows: int) -> Iterator[Tensor]:
        """Its rows, so many at a time."""
        if self.convert is not None or self.transposed:
            yield from self.read().split(rows)
            return
        entry = self.parts[0]
        tensorfile.check_digest(self.header, entry)
        with entry.path.open("rb") as file:
            for at in range(0, self.shape[0], rows):
                stop = min(at + rows, self.shape[0])
                yield tensorfile.read_rows(entry, at, stop, file)

    def chunks(self) -> Iterator[Any]:
        """Its bytes as they stand in the source."""
        if self.convert is not None:
            yield tensorfile.as_bytes(self.read())
            return
        tensorfile.check_digest(self.header, self.parts[0])
        yield from tensorfile.read_chunks(self.parts[0])
