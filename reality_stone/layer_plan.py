"""Plan: which codec each layer gets, as a value that prints, plots and survives JSON."""

from __future__ import annotations

import fnmatch
import glob
import json
import math
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import show, tensorfile
from .allocation import Choice, LayerCurve, allocate, stored_bits
from .codecs import Codec, from_config

FORMAT, VERSION = "reality_stone.plan", 1


@dataclass(frozen=True)
class Plan:
    """An ordered list of (name pattern, codec or None for dense); the first match wins.

    bits: the target. measure: what losses are. curves: each planned layer's choices. skipped: the
    linear layers that were not planned. Layers that no entry matches stay dense.

    >>> Plan.from_json({"format": "reality_stone.plan", "version": 1, "entries": []}).entries
    ()
    """

    entries: tuple[tuple[str, Codec | None], ...]
    bits: float | None = None
    measure: str = ""
    curves: tuple[LayerCurve, ...] = ()
    skipped: tuple[str, ...] = ()

    def codec_of(self, name: str) -> Codec | None:
        return next((c for pattern, c in self.entries if fnmatch.fnmatchcase(name, pattern)), None)

    def chosen(self, layer: LayerCurve) -> Choice:
        """What a planned layer gets; the loss of a codec not on its curve is not a number."""
        codec = self.codec_of(layer.name)
        for choice in layer.choices:
            if choice.codec == codec:
                return choice
        loss = math.nan if codec is not None else 0.0
        return Choice(math.nan, codec, stored_bits(codec, layer.shape) / layer.weights, loss)

    @staticmethod
    def solve(curves: Sequence[LayerCurve], bits: float, measure: str = "") -> Plan:
        """The plan of least predicted loss that stores no more than one rate of `bits` for all
        layers would. Raises ValueError where the curves do not reach there."""
        found = zip(curves, allocate(curves, bits), strict=True)
        entries = tuple((glob.escape(layer.name), choice.codec) for layer, choice in found)
        return Plan(entries, float(bits), measure, tuple(curves))

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.curves)

    @property
    def stored(self) -> float:
        """Bits of the planned layers in a file, dense ones at 16 a weight."""
        return sum(self.chosen(layer).bits * layer.weights for layer in self.curves)

    @property
    def bits_per_weight(self) -> float:
        """Average over the planned layers, everything stored counted."""
        return self.stored / max(1, self.weights)

    @property
    def loss(self) -> float:
        """Predicted loss of all planned layers together, in the unit of `measure`."""
        return sum(self.chosen(layer).loss for layer in self.curves)

    def to_json(self) -> dict[str, Any]:
        totals = {
            "bits_per_weight": self.bits_per_weight,
            "weights": self.weights,
            "bytes": math.ceil(self.stored / 8),
            "loss": None if math.isnan(self.loss) else self.loss,
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "bits": self.bits,
            "measure": self.measure,
            "totals": totals,
            "entries": [{"pattern": p, "codec": _config(c)} for p, c in self.entries],
            "skipped": list(self.skipped),
            "curves": [
                {"name": curve.name, "shape": list(curve.shape),
                 "choices": [vars(c) | {"codec": _config(c.codec)} for c in curve.choices]}
                for curve in self.curves
            ],
        }  # fmt: skip

    @staticmethod
    def from_json(value: Any) -> Plan:
        """The plan that `to_json` wrote, or its entries alone. ValueError in one sentence."""
        plan = _object(value, "a plan", {"format", "version", "entries"},
                       {"bits", "measure", "totals", "skipped", "curves"})  # fmt: skip
        if plan["format"] != FORMAT or plan["version"] != VERSION:
            raise ValueError(
                f"a plan is of format {FORMAT!r}, version {VERSION}, got {plan['format']!r:.100}, "
                f"version {plan['version']!r:.100}"
            )
        bits, measure, skipped = plan.get("bits"), plan.get("measure", ""), plan.get("skipped", [])
        if bits is not None:
            bits = _number(bits, "a plan's bits")
        return Plan(
            tuple(_entry(e) for e in _list(plan["entries"], "a plan's entries")),
            bits,
            _text(measure, "a plan's measure"),
            tuple(_curve(c) for c in _list(plan.get("curves", []), "a plan's curves")),
            tuple(_text(n, "a skipped layer") for n in _list(skipped, "a plan's skipped")),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """The plan in a JSON file. FileNotFoundError or ValueError, naming the file."""
        try:
            return Plan.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: there is no such file") from None
        except (ValueError, RecursionError) as error:  # also JSON's and UTF-8's own
            raise ValueError(f"{path}: this is not a plan: {error}") from None

    def __str__(self) -> str:
        if not self.curves:
            return "\n".join(f"{pattern}: {_spec(codec)}" for pattern, codec in self.entries)
        rows = []
        for layer in self.curves:
            choice = self.chosen(layer)
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            rows.append(
                (layer.name, shape, _spec(choice.codec), f"{choice.bits:.3f}", f"{choice.loss:.3g}")
            )
        lines = [
            show.table(("layer", "shape", "codec", "b/w", "loss"), rows),
            f"{len(rows)} layers, {self.weights:,} weights at {self.bits_per_weight:.3f} bits "
            f"each, {show.size(self.stored / 8)}; predicted loss {self.loss:.4g} ({self.measure})",
        ]
        if self.skipped:
            lines.append(f"left dense: {', '.join(self.skipped)}")
        return "\n".join(lines)

    def print(self) -> None:
        print(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Rates by layer, and loss against rate beside equal rates; PNG, SVG or PDF by ending."""
        from .draw import draw_plan

        draw_plan(self, path)


def _spec(codec: Codec | None) -> str:
    return "dense" if codec is None else show.codec(codec.spec)


def _config(codec: Codec | None) -> dict[str, Any] | None:
    return None if codec is None else codec.to_config()


# --- reading ---


def _object(value: Any, what: str, must: set[str], may: Set[str] = frozenset()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, got {value!r:.100}")
    missing, unknown = must - set(value), set(value) - must - may
    if missing:
        raise ValueError(f"{what} must have {', '.join(sorted(missing))}")
    if unknown:
        raise ValueError(f"{what} has no {', '.join(sorted(map(repr, unknown)))}")
    return value


def _list(value: Any, what: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, got {value!r:.100}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, got {value!r:.100}")
    return value


def _number(value: Any, what: str) -> float:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not 0 <= value < 1e300:
        raise ValueError(f"{what} must be a number from 0 up, got {value!r:.100}")
    return float(value)


def _codec(value: Any, what: str) -> Codec | None:
    try:
        return None if value is None else from_config(value)
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"{what}: {error}") from None


def _entry(value: Any) -> tuple[str, Codec | None]:
    entry = _object(value, "an entry", {"pattern", "codec"})
    pattern = _text(entry["pattern"], "an entry's pattern")
    return pattern, _codec(entry["codec"], f"entry {pattern!r:.100}")


def _curve(value: Any) -> LayerCurve:
    curve = _object(value, "a curve", {"name", "shape", "choices"})
    name, shape = _text(curve["name"], "a curve's name"), curve["shape"]
    what = f"curve {name!r:.100}"
    if not tensorfile.is_sizes(shape) or len(shape) != 2 or 0 in shape:
        raise ValueError(f"{what}: shape must be [out, in], got {shape!r:.100}")
    choices = []
    for choice in _list(curve["choices"], f"{what}: choices"):
        _object(choice, f"{what}: a choice", {"rate", "codec", "bits", "loss"})
        rate, bits, loss = (_number(choice[k], f"{what}: {k}") for k in ("rate", "bits", "loss"))
        choices.append(Choice(rate, _codec(choice["codec"], what), bits, loss))
    rates = [c.rate for c in choices]
    if not choices or rates != sorted(set(rates)):
        raise ValueError(f"{what}: its rates must be there and rise, got {rates!r:.100}")
    return LayerCurve(name, (shape[0], shape[1]), tuple(choices))
