"""Learnable quantizers: modules from a dense weight to (soft weight, codes, loss)."""

from .base import Quantizer
from .codebook import Codebook
from .formulas import MODES, Quantized, quantize
from .gumbel import Gumbel
from .schedule import TauSchedule
from .seq import SEQ
from .ste import STE

__all__ = [
    "MODES", "SEQ", "STE", "Codebook", "Gumbel", "Quantized", "Quantizer", "TauSchedule",
    "quantize",
]  # fmt: skip
