"""ultra: 10-bit indices into 1024 vectors of four weights, and the largest errors as `sparse`.

Source: the documents' ultra-compressed layer: a codebook for the whole model, one transform a
layer, 2.5 bits a weight and the top percent of the errors, about 2.75 bits in all. Layout in
csrc/codecs/ultra.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..fitting import alternate, kmeans, row_sample
from ..metrics import squared_error
from ..packed import over_scale, round_to_half
from .base import Codec, Param, Tile, check_finite, check_weight, check_words, one_of, row_scale
from .fields import Field
from .residual import join, rest_params, split
from .sparse import Sparse

VECTORS = 1024
SAMPLE = 1 << 16  # weights that k-means starts from


@dataclass(frozen=True)
class Ultra(Codec):
    """codebook: one of the layer's own, or one for all layers of a model that `compress` fits to
    them together; percent: share of each row kept as the residual, 0 for none."""

    name: ClassVar[str] = "ultra"
    rates: ClassVar = {2.5: {"percent": 0}, 2.75: {}}
    refits: ClassVar = ("codebook",)
    codebook: str = one_of("layer", "model")
    percent: float = 1.0

    def __post_init__(self):
        check_words(self)
        if not (isinstance(self.percent, (int, float)) and 0 <= self.percent <= 100):
            raise ValueError(f"ultra: percent must be from 0 to 100, got {self.percent!r}")
        object.__setattr__(self, "percent", float(self.percent))

    @property
    def rest(self) -> Sparse:
        return Sparse(percent=self.percent)

    @property
    def plain(self):
        return not self.percent

    @property
    def common(self):
        return ("codebook",) if self.codebook == "model" else ()

    def tile(self, shape):
        return Tile(1, 16, 5)

    def fields(self, shape):
        return (Field("index", "index", 10, 4, stride=10, count=4),)

    def params(self, shape):
        own = (
            Param("codebook", (VECTORS, 4), "shared"),
            Param("transform", (1,), "shared", codes=True),
            Param("out_scale", (shape[0],), "out"),
        )
        return (*own, *rest_params(self.rest, shape)) if self.percent else own

    def initial_params(self, weight, seed, feedback=False, importance=None):
        # A codebook for a model is given to encode, or fitted there.
        codebook = torch.zeros(VECTORS, 4) if self.common else start(weight, seed)
        return {
            "codebook": codebook,
            "transform": torch.zeros(1, dtype=torch.uint8),
            "out_scale": row_scale(weight),
        }

    def fit_common(self, weights: Sequence[Tensor], seed: int = 0) -> dict[str, Tensor]:
        """One codebook for the rows of all `weights`, each layer counting by its size."""
        total = sum(w.numel() for w in weights)
        parts = []
        for w in weights:
            w = check_weight(w, self.name)
            check_finite(w, self.name)
            parts.append(vectors(w, max(64, SAMPLE * w.numel() // max(1, total))))
        rows = torch.cat(parts).flatten()
        rows = torch.nn.functional.pad(rows, (0, -len(rows) % 64)).view(-1, 64)
        alone = replace(self, codebook="layer", percent=0)
        params = alone.initial_params(rows, seed)
        return {"codebook": alternate(alone, rows, params, None, self.refits)["codebook"]}

    def encode(self, weight, hessian=None, outputs=None, *, seed=0, label="", given=None):
        weight = check_weight(weight, self.name)
        given = dict(given or {})
        if self.common and weight.numel():
            if "codebook" not in given:
                given |= self.fit_common([weight], seed)
            given["transform"] = self._best_transform(weight, given["codebook"])
        alone = replace(self, percent=0)
        base = super(Ultra, alone).encode(
            weight, hessian, outputs, seed=seed, label=label, given=given
        )
        if not self.percent:
            return base
        left = weight - base.decode()
        return join(self, base, self.rest.encode(left, hessian, seed=seed + 1, label=label))

    def _best_transform(self, weight: Tensor, codebook: Tensor) -> Tensor:
        """The transform that a sample of the layer's vectors errs least with."""
        points = vectors(weight, 1 << 14)
        errors = []
        for t in range(8):
            seen = transformed(codebook, t)
            nearest = (seen.pow(2).sum(1) / 2 - points @ seen.t()).argmin(1)
            errors.append(squared_error(seen[nearest], points))
        return torch.tensor([errors.index(min(errors))], dtype=torch.uint8)

    def decode_tiles(self, codes, params, shape):
        low, i = codes.long(), torch.arange(4, device=codes.device)
        index = (low[..., :4] | low[..., 1:] << 8) >> (2 * i) & 1023
        seen = transformed(params["codebook"], int(params["transform"]) & 7)
        return seen[index].flatten(1)

    def decode_reference(self, codes, params, shape):
        if not self.percent:
            return super().decode_reference(codes, params, shape)
        base, rest_codes, rest = split(params)
        return super().decode_reference(codes, base, shape) + self.rest.decode_reference(
            rest_codes, rest, shape
        )

    def encode_reference(self, target, importance, params):
        points = target.unflatten(1, (-1, 4))
        h = torch.ones_like(target[0]) if importance is None else importance
        h = h.view(-1, 4).expand_as(points).reshape(-1, 4)
        seen = transformed(params["codebook"], int(params["transform"]) & 7)
        index = []
        for p, weights in zip(points.reshape(-1, 4).split(4096), h.split(4096), strict=True):
            cost = weights @ (seen * seen).t() - 2 * (weights * p) @ seen.t()
            index.append(cost.argmin(1))
        index = torch.cat(index).view(target.shape[0], -1, 4)
        word = (index << torch.arange(0, 40, 10)).sum(-1)
        codes = (word[..., None] >> torch.arange(0, 40, 8)) & 255
        return codes.to(torch.uint8), params


def transformed(codebook: Tensor, transform: int) -> Tensor:
    """(1024, 4) as a layer with this transform sees it."""
    seen = codebook.roll(2, 1) if transform & 4 else codebook
    seen = seen.flip(1) if transform & 2 else seen
    return -seen if transform & 1 else seen


def vectors(weight: Tensor, limit: int) -> Tensor:
    """(n, 4): vectors of evenly spaced rows, each row divided by its root mean square."""
    rows = row_sample(weight, limit)
    rows = over_scale(rows, row_scale(rows)[:, None])
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).reshape(-1, 4)


def start(weight: Tensor, seed: int) -> Tensor:
    """Codebook (1024, 4) by k-means on a sample."""
    points = vectors(weight, SAMPLE) if weight.numel() else torch.zeros(0, 4)
    return round_to_half(kmeans(points, VECTORS, seed, rounds=4))
