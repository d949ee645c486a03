"""Derivatives from the codes: of their phases by tables, of their fields, of their bits, and the
moves that codes can make."""

from .boolean import bit_partial, boolean_derivative, delta
from .engine import LAYOUTS, bit_derivative, chain, euler, rotate
from .gradients import FieldGradients, field_gradient, field_gradient_from
from .moves import Move, moves, neighbours

__all__ = [
    "LAYOUTS", "FieldGradients", "Move", "bit_derivative", "bit_partial", "boolean_derivative",
    "chain", "delta", "euler", "field_gradient", "field_gradient_from", "moves", "neighbours",
    "rotate",
]  # fmt: skip
