"""Checkpoints larger than memory: compressed and decompressed tensor by tensor."""

from .calibrated import NeedsWholeModel
from .compress import compress_checkpoint
from .decompress import Decompressed, decompress_checkpoint

__all__ = ["Decompressed", "NeedsWholeModel", "compress_checkpoint", "decompress_checkpoint"]
