"""Reality Stone: trainable compressed layers for PyTorch."""

from . import reference  # noqa: F401  (registers the plain-torch kernels)
from .codecs import Codec, codec, codecs
from .ops import accuracy
from .packed import Packed

__version__ = "0.1.0"
__all__ = ["Codec", "Packed", "accuracy", "codec", "codecs"]
