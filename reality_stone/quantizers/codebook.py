"""Codebook: free levels that learn, and weights that commit to them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codecs.palette import lloyd
from .base import SAMPLE, Quantizer, cells
from .schedule import positive


class Codebook(Quantizer):
    """Learnable levels that start as Lloyd's for the weight.

    The value is the nearest level, its gradient goes to that level and, straight through, to the
    weight. The loss pulls levels to their weights, and weights to their levels `commitment` times
    as hard. Source: van den Oord et al., Neural Discrete Representation Learning, 2017.
    """

    def __init__(self, levels: int = 16, *, commitment: float = 0.25, per_row: bool = False):
        self.commitment = positive(commitment, "commitment")
        super().__init__(cells(levels), per_row, learned_centers=True)

    @property
    def mode(self) -> str:
        return "codebook"

    @property
    def temperature(self) -> float:
        return self.commitment

    def _measure(self, rows: Tensor, peak: Tensor) -> Tensor:
        size = rows.square().mean(1).sqrt()
        size = torch.where(size > 0, size, 1.0)
        unit = (rows / size[:, None]).flatten()
        unit = unit[:: max(1, len(unit) // (4 * SAMPLE))].cpu()
        self.centers.data.copy_(lloyd(unit, torch.ones_like(unit), self.levels))
        return size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, commitment={self.commitment:g}"
