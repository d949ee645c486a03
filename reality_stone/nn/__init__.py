"""Layers whose weights are codes."""

from . import lora
from .attention import KVCache, RBEAttention, Rotary
from .compressed import Compressed
from .embedding import RBEEmbedding
from .ffn import RBEFFN
from .linear import RBELinear
from .norm import RBELayerNorm, RBERMSNorm
from .trainable import TrainableRBELinear

# The kinds of compressed layers by their names in plans.
KINDS: dict[str, type[Compressed]] = {
    layer.kind: layer for layer in (RBELinear, RBEEmbedding, RBELayerNorm, RBERMSNorm)
}

__all__ = [
    "KINDS",
    "RBEFFN",
    "Compressed",
    "KVCache",
    "RBEAttention",
    "RBEEmbedding",
    "RBELayerNorm",
    "RBELinear",
    "RBERMSNorm",
    "Rotary",
    "TrainableRBELinear",
    "lora",
]
