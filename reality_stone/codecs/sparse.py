"""sparse: the largest weights of each row as int8 against one scale per row; the rest is zero.

Meant as the second part of `residual`. Layout in csrc/codecs/sparse.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..feedback import Hessian
from ..packed import round_to_half
from .base import Codec, Param, Tile, check_weight


@dataclass(frozen=True)
class Sparse(Codec):
    """percent: share of each row that is kept, above 0 and at most 100."""

    name: ClassVar[str] = "sparse"
    percent: float = 1.0

    def __post_init__(self):
        if not (isinstance(self.percent, (int, float)) and 0 < self.percent <= 100):
            raise ValueError(
                f"sparse: percent must be above 0 and at most 100, got {self.percent!r}"
            )
        object.__setattr__(self, "percent", float(self.percent))

    @classmethod
    def at_bits(cls, bits):
        return cls(percent=min(100.0, 100 * bits / 24))  # 24 bits an entry

    def kept(self, shape: tuple[int, int]) -> int:
        """Entries per row."""
        return max(1, min(shape[1], round(self.percent / 100 * shape[1])))

    def tile(self, shape):
        if shape[1] > 65535:
            raise ValueError(
                f"sparse: columns are 16 bits, so in_features must be below 65536, got {shape[1]}"
            )
        return Tile(1, max(1, shape[1]), 2 + 3 * self.kept(shape))

    def params(self, shape):
        return (Param("scale", (shape[0],), "out"),)

    def initial_params(self, weight, seed, feedback=False, importance=None):
        return {"scale": torch.zeros(weight.shape[0])}

    def encode(self, weight, hessian=None, outputs=None, *, seed=0, label="", given=None):
        weight = check_weight(weight, self.name)
        prepared = Hessian.prepare(hessian, weight.shape[1], label)
        if prepared is not None and weight.numel():
            weight = self._in_metric(weight, prepared.damped())
        return super().encode(weight, seed=seed, label=label, given=given)

    def _in_metric(self, weight: Tensor, h: Tensor) -> Tensor:
        """The matrix of `kept` entries a row that is nearest to the weight in the metric of h.

        Entries are chosen by what each alone would gain and their values fitted together: inputs
        are correlated, and what a base codec leaves over is arranged so that its errors cancel.
        """
        kept = self.kept((weight.shape[0], weight.shape[1]))
        pull = weight @ h
        chosen = (pull * pull / h.diagonal()).topk(kept, dim=1).indices
        target = torch.zeros_like(weight)
        step = max(1, (1 << 24) // kept**2)  # rows whose systems are held at a time
        for start in range(0, len(weight), step):
            at = chosen[start : start + step]
            system = h[at[:, :, None], at[:, None, :]]
            values = torch.linalg.solve(system, pull[start : start + step].gather(1, at))
            target[start : start + step].scatter_(1, at, values)
        return target

    def decode_tiles(self, codes, params, shape):
        n, rows = self.kept(shape), codes[:, 0].long()
        count = (rows[:, 0] | rows[:, 1] << 8).clamp_max(n)
        column = rows[:, 2 : 2 + 2 * n : 2] | rows[:, 3 : 3 + 2 * n : 2] << 8
        value = codes[:, 0, 2 + 2 * n :].view(torch.int8).to(params["scale"].dtype)
        real = (torch.arange(n, device=codes.device) < count[:, None]) & (column < shape[1])
        value = torch.where(real, value * params["scale"][:, None], 0)
        out = torch.zeros((shape[0], shape[1]), dtype=value.dtype, device=codes.device)
        return out.scatter_add(1, torch.where(real, column, 0), value)

    def encode_reference(self, target, importance, params):
        out, n = target.shape[0], self.kept(tuple(target.shape))
        h = torch.ones(target.shape[1]) if importance is None else importance
        column = (target.double() ** 2 * h).topk(n, dim=1).indices.sort(1).values
        kept, weight = target.gather(1, column), h[column]
        scale = round_to_half(kept.abs().amax(1) / 127)
        q = (kept / scale.where(scale != 0, 1)[:, None]).round().clamp(-127, 127)
        power = (weight * q * q).sum(1)
        scale = round_to_half(
            torch.where(power > 0, (weight * q * kept).sum(1) / power.clamp_min(1e-30), scale)
        )
        q = (kept / scale.where(scale != 0, 1)[:, None]).round().clamp(-127, 127).to(torch.int8)
        codes = torch.zeros((out, 1, 2 + 3 * n), dtype=torch.uint8)
        order = (
            (q == 0).int().sort(dim=1, stable=True).indices
        )  # entries that rounded to zero are unused
        used = (q != 0).sum(1)
        q, column = q.gather(1, order), column.gather(1, order)
        column = torch.where(q != 0, column, 0)
        codes[:, 0, 0], codes[:, 0, 1] = used & 255, used >> 8
        codes[:, 0, 2 : 2 + 2 * n : 2], codes[:, 0, 3 : 3 + 2 * n : 2] = column & 255, column >> 8
        codes[:, 0, 2 + 2 * n :] = q.view(torch.uint8)
        return codes, {"scale": scale}
