"""Reality Stone: trainable compressed layers for PyTorch."""

from . import derivative, metrics, nn, optim, quantizers, reference  # noqa: F401  (reference registers kernels)
from .checkpoint import load, save
from .codecs import Codec, codec, codecs
from .compress import Report, compress, coverage
from .evaluate import Evaluation, evaluate, kl_divergence, perplexity
from .ops import accuracy
from .packed import Packed
from .plan import Plan, plan
from .registration import announce as _announce
from .swap import dequantize, replace
from .training import TrainingReport, finetune

__version__ = "0.1.0"
__all__ = [
    "Codec", "Evaluation", "Packed", "Plan", "RealityStoneConfig", "Report", "TrainingReport",
    "accuracy", "codec", "codecs", "compress", "coverage", "dequantize", "derivative", "evaluate",
    "finetune", "from_pretrained", "kl_divergence", "load", "metrics", "nn", "optim", "perplexity",
    "plan", "quantizers", "replace", "save",
]  # fmt: skip


def __getattr__(name: str):
    # Hugging Face code is imported only when asked for.
    if name == "from_pretrained":
        from .hf import from_pretrained

        return from_pretrained
    if name == "RealityStoneConfig":
        from .hf import quantization_config_class

        return quantization_config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_announce()
