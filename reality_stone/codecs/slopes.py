"""How T depends on the fields of its codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slopes:
    """A code's weights are factor * vectors[index], and their derivative by a field that is an
    amount by[field] * vectors[index].

    factor and each of by: (rows of T, codes of a row). index: the same, int64, of `bits` bits;
    vectors (n, weights of a code); None for codes of one weight that choose no vector.
    """

    factor: Tensor
    by: dict[str, Tensor]
    vectors: Tensor | None = None
    index: Tensor | None = None
    bits: int = 0
