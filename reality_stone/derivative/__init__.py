"""Derivatives from the codes: of fields, of bits, and the moves that codes can make."""

from .moves import Move, moves, neighbours

__all__ = ["Move", "moves", "neighbours"]
