"""Seeing what a layer's weight is asked to become: its inputs and the gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


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


def watch(module: nn.Module, see: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call `see` in every backward through a module of any kind, until the handle is removed.

    A module whose output needs no gradient starts the graph there: nothing before it is
    differentiated for its sake.
    """

    def hook(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if not torch.is_grad_enabled():
            return None
        y = output if isinstance(output, Tensor) else output[0]
        y = y if y.requires_grad else y.detach().requires_grad_()
        y = Observe.apply(y, args[0], see)
        return y if isinstance(output, Tensor) else (y, *output[1:])

    return module.register_forward_hook(hook)
