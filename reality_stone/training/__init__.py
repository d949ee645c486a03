"""Training in the compressed state: tables and scales, and codes."""

from .tables import TrainingReport, finetune, table_parameters

__all__ = ["TrainingReport", "finetune", "table_parameters"]
