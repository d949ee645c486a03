"""Making transformers know the method `reality_stone`, without importing transformers for it."""

from __future__ import annotations

import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

MODULE = "transformers.quantizers.auto"  # has the functions to register with


class _Waiting(MetaPathFinder):
    """Registers once MODULE has been imported, and is then gone from sys.meta_path."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader

        def exec_module(module: Any) -> None:
            del loader.exec_module  # the class's own again
            loader.exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_module
        return spec


def announce() -> None:
    """Register with transformers now if it is there, else as soon as it is imported."""
    if hasattr(sys.modules.get(MODULE), "register_quantizer"):
        _register()
    elif not any(type(finder).__name__ == _Waiting.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    try:
        from . import hf_quantizer
    except ImportError as error:
        warnings.warn(
            f"reality_stone: this transformers cannot load packed models ({error}): "
            "pip install 'transformers>=5.17'",
            stacklevel=2,
        )
    else:
        # Half-imported where it is itself what imports transformers; then it registers at its end.
        if hasattr(hf_quantizer, "register"):
            hf_quantizer.register()
