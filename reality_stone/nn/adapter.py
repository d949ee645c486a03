"""The trainable low-rank term of a layer whose weight stays as it is (LoRA, Hu et al., 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Adapter(nn.Module):
    """x (..., in) -> (x A^T) B^T * alpha / rank, with A (rank, in) and B (out, rank) trained.

    A starts as nn.Linear's weight does and B at zero, so that a new adapter changes nothing.
    Computes in the dtype of x, which may be narrower than that of A and B. Raises ValueError on a
    rank below 1 or above what the shape can have, alpha not above 0, dropout outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_settings(rank, alpha, dropout)
        if rank > min(in_features, out_features):
            raise ValueError(
                f"an adapter of rank {rank} does not fit a layer of {out_features} x {in_features}"
            )
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.dropout = dropout
        self.a = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        # Names of the layer's own Parameters that were trained before; remove_lora brings it back.
        self.froze: tuple[str, ...] = ()
        if self.a.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """B A alpha / rank (out, in), float32, detached: what the adapter adds to the weight."""
        return self.b.detach().float() @ self.a.detach().float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(x, self.dropout, self.training)
        low = functional.linear(x, self.a.to(x.dtype)) * self.scale
        return functional.linear(low, self.b.to(x.dtype))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def attach(layer: nn.Module, adapter: Adapter) -> None:
    """Put an adapter on a compressed layer, whose own Parameters freeze."""
    own = {n: p for n, p in layer.named_parameters(recurse=False) if p.requires_grad}
    adapter.froze = tuple(own)
    for p in own.values():
        p.requires_grad_(False)
    layer.adapter = adapter.train(layer.training)


def detach(layer: nn.Module) -> None:
    """Take the adapter off; what it froze trains again."""
    for name, p in layer.named_parameters(recurse=False):
        if name in layer.adapter.froze:
            p.requires_grad_(True)
    layer.adapter = None


def in_half(p: Tensor) -> Tensor:
    """float16 values, where that moves the tensor by less than float16's own rounding of its
    larger entries: small ones beside them do not need all their digits."""
    half = p.half().to(p.dtype)
    near = (half - p).norm() <= 2.0**-11 * p.norm()
    return half if bool(near) else p


def check_settings(rank: int, alpha: float | None, dropout: float) -> None:
    """ValueError in one sentence on settings that no layer can have."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a whole number from 1, got {rank!r}")
    if alpha is not None and not (_is_number(alpha) and 0 < alpha < math.inf):
        raise ValueError(f"alpha must be positive and finite, got {alpha!r}")
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
