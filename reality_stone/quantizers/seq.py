"""SEQ: stretched elastic quantization, for two bits and ternary weights."""

from __future__ import annotations

from .base import Quantizer, cells


class SEQ(Quantizer):
    """3 or 4 levels in the middles of equal cells of [-scale, scale], with a learned scale.

    At such rates a level at zero is dear: the levels +-1/4 and +-3/4 (or 0 and +-2/3) share the
    range evenly. The gradients are LSQ's, clipped at +-scale. The paper starts from the largest
    weight of a row; here from the scale of least error, which is at most that.
    Source: Liu et al., ParetoQ, 2025.
    """

    learned_scale = True

    def __init__(self, levels: int = 4, *, per_row: bool = True):
        if levels not in (3, 4):
            raise ValueError(f"levels of SEQ must be 3 or 4, got {levels!r}")
        super().__init__(cells(levels), per_row)

    @property
    def mode(self) -> str:
        return "ste"
