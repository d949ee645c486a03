"""Layers whose weights are codes."""

from . import lora
from .attention import KVCache, RBEAttention, Rotary
from .compressed import Compressed
from .conv1d import RBEConv1D
from .embedding import RBEEmbedding
from .experts import RBEExperts, fuse, unfuse
from .ffn import RBEFFN
from .linear import RBELinear
from .norm import RBELayerNorm, RBERMSNorm
from .trainable import TrainableRBELinear

# The kinds of compressed layers by their names in plans.
KINDS: dict[str, type[Compressed]] = {
    layer.kind: layer for layer in (RBELinear, RBEConv1D, RBEEmbedding, RBELayerNorm, RBERMSNorm)
}

__all__ = [
    "KINDS", "RBEFFN", "Compressed", "KVCache", "RBEAttention", "RBEConv1D", "RBEEmbedding",
    "RBEExperts", "RBELayerNorm", "RBELinear", "RBERMSNorm", "Rotary", "TrainableRBELinear", "fuse",
    "lora", "unfuse",
]  # fmt: skip
