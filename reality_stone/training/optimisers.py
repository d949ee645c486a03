"""What an optimiser holds of a layer, after the layer took another codec."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..nn import RBELinear


def table_params(layer: RBELinear) -> dict[str, nn.Parameter]:
    """The layer's scales and tables by name."""
    names = (spec.name for spec in layer.codec.params(layer.shape) if not spec.codes)
    return {name: getattr(layer, name) for name in names}


def renew(
    optimiser: torch.optim.Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
) -> None:
    """Put a layer's Parameters `after` a change of codec in place of those `before`, in the same
    groups; all of them start without state, which belonged to other codes. Names that are new join
    the group of the layer's first; nothing happens where the optimiser had none of the layer's."""
    groups = optimiser.param_groups
    old = {id(p): name for name, p in before.items()}
    home = next((g for g in groups if any(id(p) in old for p in g["params"])), None)
    if home is None:
        return
    for group in groups:
        kept = [(p, old.get(id(p))) for p in group["params"]]
        group["params"] = [
            p if name is None else after[name] for p, name in kept if name is None or name in after
        ]
    home["params"] += [p for name, p in after.items() if name not in before]
    for p in (*before.values(), *after.values()):
        optimiser.state.pop(p, None)
