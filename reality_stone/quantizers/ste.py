"""STE: rounding forward, the identity backward."""

from __future__ import annotations

import torch

from .base import Quantizer, count


class STE(Quantizer):
    """Equally spaced levels; the gradient passes as if nothing had been rounded.

    levels: 2 to 256. zero: the levels are the integers -levels//2 and up, as in LSQ; without it
        zero is midway between two levels, which suits very few levels better.
    learned: the step is a parameter, with LSQ's gradient and gradient scale; per_row: one per row.
    attenuated: beyond half a step past the outer levels the gradient fades as exp(-10 * distance),
        the distance counted in steps; else it is zero there.

    Where LSQ clips at the outer levels themselves, the range here includes the halves of their
    cells beyond them: at four levels a quarter of all weights would get no gradient otherwise.
    Source: Bengio et al., 2013; Esser et al., Learned Step Size Quantization, 2020.

    >>> STE(levels=4)(torch.randn(8, 16)).weight.unique().numel() <= 4
    True
    """

    def __init__(
        self,
        levels: int = 16,
        *,
        zero: bool = True,
        learned: bool = True,
        per_row: bool = False,
        attenuated: bool = False,
    ):
        self.learned_scale, self.attenuated = bool(learned), bool(attenuated)
        grid = torch.arange(count(levels)).float()
        super().__init__(grid - (levels // 2 if zero else (levels - 1) / 2), per_row)

    @property
    def mode(self) -> str:
        return "attenuated" if self.attenuated else "ste"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learned={self.learned_scale}, attenuated={self.attenuated}"
