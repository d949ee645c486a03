"""Layers whose weights are codes."""

from .linear import RBELinear
from .trainable import TrainableRBELinear

__all__ = ["RBELinear", "TrainableRBELinear"]
