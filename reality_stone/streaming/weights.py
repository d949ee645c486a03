"""The weights of a model that has none but while they are needed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn

from ..blocks import inside
from ..nn import Compressed
from .recipes import Recipe


class Weights:
    """A model without data that gets that of its modules from recipes, and loses it again."""

    def __init__(self, model: nn.Module, recipes: Mapping[str, Recipe]):
        self.model, self.recipes = model, recipes
        self._filled: dict[tuple[nn.Module, str], None] = {}

    def fill(self, module: nn.Module, path: str, recurse: bool = True) -> None:
        every = module.named_modules(prefix=path, remove_duplicate=False)
        for name, one in every if recurse else [(path, module)]:
            for places in (one._parameters, one._buffers):
                for own, tensor in places.items():
                    recipe = self.recipes.get(f"{name}.{own}" if name else own)
                    if tensor is None or recipe is None or (one, own) in self._filled:
                        continue
                    value = recipe.read().to(tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    places[own] = nn.Parameter(value, False) if is_parameter else value
                    self._filled[one, own] = None

    def drop(self, modules: Collection[nn.Module]) -> None:
        """Take the data away from those of these modules that were filled."""
        for module, own in [one for one in self._filled if one[0] in modules]:
            _without_data(module, own)
            del self._filled[module, own]

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """Within, a block has its weights."""
        block = self.model.get_submodule(name)
        dense = set(block.modules())
        self.fill(block, name)
        try:
            yield
        finally:
            self.drop(dense)
            for module in block.modules():
                if isinstance(module, Compressed):
                    for own in [*module._parameters, *module._buffers]:
                        _without_data(module, own)
            _trim()

    @contextmanager
    def around(self, names: Sequence[str]) -> Iterator[None]:
        """Within, modules outside the blocks get their weights when they are called."""

        def enter(name: str) -> Callable[..., None]:
            return lambda module, args: self.fill(module, name, recurse=False)

        outside = {
            module: name
            for name, module in self.model.named_modules()
            if not any(inside(name, block) for block in names)
        }
        handles = [m.register_forward_pre_hook(enter(name)) for m, name in outside.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.drop(outside)


def _trim() -> None:
    """Give memory back to the system that glibc keeps: a block leaves holes all over its heap."""
    with suppress(OSError, TypeError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _without_data(module: nn.Module, own: str) -> None:
    places = module._parameters if own in module._parameters else module._buffers
    tensor = places[own]
    if tensor is not None:
        empty = torch.empty_like(tensor, device="meta")
        places[own] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
