"""How the tensors of a model's state are made from those in the files of a dense checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import tensorfile
from ..tensorfile import Entry, Header


@dataclass(frozen=True)
class Recipe:
    """One tensor of the state, made of the tensors `parts`, which is one where `convert` is None.

    convert: the tensors of all parts -> {`name`: what they make, and others}. number: it is that
    index of the first dimension of what is made. transposed: then its two dimensions are swapped.
    shape: in the end.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Entry, ...]
    header: Header
    convert: Callable[[list[Tensor]], dict[str, Tensor]] | None = None
    number: int | None = None
    transposed: bool = False

    @property
    def shard(self) -> Path:
        return self.parts[0].path

    def read(self) -> Tensor:
        if self.convert is not None:
            tensors = [tensorfile.read_tensor(self.header, entry) for entry in self.parts]
            made = self.convert(tensors)[self.name]
            made = made if self.number is None else made[self.number]
        elif self.number is not None:
            tensorfile.check_digest(self.header, self.parts[0])
            with self.parts[0].path.open("rb") as file:
                number = self.number
                made = tensorfile.read_rows(self.parts[0], number, number + 1, file)[0]
        else:
            made = tensorfile.read_tensor(self.header, self.parts[0])
        return made.t() if self.transposed else made

    @property
    def _plain(self) -> bool:
        return self.convert is None and self.number is None and not self.transposed

    def slabs(self, rows: int) -> Iterator[Tensor]:
        """Its rows, so many at a time."""
        if not self._plain:
            yield from self.read().split(rows)
            return
        entry = self.parts[0]
        tensorfile.check_digest(self.header, entry)
        with entry.path.open("rb") as file:
            for at in range(0, self.shape[0], rows):
                stop = min(at + rows, self.shape[0])
                yield tensorfile.read_rows(entry, at, stop, file)

    def chunks(self) -> Iterator[Any]:
        """Its bytes; where nothing is done to it, as they stand in the source."""
        if not self._plain:
            yield tensorfile.as_bytes(self.read())
            return
        tensorfile.check_digest(self.header, self.parts[0])
        yield from tensorfile.read_chunks(self.parts[0])

    def at(self, number: int, transposed: bool) -> Recipe:
        """One index of the first dimension, its own two dimensions swapped where asked for."""
        shape = self.shape[1:][::-1] if transposed else self.shape[1:]
        return replace(self, number=number, transposed=transposed, shape=shape)

    def swapped(self) -> Recipe:
        return replace(self, transposed=not self.transposed, shape=self.shape[::-1])
