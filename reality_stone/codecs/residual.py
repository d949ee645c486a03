"""residual: W = decode(base) + decode(rest), any two codecs, the second on what the first left.

Source: the residual compensation of the documents ("RBE-8"); layout in csrc/codecs/residual.h.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..packed import Packed
from .base import Codec, Param, check_weight
from .sparse import Sparse
from .trellis import Trellis


@dataclass(frozen=True)
class Residual(Codec):
    """clip: largest magnitude of the remainder that is kept, as a share of the weight's largest; 0
    keeps everything (the documents clamp at 0.1)."""

    name: ClassVar[str] = "residual"
    base: Codec = field(default_factory=Trellis)
    rest: Codec = field(default_factory=Sparse)
    clip: float = 0.0

    def __post_init__(self):
        for part in (self.base, self.rest):
            if not isinstance(part, Codec):
                raise ValueError(f"residual: base and rest must be codecs, got {part!r}")
            if not part.plain:
                raise ValueError(
                    f"residual: base and rest must be plain codecs, but {part.name} is a sum again"
                )
        if not (isinstance(self.clip, (int, float)) and 0 <= self.clip < 1e300):
            raise ValueError(f"residual: clip must be 0 or positive and finite, got {self.clip!r}")
        object.__setattr__(self, "clip", float(self.clip))

    @classmethod
    def at_bits(cls, bits):
        return cls(base=Trellis.at_bits(bits))

    @property
    def plain(self):
        return False

    @property
    def parts(self):
        return self.base, self.rest

    def tile(self, shape):
        return self.base.tile(shape)

    def fields(self, shape):
        return self.base.fields(shape)

    def slopes(self, codes, params, shape):
        return self.base.slopes(codes, split(params)[0], shape)

    def params(self, shape):
        return (*self.base.params(shape), *rest_params(self.rest, shape))

    def encode(self, weight, hessian=None, outputs=None, *, seed=0, label="", given=None) -> Packed:
        weight = check_weight(weight, self.name)
        base = self.base.encode(weight, hessian, outputs, seed=seed, label=label, given=given)
        left = weight - base.decode()
        if self.clip:
            bound = self.clip * weight.abs().max()
            left = left.clamp(-bound, bound)
        return join(self, base, self.rest.encode(left, hessian, seed=seed + 1, label=label))

    def decode_reference(self, codes, params, shape):
        base, rest_codes, rest = split(params)
        return self.base.decode_reference(codes, base, shape) + self.rest.decode_reference(
            rest_codes, rest, shape
        )

    def decode_tiles(self, codes, params, shape) -> Tensor:
        raise NotImplementedError("residual is two terms: see decode_reference")

    initial_params = encode_reference = decode_tiles


def rest_params(rest: Codec, shape: tuple[int, int]) -> tuple[Param, ...]:
    """What a second term adds to the params of the first: its codes, then its own."""
    tile = rest.tile(shape)
    codes = Param("rest_codes", (*tile.grid(shape), tile.bytes), "both", codes=True)
    own = [Param(f"rest_{p.name}", p.sizes, p.axis, p.codes) for p in rest.params(shape)]
    return (codes, *own)


def join(codec: Codec, base: Packed, rest: Packed) -> Packed:
    """The sum of two encoded matrices as one of `codec`."""
    params = base.params | {"rest_codes": rest.codes}
    params |= {f"rest_{name}": p for name, p in rest.params.items()}
    return Packed(codec, base.shape, base.codes, params)


def split(params: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """(params of the base, codes of the rest, params of the rest)."""
    rest = {k.removeprefix("rest_"): v for k, v in params.items() if k.startswith("rest_")}
    rest_codes = rest.pop("codes")
    return {k: v for k, v in params.items() if not k.startswith("rest_")}, rest_codes, rest
