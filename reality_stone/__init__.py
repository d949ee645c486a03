"""Reality Stone: trainable compressed layers for PyTorch."""

from . import metrics, nn, reference  # noqa: F401  (reference registers the plain-torch kernels)
from .codecs import Codec, codec, codecs
from .compress import Report, compress
from .evaluate import Evaluation, evaluate, kl_divergence, perplexity
from .ops import accuracy
from .packed import Packed
from .training import TrainingReport, finetune

__version__ = "0.1.0"
__all__ = ["Codec", "Evaluation", "Packed", "Report", "TrainingReport", "accuracy", "codec", "codecs", "compress",
           "evaluate", "finetune", "kl_divergence", "metrics", "nn", "perplexity"]
