"""Seeing what a layer's weight is asked to become: its inputs and the gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Observe(torch.autograd.Function):
    """The identity on y; its backward calls `see(x, dLoss/dy)`, both (tokens, features) matrices.

    Nothing is kept but x, which the layer's own backward keeps too.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.see = see
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        ctx.see(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
        return grad, None, None
