"""The safetensors files of a dense model, read one tensor at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from .. import checkpoint, tensorfile
from ..tensorfile import Header


class DenseFiles:
    """All files of a directory, one or as many as its index names; headers alone are kept."""

    def __init__(self, directory: str | os.PathLike[str]):
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: there is no such directory")
        self.headers = [tensorfile.read_header(path) for path in _files(directory)]
        self.places: dict[str, Header] = {
            name: header for header in self.headers for name in header.entries
        }

    def sizes(self) -> dict[str, int]:
        """{tensor: bytes}."""
        return {name: header.entries[name].bytes for name, header in self.places.items()}

    def weight(self, layer: str, shape: tuple[int, int]) -> Tensor | None:
        """The weight (out, in) of a layer as stored; None where none of that size has its name.

        A base model's file leaves out the first part of a name. A weight stored as (in, out), as
        those of GPT-2 are, is turned; where it is square, that cannot be told.
        """
        name = f"{layer}.weight" if layer else "weight"
        for own in (name, name.partition(".")[2]):
            header = self.places.get(own)
            if header is None:
                continue
            entry = header.entries[own]
            if not entry.dtype.is_floating_point or sorted(entry.shape) != sorted(shape):
                continue
            with header.path.open("rb") as file:
                found = tensorfile.read_tensor(header, entry, file).float()
            return found if found.shape == shape else found.t()
        return None


def _files(directory: Path) -> list[Path]:
    one = directory / checkpoint.WEIGHTS
    index = directory / f"{checkpoint.WEIGHTS}.index.json"
    if one.exists() or not index.exists():
        return [one]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: this index cannot be read: {error}") from None
    # A name with a folder in it could lead out of the directory.
    if not names or not all(isinstance(n, str) and _is_plain(n) for n in names):
        raise ValueError(f"{index}: an index names safetensors files of its own directory")
    return [directory / name for name in sorted(names)]


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and name == Path(name).name
