"""Training in the compressed state: tables and scales, and codes."""

from .latent import finalize, latent, quantization_loss
from .tables import TrainingReport, finetune, table_parameters

__all__ = [
    "TrainingReport", "finalize", "finetune", "latent", "quantization_loss", "table_parameters",
]  # fmt: skip
