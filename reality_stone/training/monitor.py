"""Watching compressed layers while they train: error, use of codes and tables, bits; and acting.

After the documents' CompressionMonitor: a moving average of each layer's error, an alert or another
precision where it leaves its band.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import show
from ..codecs import Codec
from ..nn import RBELinear
from ..packed import Packed
from .optimisers import renew, table_params
from .rates import next_rate
from .sampling import RowSample, entropy, used


@dataclass(frozen=True)
class Reading:
    """One layer at one step. error: |W - Q| / |W| on sampled rows, or the same of the outputs;
    entropy: bits of information in a byte of codes, at most 8; used: the share of each shared
    table's entries that the sampled weights depend on; bits: per weight, everything stored."""

    step: int
    layer: str
    error: float
    average: float
    entropy: float
    used: dict[str, float]
    bits: float


@dataclass(frozen=True)
class Alert:
    """A moving average that has left its band; action: what was done about it, in words."""

    step: int
    layer: str
    average: float
    band: tuple[float, float]
    codec: str  # before
    action: str

    def __str__(self) -> str:
        side = "below" if self.average < self.band[0] else "above"
        limit = self.band[0] if side == "below" else self.band[1]
        return (
            f"layer {self.layer!r} at step {self.step}: the relative error {self.average:.4g} is "
            f"{side} {limit:g}; {self.action}"
        )


