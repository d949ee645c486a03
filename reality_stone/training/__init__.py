"""Training in the compressed state: tables and scales, codes, adapters; and watching it."""

from .blockwise import ReconstructionReport, reconstruct
from .latent import finalize, latent, quantization_loss
from .loop import TrainingReport
from .lora import finetune_lora
from .monitor import Alert, Monitor, Reading
from .optimisers import renew
from .tables import finetune, table_parameters

__all__ = [
    "Alert", "Monitor", "Reading", "ReconstructionReport", "TrainingReport", "finalize",
    "finetune", "finetune_lora", "latent", "quantization_loss", "reconstruct", "renew",
    "table_parameters",
]  # fmt: skip
