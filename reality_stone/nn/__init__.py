"""Layers whose weights are codes."""

from .linear import RBELinear

__all__ = ["RBELinear"]
