"""Gumbel: a softmax over the levels that hardens as the temperature falls."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Quantizer, cells
from .schedule import TauSchedule, positive


class Gumbel(Quantizer):
    """The mean of the levels under softmax(-(u - c)^2 / tau), u = weight / scale; hard in eval.

    levels: the learnable c, at first the middles of equal cells of [-1, 1].
    tau: a number or a TauSchedule of the steps taken; by default the square of the levels' spacing,
        where values between the outer levels pass almost unchanged. A fiftieth of it is hard.
    noise: Gumbel noise on the logits, new at each `step()`, drawn from `generator`.
    room: how far the outer levels start beyond the largest weight. Past them nothing learns, so a
        network from scratch, whose weights will grow, wants about 2.

    Levels and scale both learn; a tenth of the weights' learning rate suits them.
    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax, 2017.

    >>> quantizer = Gumbel(levels=4, tau=TauSchedule(0.25, 0.005, 1000))
    >>> quantizer(torch.randn(8, 16)).weight.shape
    torch.Size([8, 16])
    """

    learned_scale = True

    def __init__(
        self,
        levels: int = 16,
        tau: float | TauSchedule | None = None,
        *,
        noise: bool = False,
        generator: torch.Generator | None = None,
        per_row: bool = False,
        room: float = 1.0,
    ):
        self.room = positive(room, "room")
        super().__init__(cells(levels), per_row, learned_centers=True)
        if tau is None:
            tau = (2 / levels) ** 2
        self.schedule = tau if isinstance(tau, TauSchedule) else positive(tau, "tau")
        self.noise = bool(noise or generator is not None)
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        self._draw()

    @classmethod
    def annealed(cls, levels: int, steps: int, **settings) -> Gumbel:
        """A Gumbel that falls from soft to hard in `steps` training steps."""
        spacing = (2 / max(levels, 1)) ** 2
        return cls(levels, TauSchedule(spacing, spacing / 50, steps), **settings)

    @property
    def tau(self) -> float:
        """The temperature of this step."""
        return self.schedule(self.steps) if callable(self.schedule) else self.schedule

    @property
    def mode(self) -> str:
        return "gumbel" if self.training else "ste"

    @property
    def temperature(self) -> float:
        return self.tau

    def seed(self) -> int | None:
        # One seed a step: a recomputed forward must see the noise of the first.
        return self._seed if self.noise and self.training else None

    def _measure(self, rows: Tensor, peak: Tensor) -> Tensor:
        return self.room * super()._measure(rows, peak)

    def step(self) -> None:
        super().step()
        self._draw()

    def _draw(self) -> None:
        if self.noise:
            self._seed = torch.randint(2**62, (), generator=self.generator).item()
        else:
            self._seed = 0

    def _counters(self):
        return [*super()._counters(), self._seed]

    def _set_counters(self, values):
        super()._set_counters(values)
        self._seed = values[2]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.noise:
            destination[prefix + "generator"] = self.generator.get_state()

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        name = prefix + "generator"
        if self.noise and name in state:
            self.generator.set_state(state[name].cpu())
        elif self.noise and strict:
            missing.append(name)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if self.noise and name in unexpected:
            unexpected.remove(name)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau:.3g}, noise={self.noise}"