class Monitor:
    """Readings of every compressed layer of `model` at each `step()`.

    reference: the dense model, or {layer name: weight (out, in)}; without one, errors are against
        the weights as they are now, so they say how far training has moved them.
    band: (low, high) of the moving average of the relative error (a norm, not its square).
    smoothing: what the average keeps of itself at each reading.
    measure: "weight", or "output": the error of x W^T on inputs seen since the last reading.
    rows: weight rows sampled from each layer (whole blocks of the codec, at least one).
    every: steps between readings.
    alert: called with each Alert; a warning by default. One is raised when an average leaves its
        band, and again only after it has been back inside.
    adapt: encode the layer anew at the codec's next rate, up above the band, down below it, from
        the reference where there is one; kept only where the error then moves the right way
        (down: and stays below `high`). `budget`: bits per weight that all layers together may
        reach by that. `hessians`: {layer name: E[x x^T]} for the encoder.

    >>> layer = RBELinear(64, 64, codec="uniform(bits=4, group=32)")
    >>> monitor = Monitor(layer, band=(0, 0.1))
    >>> monitor.step()
    []
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module | Mapping[str, Tensor] | None = None,
        *,
        band: tuple[float, float],
        smoothing: float = 0.9,
        measure: str = "weight",
        rows: int = 128,
        every: int = 1,
        alert: Callable[[Alert], None] | None = None,
        adapt: bool = False,
        budget: float | None = None,
        hessians: Mapping[str, Tensor] | None = None,
    ):
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, RBELinear)}
        if not self.layers:
            raise ValueError("the model has no compressed layers to watch; call compress first")
        low, high = band
        if not 0 <= low < high < math.inf:
            raise ValueError(f"band must be (low, high) with 0 <= low < high, got {band!r}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {smoothing!r}")
        if measure not in ("weight", "output"):
            raise ValueError(f"measure must be 'weight' or 'output', got {measure!r}")
        if rows < 1 or every < 1:
            raise ValueError(f"rows and every must be positive, got {rows!r} and {every!r}")
        if budget is not None and not budget > 0:
            raise ValueError(f"budget must be positive bits per weight, got {budget!r}")
        self.band, self.smoothing, self.every = (float(low), float(high)), smoothing, every
        self.adapt, self.budget, self.hessians = adapt, budget, hessians or {}
        self._alert = alert or (lambda found: warnings.warn(str(found), stacklevel=3))
        self.count = 0
        self.averages: dict[str, float] = {}
        self.outside: set[str] = set()
        self.history: list[Reading] = []
        self.alerts: list[Alert] = []
        self._samples = {n: RowSample(layer, rows) for n, layer in self.layers.items()}
        self._weights = _reference(self.layers, reference)
        self._rows = {
            name: self._samples[name].of(weight) if weight is not None else sample.decode()
            for (name, weight), sample in zip(
                self._weights.items(), self._samples.values(), strict=True
            )
        }
        self._inputs: dict[str, Tensor] = {}
        self._hooks = []
        if measure == "output":
            self._hooks = [
                m.register_forward_pre_hook(self._see(n)) for n, m in self.layers.items()
            ]
        self.measure = measure

    def step(self, optimiser: torch.optim.Optimizer | None = None) -> list[str]:
        """Take a reading; the names of the layers that were encoded anew.

        Tables of those layers may be new Parameters. With `optimiser` they take the place of the
        old ones in its groups and start without state; otherwise that is left to the caller, see
        `renew`.
        """
        self.count += 1
        if (self.count - 1) % self.every:
            return []
        changed = []
        for name, layer in self.layers.items():
            reading = self._read(name)
            if reading is None:
                continue
            self.history.append(reading)
            low, high = self.band
            inside = low <= reading.average <= high and math.isfinite(reading.error)
            if inside:
                self.outside.discard(name)
            elif name not in self.outside:
                self.outside.add(name)
                codec, before = layer.codec.spec, table_params(layer)
                action = self._adapt(name, reading) if self.adapt else "nothing is changed"
                if layer.codec.spec != codec:
                    changed.append(name)
                    if optimiser is not None:
                        renew(optimiser, before, table_params(layer))
                found = Alert(self.count, name, reading.average, self.band, codec, action)
                self.alerts.append(found)
                self._alert(found)
        return changed

    def close(self) -> None:
        """Stop seeing inputs."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inputs = [], {}

    @property
    def bits_per_weight(self) -> float:
        """Average over the layers, each with all its tables."""
        bits = sum(m.bits_per_weight * math.prod(m.shape) for m in self.layers.values())
        return bits / max(1, sum(math.prod(m.shape) for m in self.layers.values()))

    def latest(self) -> dict[str, Reading]:
        """The last reading of each layer."""
        return {reading.layer: reading for reading in self.history}

    def __str__(self) -> str:
        last = self.latest()
        head = ("layer", "codec", "b/w", "error", "average", "entropy", "used", "")
        rows = [
            (
                name, show.codec(self.layers[name].codec.spec), f"{r.bits:.3f}", f"{r.error:.4f}",
                f"{r.average:.4f}", f"{r.entropy:.2f}",
                " ".join(f"{n} {100 * share:.0f} %" for n, share in r.used.items()),
                "outside" if name in self.outside else "",
            )
            for name, r in last.items()
        ]  # fmt: skip
        return show.table(head, rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all readings and alerts as JSON."""
        found = {
            "band": list(self.band),
            "readings": [asdict(r) for r in self.history],
            "alerts": [asdict(a) for a in self.alerts],
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)

    def state_dict(self) -> dict[str, Any]:
        """Where the averages are; the codecs of the layers are the model's to save."""
        return {
            "count": self.count,
            "averages": dict(self.averages),
            "outside": sorted(self.outside),
            "history": [asdict(r) for r in self.history],
            "alerts": [asdict(a) for a in self.alerts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. ValueError where the state is that of other layers."""
        unknown = sorted({*state["averages"], *state["outside"]} - set(self.layers))
        if unknown:
            raise ValueError(f"the state is of another model: it has layer {unknown[0]!r}")
        self.count, self.averages = state["count"], dict(state["averages"])
        self.outside = set(state["outside"])
        self.history = [Reading(**r) for r in state["history"]]
        self.alerts = [Alert(**a | {"band": tuple(a["band"])}) for a in state["alerts"]]

    # --- one layer ---

    def _see(self, name: str) -> Callable:
        def enter(module: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            x = x.reshape(-1, x.shape[-1])
            step = max(1, len(x) // 64)
            self._inputs[name] = x[::step][:64].float()

        return enter

    def _read(self, name: str) -> Reading | None:
        layer, sample = self.layers[name], self._samples[name]
        error = self._error(name)
        if error is None:
            return None
        before = self.averages.get(name, error)
        if math.isfinite(error):
            self.averages[name] = self.smoothing * before + (1 - self.smoothing) * error
        average = self.averages.get(name, error)
        packed = sample.packed()
        return Reading(
            self.count, name, error, average, entropy(packed.codes), used(packed),
            layer.bits_per_weight,
        )  # fmt: skip

    def _error(self, name: str) -> float | None:
        """The layer's error as it is now; None where no input has been seen."""
        want, got = self._rows[name], self._samples[name].decode()
        if self.measure == "output":
            if name not in self._inputs:
                return None
            x = self._inputs[name].to(want.device)
            want, got = x @ want.t(), x @ got.t()
        size = want.double().norm().item()
        miss = (want.double() - got.double()).norm().item()
        return miss / size if size else (0.0 if miss == 0 else math.inf)

    def _adapt(self, name: str, reading: Reading) -> str:
        """Change the layer's rate by one step; what was done, in words."""
        layer = self.layers[name]
        up = not reading.average < self.band[0]
        codec = next_rate(layer.codec, layer.shape, up)
        if codec is None:
            return f"{layer.codec.spec} has no {'higher' if up else 'lower'} rate"
        old = layer.packed
        old = dataclasses.replace(old, params={n: p.clone() for n, p in old.params.items()})
        packed = self._encode(name, codec)
        if up and self.budget is not None:
            weights = sum(math.prod(m.shape) for m in self.layers.values())
            more = packed.bits - layer.bits_per_weight * math.prod(layer.shape)
            if self.bits_per_weight + more / weights > self.budget:
                return f"{codec.spec} would exceed the budget of {self.budget:g} bits per weight"
        before = self._error(name)
        layer.recode(packed)
        after = self._error(name)
        if not (after < before if up else after <= self.band[1]):
            layer.recode(old)
            return f"{codec.spec} would have an error of {after:.4g}: nothing is changed"
        self.averages[name] = after
        self.outside.discard(name)
        return f"encoded anew as {codec.spec}, error {after:.4g}"

    def _encode(self, name: str, codec: Codec) -> Packed:
        layer, weight = self.layers[name], self._weights[name]
        if weight is None:
            weight = layer.weight
        elif layer.adapter is not None:
            weight = weight.to(layer.codes.device) - layer.adapter.weight
        return codec.encode(weight, self.hessians.get(name), label=name)


def _reference(
    layers: Mapping[str, RBELinear], reference: nn.Module | Mapping[str, Tensor] | None
) -> dict[str, Tensor | None]:
    """The dense weight of every layer, or None for each where there is no reference."""
    if reference is None:
        return dict.fromkeys(layers)
    if isinstance(reference, nn.Module):
        modules = dict(reference.named_modules())
        reference = {n: modules[n].weight for n in layers if hasattr(modules.get(n), "weight")}
    for name, layer in layers.items():
        weight = reference.get(name)
        if weight is None or tuple(weight.shape) != layer.shape:
            got = "none" if weight is None else tuple(weight.shape)
            raise ValueError(f"the reference of layer {name!r} must be {layer.shape}, got {got}")
    return {name: reference[name].detach() for name in layers}
