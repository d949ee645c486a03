"""Layers whose weights are codes."""

from . import lora
from .compressed import Compressed
from .conv1d import RBEConv1D
from .experts import RBEExperts
from .linear import RBELinear
from .trainable import TrainableRBELinear

# The kinds of compressed layers by their names in plans.
KINDS: dict[str, type[Compressed]] = {layer.kind: layer for layer in (RBELinear, RBEConv1D)}

__all__ = [
    "KINDS", "Compressed", "RBEConv1D", "RBEExperts", "RBELinear", "TrainableRBELinear", "lora",
]  # fmt: skip
