"""The registry of codecs: `codec("trellis", bits=2)`, `codec("uniform(bits=4, group=128)")`."""

from __future__ import annotations

import ast
import functools
import warnings
from typing import Any

from .. import ops
from .adaptive_precision import AdaptivePrecision
from .base import Codec, Param, Tile
from .bitfield import Bitfield
from .block_sparse import BlockSparse
from .cyclic import Cyclic
from .cyclic_scalar import CyclicScalar
from .hierarchical import Hierarchical
from .hybrid import Hybrid
from .palette import Palette
from .residual import Residual
from .seed64 import Seed64
from .sparse import Sparse
from .trellis import Trellis
from .ultra import Ultra
from .uniform import Uniform
from .vq_cyclic import VqCyclic

REGISTRY: dict[str, type[Codec]] = {
    c.name: c
    for c in (
        AdaptivePrecision,
        Bitfield,
        BlockSparse,
        Cyclic,
        CyclicScalar,
        Hierarchical,
        Hybrid,
        Palette,
        Residual,
        Seed64,
        Sparse,
        Trellis,
        Ultra,
        Uniform,
        VqCyclic,
    )
}

LONGEST_TEXT = 1000  # Python's parser recurses: files must not be able to exhaust it

__all__ = [
    "REGISTRY",
    "AdaptivePrecision",
    "Bitfield",
    "BlockSparse",
    "Codec",
    "Cyclic",
    "CyclicScalar",
    "Hierarchical",
    "Hybrid",
    "Palette",
    "Param",
    "Residual",
    "Seed64",
    "Sparse",
    "Tile",
    "Trellis",
    "Ultra",
    "Uniform",
    "VqCyclic",
    "codec",
    "codecs",
    "from_config",
]


def codecs() -> list[str]:
    """Names of all codecs."""
    return sorted(REGISTRY)


def codec(name: str | Codec, **settings: Any) -> Codec:
    """A codec from its name and settings, or from its text form.

    >>> codec("trellis", bits=2).spec
    'trellis(bits=2, rotate=True, search=exact)'
    """
    if isinstance(name, Codec):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a codec is a name or a Codec, got {type(name).__name__}")
    if "(" in name:
        if settings:
            raise ValueError(
                f"give settings either in the text or as arguments, not both: {name!r}"
            )
        return _parse(name)
    kind = _kind(name)
    try:
        return kind(**settings)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def from_config(config: dict[str, Any]) -> Codec:
    """The codec that `to_config` wrote. ValueError on an unknown name, version or setting."""
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise ValueError(f"a codec's configuration is an object with a name, got {config!r}")
    kind = _kind(config["name"])
    if config.get("version") != kind.version:
        raise ValueError(
            f"{kind.name}: version {config.get('version')!r} is not known to this release, which "
            f"reads version {kind.version}; a newer reality-stone may"
        )
    settings = {k: v for k, v in config.items() if k not in ("name", "version")}
    nested = {k: from_config(v) if isinstance(v, dict) else v for k, v in settings.items()}
    return codec(kind.name, **nested)


def _kind(name: str) -> type[Codec]:
    if name not in REGISTRY:
        raise ValueError(f"unknown codec {name[:200]!r}, this release has {', '.join(codecs())}")
    return REGISTRY[name]


def _parse(text: str) -> Codec:
    wrong = f"codec {text[:200]!r} is not of the form name(key=value, ...)"
    try:
        if len(text) > LONGEST_TEXT:
            raise SyntaxError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's own parser, about odd literals
            node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(wrong) from None
    try:
        found = _from_node(node)
    except (SyntaxError, TypeError, AttributeError):
        raise ValueError(wrong) from None
    if not isinstance(found, Codec):
        raise ValueError(wrong)
    return found


def _from_node(node: ast.AST) -> Any:
    if isinstance(node, ast.Call):
        if node.args or not isinstance(node.func, ast.Name):
            raise SyntaxError
        return codec(node.func.id, **{k.arg: _from_node(k.value) for k in node.keywords})
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise SyntaxError from None


ops.set_codec_parser(functools.lru_cache(maxsize=4096)(_parse))
