"""Layers whose weights are codes."""

from . import lora
from .compressed import Compressed
from .linear import RBELinear
from .trainable import TrainableRBELinear

# The kinds of compressed layers by their names in plans.
KINDS: dict[str, type[Compressed]] = {layer.kind: layer for layer in (RBELinear,)}

__all__ = ["KINDS", "Compressed", "RBELinear", "TrainableRBELinear", "lora"]
