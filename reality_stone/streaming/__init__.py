"""Checkpoints larger than memory: compressed and decompressed tensor by tensor."""

from .compress import compress_checkpoint
from .decompress import Decompressed, decompress_checkpoint
from .layout import NeedsWholeModel

__all__ = ["Decompressed", "NeedsWholeModel", "compress_checkpoint", "decompress_checkpoint"]
