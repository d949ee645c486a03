"""The sizes a codec comes in, and the next one up or down."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress

from ..codecs import Codec

RATES = [half / 2 for half in range(2, 17)]  # asked of codecs that have a setting `bits`


def next_rate(codec: Codec, shape: tuple[int, int], up: bool) -> Codec | None:
    """The codec at the nearest size above or below its own, its other settings kept."""
    now = stored_bits(codec, shape)
    sizes = {stored_bits(c, shape): c for c in reversed(_rates(codec))}
    beyond = [size for size in sizes if (size > now if up else size < now)]
    return sizes[min(beyond) if up else max(beyond)] if beyond else None


def _rates(codec: Codec) -> list[Codec]:
    fields = {f.name: f for f in dataclasses.fields(codec)}
    inner = next((n for n in fields if isinstance(getattr(codec, n), Codec)), None)
    if not codec.rates and inner is not None:
        return [dataclasses.replace(codec, **{inner: c}) for c in _rates(getattr(codec, inner))]
    found = []
    turned = {key for settings in codec.rates.values() for key in settings}
    for bits in sorted(codec.rates) or RATES:
        with suppress(ValueError):
            settings = {key: fields[key].default for key in turned} | codec.rates.get(bits, {})
            if settings or "bits" in fields:
                found.append(dataclasses.replace(codec, **(settings or {"bits": bits})))
            else:
                found.append(codec.at_bits(bits))
    return found


def stored_bits(codec: Codec, shape: tuple[int, int]) -> int:
    """Bits of codes and params of such a weight, with params in float16."""
    tile, params = codec.tile(shape), codec.params(shape)
    codes = math.prod(tile.grid(shape)) * tile.bytes * 8
    return codes + sum(math.prod(p.sizes) * (8 if p.codes else 16) for p in params)
