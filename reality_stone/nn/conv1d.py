"""RBEConv1D: the transposed linear layer of GPT-2 with its weight as codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .compressed import Compressed
from .linear import RBELinear


class RBEConv1D(RBELinear):
    """RBELinear in place of transformers' Conv1D, whose weight is (in, out).

    Codes are those of the transpose (out, in): both layers of a model read alike.
    """

    kind, dense_name = "conv1d", "transformers' Conv1D"

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        # By its looks: transformers is not imported for the sake of a question.
        weight = getattr(module, "weight", None)
        return (
            type(module).__name__ == "Conv1D"
            and not isinstance(module, Compressed)
            and isinstance(weight, Tensor)
            and weight.dim() == 2
            and getattr(module, "nf", None) == weight.shape[1]
        )

    @classmethod
    def dense_weight(cls, module: nn.Module) -> Tensor:
        return module.weight.t()

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """transformers' Conv1D with the decoded weight, an adapter added to it."""
        from transformers.pytorch_utils import Conv1D

        linear = self.to_linear(dtype)
        with torch.device("meta"):
            dense = Conv1D(self.out_features, self.in_features)
        dense.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        dense.bias = linear.bias
        return dense.train(self.training)
