"""Training in the compressed state: tables and scales, codes, adapters; and watching it."""

from .lora import finetune_lora
from .monitor import Alert, Monitor, Reading
from .optimisers import renew
from .tables import TrainingReport, finetune, table_parameters

__all__ = [
    "Alert", "Monitor", "Reading", "TrainingReport", "finetune", "finetune_lora",
    "renew", "table_parameters",
]  # fmt: skip
