"""Layers whose weights are codes."""

from . import lora
from .linear import RBELinear
from .trainable import TrainableRBELinear

__all__ = ["RBELinear", "TrainableRBELinear", "lora"]
