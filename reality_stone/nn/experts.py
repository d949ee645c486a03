"""Experts of a mixture, one module for each matrix instead of one tensor for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RBEExperts(nn.Module):
    """The fused experts of transformers >= 5 with an nn.Linear per expert and matrix.

    Those hold all experts in one parameter: `gate_up_proj` (E, 2 I, H), or `up_proj` (E, I, H)
    without a gate, and `down_proj` (E, H, I), all transposed in some models, with biases in some.
    Here they are nn.ModuleLists of layers that view the same memory, and compressed layers may
    take their places. Everything else of the fused module (activation, limits of its gate, a norm)
    is taken over.

    forward(hidden (T, H), index (T, k), weights (T, k)) -> (T, H) sums the experts of a token in
    the order of `index`; an index of E or above stands for no expert.
    """

    origin: type[nn.Module]  # the class of the fused module
    num_experts: int
    down_proj: nn.ModuleList

    def __init__(self, fused: nn.Module):
        super().__init__()
        if not self.replaces(fused):
            raise ValueError(f"{type(fused).__name__} holds no fused experts of a known layout")
        self.origin = type(fused)
        _carry(fused, self)
        self.train(fused.training)
        for name in self.matrices:
            weight, bias = fused._parameters[name], fused._parameters.get(f"{name}_bias")
            self._parameters.pop(f"{name}_bias", None)
            setattr(self, name, nn.ModuleList(self._layers(weight, bias)))

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether a module holds fused experts of a known layout.

        That is a class under transformers' `use_experts_implementation`, which says its layout in
        attributes, with a forward that was not changed on the instance.
        """
        if not all(hasattr(module, key) for key in ("has_gate", "has_bias", "is_transposed")):
            return False
        if isinstance(module, RBEExperts) or "forward" in vars(module):
            return False
        weights = [module._parameters.get(name) for name in _matrices(module)]
        if not all(w is not None and w.dim() == 3 for w in weights):
            return False
        biases = [module._parameters.get(f"{name}_bias") for name in _matrices(module)]
        return all((b is not None) == module.has_bias for b in biases)

    @property
    def matrices(self) -> tuple[str, str]:
        """Names of the two lists of layers, the one that reads the hidden states first."""
        return _matrices(self)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        slots = index.numel()  # (token, choice) pairs
        order, parts = [], []
        for expert, rows in enumerate(self.slots(index)):
            if rows.numel():
                order.append(rows)
                parts.append(self.expert(expert, hidden[rows // index.shape[1]]))
        if not parts:
            return torch.zeros_like(hidden)
        found = torch.cat(parts) * weights.reshape(-1)[torch.cat(order), None]
        placed = found.new_zeros(slots, found.shape[1]).index_copy(0, torch.cat(order), found)
        return placed.view(*index.shape, -1).sum(1).to(hidden.dtype)

    def expert(self, number: int, x: Tensor) -> Tensor:
        """One expert on its own rows (n, H), before the weights of the router."""
        first, second = (getattr(self, name)[number] for name in self.matrices)
        y = second(self.activate(first(x)))
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def activate(self, x: Tensor) -> Tensor:
        """Between the two matrices: the gate of the fused class, or its activation."""
        return self.origin._apply_gate(self, x) if self.has_gate else self.act_fn(x)

    def slots(self, index: Tensor) -> tuple[Tensor, ...]:
        """For each expert the places of `index`, flat and in order, that chose it."""
        chosen = index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()
        return order[: sum(counts)].split(counts)

    def fused(self) -> nn.Module:
        """The fused module with copies of the weights. ValueError unless every layer is dense."""
        if not _is_dense(self):
            raise ValueError(f"{self.origin.__name__} has layers that are compressed or wrapped")
        module = self.origin.__new__(self.origin)
        nn.Module.__init__(module)
        _carry(self, module)
        del module.origin
        module.train(self.training)
        for name in self.matrices:
            layers = list(module._modules.pop(name))
            weights = torch.stack([layer.weight.detach() for layer in layers])
            weights = weights.mT.contiguous() if self.is_transposed else weights
            trains = any(layer.weight.requires_grad for layer in layers)
            setattr(module, name, nn.Parameter(weights, requires_grad=trains))
            if self.has_bias:
                bias = torch.stack([layer.bias.detach() for layer in layers])
                setattr(module, f"{name}_bias", nn.Parameter(bias, requires_grad=trains))
        return module

    def _layers(self, weight: Tensor, bias: Tensor | None) -> Iterator[nn.Linear]:
        """A layer on each expert's part of the fused tensors."""
        parts = weight.detach().mT if self.is_transposed else weight.detach()
        for expert, part in enumerate(parts):
            with torch.device("meta"):
                layer = nn.Linear(*part.shape[::-1], bias=bias is not None)
            layer.weight = nn.Parameter(part, requires_grad=weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach()[expert], requires_grad=bias.requires_grad)
            yield layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.origin.__name__}, num_experts={self.num_experts}"


def _matrices(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


_OWN = frozenset(vars(nn.Module()))  # what every module has


def _carry(source: nn.Module, target: nn.Module) -> None:
    """Share attributes, modules, buffers and parameters, but not the fused matrices."""
    target.__dict__.update({k: v for k, v in vars(source).items() if k not in _OWN})
    for places in ("_parameters", "_buffers", "_modules"):
        getattr(target, places).update(getattr(source, places))
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    for name in _matrices(source):
        target._parameters.pop(name, None)


# --- models ---


def unfuse(model: nn.Module) -> nn.Module:
    """Give every expert of a known layout its own layers, in place and without a copy.

    `fuse` goes back. The model computes what it did, within the rounding of a sum of floats.
    """
    swap_modules(model, {id(old): new for old, new in _pairs(model)})
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Put experts of which every layer is dense back into one tensor for all, in place."""
    swap_modules(model, {id(m): m.fused() for m in model.modules() if _is_dense(m)})
    return model


@contextmanager
def unfused(model: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """Within, fused experts have layers of their own; `names`: only those that hold one of these.

    On leaving, experts of which no layer became compressed are again the module they were.
    """
    pairs = _pairs(model, names)
    swap_modules(model, {id(old): new for old, new in pairs})
    try:
        yield
    finally:
        swap_modules(model, {id(new): old for old, new in pairs if _is_dense(new)})


def _pairs(
    model: nn.Module, names: Collection[str] | None = None
) -> list[tuple[nn.Module, RBEExperts]]:
    """Fused experts and what stands for them."""
    return [
        (module, RBEExperts(module))
        for name, module in model.named_modules()
        if RBEExperts.replaces(module)
        and (names is None or any(n.startswith(f"{name}.") for n in names))
    ]


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, RBEExperts) and all(
        type(layer) is nn.Linear for name in module.matrices for layer in getattr(module, name)
    )


def swap_modules(model: nn.Module, swaps: dict[int, nn.Module]) -> None:
    """Everywhere a module hangs, so that layers used twice stay one."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in swaps:
                parent._modules[name] = swaps[id(child)]
