"""What the tests walk: every codec of the registry with the settings its fields allow.

Nothing here names a codec. Settings come from the types of a codec's fields, params from their
sizes, so a new codec is tested as soon as it is registered.
"""

import contextlib
import dataclasses
import functools
import itertools

import torch

import reality_stone as rs
from reality_stone import Codec, Packed, ops
from reality_stone.codecs import REGISTRY

NAMES = rs.codecs()
RATES = (1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
# Group-like sizes: zero (a mode of its own to some), one, odd, vector-sized, larger than a vector.
WHOLE_NUMBERS = (0, 1, 5, 32, 128)
# Smaller than a tile, one off, exactly one, padded on either side, several Hadamard blocks.
SHAPES = [(1, 1), (1, 17), (17, 1), (16, 16), (33, 50), (48, 1000), (1000, 48), (128, 256)]
EMPTY_SHAPES = [(0, 16), (16, 0), (0, 0), (0, 1), (1, 0)]


def isas() -> list[str]:
    """Every instruction set this processor has, slowest first."""
    order = ["generic", "avx2", "avx512"]
    return order[: order.index(ops._C.best_isa()) + 1]


def settings(name: str) -> list[Codec]:
    """The defaults, every rate, every flag either way, and each other field at a few values."""
    kind = REGISTRY[name]
    default = kind()
    found = [default, *(_try(kind.at_bits, bits) for bits in rates(kind))]
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name)
        if isinstance(value, bool):
            found += [
                _try(dataclasses.replace, c, **{field.name: not value}) for c in list(found) if c
            ]
        elif isinstance(value, Codec):
            others = [REGISTRY[n]() for n in NAMES]
            found += [_try(dataclasses.replace, default, **{field.name: o}) for o in others]
        elif "choices" in field.metadata:
            found += [
                _try(dataclasses.replace, c, **{field.name: word})
                for c in list(found)
                if c
                for word in field.metadata["choices"][1:]
            ]
        elif isinstance(value, (int, float)) and field.name != "bits":
            found += [_try(dataclasses.replace, default, **{field.name: v}) for v in WHOLE_NUMBERS]
    return list(dict.fromkeys(c for c in found if c is not None))


def few(name: str) -> list[Codec]:
    """The defaults, the lowest and highest rate, every other flag and word: for tests that
    encode."""
    kind = REGISTRY[name]
    default = kind()
    rated = [c for c in (_try(kind.at_bits, bits) for bits in rates(kind)) if c is not None]
    found = [default, rated[0], rated[-1]]
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name)
        if isinstance(value, bool):
            found.append(dataclasses.replace(default, **{field.name: not value}))
        for word in field.metadata.get("choices", ())[1:]:
            own = _try(dataclasses.replace, default, **{field.name: word})
            # A word may ask for other settings too: then the rate that has it.
            found.append(own or next((c for c in rated if getattr(c, field.name) == word), None))
    found = [c for c in found if c is not None]
    return list(dict.fromkeys(found))


def rates(kind: type[Codec]) -> list[float]:
    """Bits per weight to ask a codec for."""
    return sorted(kind.rates) or list(RATES)


def _try(make, *args, **kwargs):
    """A setting outside a codec's range is none of its settings."""
    with contextlib.suppress(ValueError):
        return make(*args, **kwargs)


ALL = [c for name in NAMES for c in settings(name)]
FEW = [c for name in NAMES for c in few(name)]
DEFAULTS = [REGISTRY[name]() for name in NAMES]


def one_term(codec: Codec) -> bool:
    """Whether the codec is more than a sum of others."""
    return len(ops.describe(codec.spec, (16, 32))) == 1


def spec(value) -> str | None:
    """A test's id."""
    return value.spec.replace(" ", "") if isinstance(value, Codec) else None


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def random_layer(codec: Codec, shape: tuple[int, int], seed: int = 0) -> Packed:
    """Any bytes as codes and any numbers as params: negative, and one in ten zero."""
    tile = codec.tile(shape)
    params = {}
    for i, p in enumerate(codec.params(shape)):
        if p.codes:
            params[p.name] = random_bytes(*p.sizes, seed=seed + i + 1)
        else:
            value = gaussian(*p.sizes, seed=seed + i + 1)
            params[p.name] = value * (gaussian(*p.sizes, seed=seed - i - 1) > -1.28)
    codes = random_bytes(*tile.grid(shape), tile.bytes, seed=seed)
    return Packed(codec, shape, codes, params)


@functools.cache
def encoded(codec: Codec, shape: tuple[int, int], seed: int = 0) -> Packed:
    """Gaussian weights through the encoder; shared between tests, so never to be written to."""
    return codec.encode(0.1 * gaussian(*shape, seed=seed))


def trained(packed: Packed, seed: int = 0) -> Packed:
    """As after some training: every param moved by a few percent, codes as they were."""
    params = {
        name: p * (1 + 0.05 * gaussian(*p.shape, seed=seed + i)) if p.is_floating_point() else p
        for i, (name, p) in enumerate(packed.params.items())
    }
    return dataclasses.replace(packed, params=params)


def values(packed: Packed) -> list[torch.Tensor]:
    return list(packed.params.values())


def arguments(packed: Packed) -> tuple:
    """(codes, params, codec, shape): what every op ends in."""
    return packed.codes, values(packed), packed.codec.spec, list(packed.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal float32 bits, signs of zeros included. A NaN's own bits are left open by IEEE 754."""
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (x.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.int32) for x in (a, b))
    return torch.equal(a, b)


def relative(got: torch.Tensor, want: torch.Tensor, scale: float = 0.0) -> float:
    """Frobenius norm of the difference over that of `want`, or over a larger `scale`."""
    got, want = got.double(), want.double()
    return ((got - want).norm() / max(want.norm().item(), scale, 1e-300)).item()


def nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return relative(got, want) ** 2


@contextlib.contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same contiguous values one element past an aligned address."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps along the last dimension."""
    return torch.stack((x, x), -1)[..., 0]


def pairs(*lists):
    return list(itertools.product(*lists))
