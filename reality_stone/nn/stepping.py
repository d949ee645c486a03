"""What a layer does once a training step, as an op: a compiled graph may hold it, opaque, in order.

Python that counts, reads gradients and encodes cannot be traced; a call of it by key can.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor


class Stepping(Protocol):
    """A layer with buffers that `_begin` may write."""

    def _begin(self, x: Tensor) -> None: ...
    def _written(self) -> list[Tensor]: ...


_layers: weakref.WeakValueDictionary[int, Stepping] = weakref.WeakValueDictionary()
_keys = itertools.count()


def enrol(layer: Stepping) -> Tensor:
    """The layer's key. A tensor, since a number would be compiled in, for each layer anew."""
    key = next(_keys)
    _layers[key] = layer
    return torch.tensor(key, device="cpu")


@torch.library.custom_op(
    "reality_stone::begin",
    mutates_args=("written",),
    schema="(Tensor x, Tensor key, Tensor(a!)[] written) -> ()",
)
def begin(x, key, written):
    """`layer._begin(x)` of the layer with this key; `written` are its `_written()` tensors."""
    layer = _layers[key.item()]
    layer._begin(x)
    # A graph may have handed over copies, which it will write back.
    for theirs, own in zip(written, layer._written(), strict=True):
        if theirs.data_ptr() != own.data_ptr():
            theirs.copy_(own)


@begin.register_fake
def _(x, key, written):
    return None
