"""Training master weights towards codes: into the latent state and out of it."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec
from ..nn import RBELinear, TrainableRBELinear
from ..quantizers import Quantizer
from ..swap import swap_modules


def latent(
    model: nn.Module,
    codec: str | Codec | None = None,
    quantizer: Quantizer | Callable[[str], Quantizer] | None = None,
    *,
    requantize_every: int = 100,
    hessian: bool = False,
    skip: Sequence[str] = (),
) -> nn.Module:
    """Swap every nn.Linear and RBELinear of a model for TrainableRBELinear, in place.

    quantizer: one that each layer gets a copy of, or a function from the layer's name to one.
    codec: of all layers; by default the quantizer's, the layer's own, or "trellis". skip: name
    patterns that stay. Layers used twice stay one; a weight shared with another kind of module is
    a copy afterwards. Make the optimiser after this. ValueError when there is nothing to swap.

    >>> model = latent(nn.Sequential(nn.Linear(64, 32), nn.ReLU()), "uniform(bits=4)")
    """
    if isinstance(model, (nn.Linear, RBELinear)):
        raise ValueError("the model is itself the layer to swap: put it into a module first")
    settings: dict[str, Any] = {"requantize_every": requantize_every, "hessian": hessian}
    swaps: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, RBELinear)):
            continue
        if any(fnmatch.fnmatch(name, pattern) for pattern in skip):
            continue
        own = copy.deepcopy(quantizer) if isinstance(quantizer, Quantizer) else quantizer
        if own is not None and not isinstance(own, Quantizer):
            own = own(name)
        swaps[id(module)] = TrainableRBELinear.from_linear(module, codec, own, **settings)
    if not swaps:
        raise ValueError(
            "the model has no linear layers to train: all are skipped or of other kinds"
        )
    swap_modules(model, swaps)
    return model


def finalize(model: nn.Module) -> nn.Module:
    """Swap every TrainableRBELinear for the RBELinear of its final codes, in place.

    Optimisers still hold the master weights: drop them too. ValueError when there is none left.
    """
    layers = latent_layers(model)
    if not layers:
        raise ValueError("the model has no trainable layers to finalize: it is finalized already")
    swap_modules(model, {id(layer): layer.layer or layer.finalize() for layer in layers})
    return model


def quantization_loss(model: nn.Module, reduction: str = "mean") -> Tensor:
    """The layers' mean squared differences of master and quantized weight, to add to a loss.

    reduction: "mean" or "sum" over layers. Call it after the forward pass, whose quantization it
    uses. ValueError on a model without trainable layers.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    layers = latent_layers(model)
    if not layers:
        raise ValueError("the model has no trainable layers and so no quantization loss")
    losses = torch.stack([layer.quantization_loss() for layer in layers])
    return losses.mean() if reduction == "mean" else losses.sum()


def latent_layers(model: nn.Module) -> list[TrainableRBELinear]:
    """The model's trainable layers, shared ones once."""
    return [m for m in model.modules() if isinstance(m, TrainableRBELinear)]
