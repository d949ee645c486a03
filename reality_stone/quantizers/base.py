"""What every quantizer is: levels, a scale, and the choice of a formula."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..codecs import Codec, Palette, Uniform
from .formulas import MOST_LEVELS, Quantized, ScaleGradient, quantize

SHRINKS = 30  # scales tried, from the one that reaches the largest weight down to a fifth of it
SAMPLE = 1 << 14  # weights of a row, or of a layer with one scale, on which they are compared
GUIDE = 64  # weights that share a scale where the levels land in `uniform`
TINY = 1e-12


def count(levels: int) -> int:
    """A number of levels. ValueError unless it is a whole number from 2 to 256."""
    if isinstance(levels, int) and 2 <= levels <= MOST_LEVELS:
        return levels
    raise ValueError(f"levels must be a whole number from 2 to {MOST_LEVELS}, got {levels!r}")


def cells(levels: int) -> Tensor:
    """The middles of `levels` equal cells of [-1, 1]: (i + 1/2) * 2 / levels - 1."""
    return (torch.arange(count(levels)) + 0.5) * (2 / levels) - 1


class Quantizer(nn.Module):
    """From a dense weight (out, in) to `Quantized(weight, codes, loss)`.

    The weight is divided by `scale`, one for the matrix or with `per_row` one for each row, which
    `fit` measures: the scale of least squared error on the levels, at most the one that brings the
    largest weight to the outermost level. The first forward fits where nobody has; with `per_row`
    fit before making an optimiser, since that gives the scale its size.

    Eval mode gives hard values. `step()` ends a training step (schedules, noise).
    ValueError on weights that are not finite matrices of the fitted size.
    """

    learned_scale: ClassVar[bool] = False
    per_row: bool

    def __init__(self, centers: Tensor, per_row: bool = False, learned_centers: bool = False):
        super().__init__()
        if not isinstance(per_row, bool):
            raise ValueError(f"per_row must be True or False, got {per_row!r}")
        self.per_row, self.fitted, self.steps = per_row, False, 0
        # The level that the widest scale brings the largest weight to. Two levels, -1 and 0, have
        # none above zero.
        self.reach = max(0.5, min(-centers.min().item(), centers.max().item()))
        if learned_centers:
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)
        self._set_scale(torch.ones(1))

    @property
    def levels(self) -> int:
        return len(self.centers)

    @property
    def mode(self) -> str:
        """The formula in use; see formulas.py."""
        raise NotImplementedError

    @property
    def temperature(self) -> float:
        """The formula's tau."""
        return 1.0

    def forward(self, weight: Tensor) -> Quantized:
        centers, tau, mode, scale = self.arguments(weight)
        return quantize(weight, centers, tau, mode, scale, self.seed())

    def hard(self, weight: Tensor) -> Quantized:
        """The nearest levels whatever the mode, without a gradient."""
        self.ready(weight)
        with torch.no_grad():
            return quantize(weight, self.centers, 1.0, "ste", self.safe_scale())

    def arguments(self, weight: Tensor) -> tuple[Tensor, float, str, Tensor]:
        """(centers, tau, mode, scale) of the op `qat_linear` for this weight, as things stand."""
        self.ready(weight)
        scale = self.safe_scale()
        if self.learned_scale:
            scale = ScaleGradient.apply(scale, self.scale_gradient(weight))
        return self.centers, self.temperature, self.mode, scale

    def seed(self) -> int | None:
        """What this step's noise grows from; None where there is none."""
        return None

    def step(self) -> None:
        """End a training step."""
        self.steps += 1

    def safe_scale(self) -> Tensor:
        """The scale, kept off zero: an optimiser may step across it."""
        return self.scale.abs() + TINY

    def scale_gradient(self, weight: Tensor) -> float:
        """LSQ's factor on the scale's gradient: 1 / sqrt(weights of a scale * highest level)."""
        return (max(1, weight.numel() // max(1, len(self.scale))) * self.reach) ** -0.5

    def codec(self) -> Codec:
        """The codec that holds the levels exactly: palette to 16 levels, uniform above."""
        bits = (self.levels - 1).bit_length()
        return Palette(bits=bits) if bits <= 4 else Uniform(bits=bits, group=GUIDE)

    # --- scale ---

    def ready(self, weight: Tensor) -> None:
        """Fit where nobody has, and see that the weight has the fitted size."""
        if not self.fitted:
            self.fit(weight)
        if weight.dim() != 2 or (self.per_row and len(self.scale) != len(weight)):
            wanted = f"({len(self.scale)}, in)" if self.per_row else "(out, in)"
            raise ValueError(
                f"this quantizer takes a weight {wanted}, got shape {tuple(weight.shape)}"
            )

    @torch.no_grad()
    def fit(self, weight: Tensor) -> Quantizer:
        """Measure the scale, and what else a kind measures, on this weight."""
        if weight.dim() != 2:
            raise ValueError(f"weight must have two dimensions, got shape {tuple(weight.shape)}")
        rows = weight.detach() if self.per_row else weight.detach().reshape(1, -1)
        if rows.shape[1]:
            peak = rows.abs().amax(1)
            if not bool(peak.isfinite().all()):
                at = tuple((~weight.isfinite()).nonzero()[0].tolist())
                raise ValueError(f"the weight is not finite at {at}: {weight[at].item()}")
            self._set_scale(self._measure(rows, peak))
        else:
            self._set_scale(rows.new_ones(len(rows)))
        self.fitted = True
        return self

    def _measure(self, rows: Tensor, peak: Tensor) -> Tensor:
        """(rows,) scales; one where a row is zero."""
        sample = rows[:, :: max(1, rows.shape[1] // SAMPLE)]
        levels = self.centers.detach().sort().values
        middles = (levels[1:] + levels[:-1]) / 2
        widest = torch.where(peak > 0, peak / self.reach, 1.0)
        best, least = widest, torch.full_like(widest, torch.inf)
        for shrink in torch.linspace(1, 0.2, SHRINKS).tolist():
            scale = (shrink * widest)[:, None]
            found = scale * levels[torch.bucketize(sample / scale, middles)]
            error = (found - sample).square().sum(1)
            best = torch.where(error < least, scale[:, 0], best)
            least = torch.minimum(error, least)
        return best

    def _set_scale(self, scale: Tensor) -> None:
        if "scale" in self._parameters and self.scale.shape == scale.shape:
            self.scale.data.copy_(scale)
        elif self.learned_scale:
            self.scale = nn.Parameter(scale.clone())
        else:
            self.register_buffer("scale", scale.clone())

    # --- state: counters and flags travel as one tensor of integers, `state` ---

    def _counters(self) -> list[int]:
        return [int(self.fitted), self.steps]

    def _set_counters(self, values: list[int]) -> None:
        self.fitted, self.steps = bool(values[0]), values[1]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "state"] = torch.tensor(self._counters())

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        scale = state.get(prefix + "scale")
        if scale is not None and scale.dim() == 1 and not self.fitted:
            self._set_scale(torch.empty_like(scale, device=self.scale.device))
        if prefix + "state" in state:
            self._set_counters(state[prefix + "state"].tolist())
        elif strict:
            missing.append(prefix + "state")
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + "state" in unexpected:
            unexpected.remove(prefix + "state")

    def extra_repr(self) -> str:
        return f"levels={self.levels}, per_row={self.per_row}"
