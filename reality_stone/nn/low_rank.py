"""The best low-rank term for an error, in the metric of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..feedback import Hessian
from .adapter import Adapter, in_half

OVERSAMPLING, PASSES = 16, 8  # of the subspace that finds the leading part


def start_at(adapter: Adapter, error: Tensor, hessian: Tensor | None, label: str = "") -> None:
    """Set A and B to the best approximation of `error` (out, in) that their rank allows.

    With `hessian` H = L L^T (in, in), tr D H D^T = |D L|^2 of what is left is least: the leading
    singular vectors of error L are cut out and L is undone. `label` names the layer in warnings.
    """
    prepared = Hessian.prepare(hessian, error.shape[1], label)
    lower = None
    if prepared is not None:
        lower = torch.linalg.cholesky(prepared.damped().double()).float().to(error.device)
        error = error @ lower
    u, s, v = leading(error, adapter.rank)
    root = (s / adapter.scale).sqrt()
    a = root[:, None] * v.t()
    if lower is not None:
        a = torch.linalg.solve_triangular(lower, a, upper=False, left=False)
    with torch.no_grad():
        adapter.a.copy_(in_half(a))
        adapter.b.copy_(in_half(u * root))


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triples by subspace iteration; the same every time."""
    width = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    for _ in range(PASSES):
        q = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ q).Q).Q
    u, s, v = torch.linalg.svd(matrix @ q, full_matrices=False)
    return u[:, :rank], s[:rank], (q @ v.t())[:, :rank]
