"""How far the layers of a packed model are from those of the dense one, each judged alone."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn

from .. import checkpoint, metrics, tensorfile
from ..blocks import first_output, inference
from ..nn import RBELinear
from .dense import DenseFiles


def weight_errors(directory: str | os.PathLike[str], dense: DenseFiles) -> dict[str, float]:
    """|W - Q|^2 / |W|^2 of each layer whose weight the dense files have, one decoded at a time."""
    opened = checkpoint.open_checkpoint(directory)
    header, found = opened.header, {}
    with header.path.open("rb") as file:
        for entry in opened.plan:
            weight = dense.weight(entry.name, entry.shape)
            if weight is None:
                continue
            names = checkpoint.stored_names(header, entry).values()
            tensors = {n: tensorfile.read_tensor(header, header.entries[n], file) for n in names}
            packed = checkpoint.check_layer(header, entry, tensors)
            found[entry.name] = metrics.nmse(packed.decode(), weight)
    return found


@torch.no_grad()
def output_errors(packed: nn.Module, dense: nn.Module, tokens: Tensor) -> dict[str, float]:
    """|y - y'|^2 / |y|^2 of each compressed layer, y = W x without bias, x the dense model's input.

    That is `metrics.hessian_nmse` with H = E[x x^T] over `tokens` (n, context), but H, which is
    (in, in), is never built. Layers that the dense model
    does not have or the tokens do not reach are left out.
    """
    sums: dict[str, tuple[float, float]] = {}

    def compare(name: str, layer: RBELinear):
        def see(module: nn.Module, args: tuple, output: Tensor) -> None:
            y, bias = first_output(output).float(), getattr(module, "bias", None)
            error = (layer(args[0]).float() - y).double().pow(2).sum().item()
            power = (y if bias is None else y - bias.float()).double().pow(2).sum().item()
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + error, before[1] + power

        return see

    there = dict(dense.named_modules())
    layers = {
        name: module
        for name, module in packed.named_modules()
        if isinstance(module, RBELinear) and name in there
    }
    handles = [
        there[name].register_forward_hook(compare(name, layer)) for name, layer in layers.items()
    ]
    try:
        with inference(dense), inference(packed):
            for part in tokens.split(4):
                dense(part)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: sums[name][0] / sums[name][1] if sums[name][1] else math.inf
        for name in layers
        if name in sums
    }
