"""Layers whose weights are codes."""

from . import lora
from .linear import RBELinear

__all__ = ["RBELinear", "lora"]
