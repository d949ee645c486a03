"""The safetensors files of a dense model, read one tensor at a time."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from .. import shards, tensorfile


class DenseFiles:
    """All files of a directory, one or as many as its index names; headers alone are kept."""

    def __init__(self, directory: str | os.PathLike[str]):
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: there is no such directory")
        self.header = shards.read(directory)

    def sizes(self) -> dict[str, int]:
        """{tensor: bytes}."""
        return {name: entry.bytes for name, entry in self.header.entries.items()}

    def weight(self, layer: str, shape: tuple[int, int]) -> Tensor | None:
        """The weight (out, in) of a layer as stored; None where none of that size has its name.

        A base model's file leaves out the first part of a name. A weight stored as (in, out), as
        those of GPT-2 are, is turned; where it is square, that cannot be told.
        """
        name = f"{layer}.weight" if layer else "weight"
        for own in (name, name.partition(".")[2]):
            entry = self.header.entries.get(own)
            if (
                entry is None
                or not entry.dtype.is_floating_point
                or sorted(entry.shape) != sorted(shape)
            ):
                continue
            found = tensorfile.read_tensor(self.header, entry).float()
            return found if found.shape == shape else found.t()
        return None
