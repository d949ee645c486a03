"""What a layer's error at a rate costs the model, measured on a sample of its rows.

For small errors KL(model || changed) is about half of tr F E H E^T summed over layers, with E the
error of a weight, H = E[x x^T] of its input and F = E[g g^T] of the gradients of the log likelihood
at its output (see curvature.py). Rows of E are as good as independent of each other, so the trace
of F is enough: half of tr(F) / out * tr E H E^T. E is measured with errors fed back, as `compress`
encodes, on some rows of every layer at one rate; what other rates make of it is nearly the same for
all layers and is measured on a few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import metrics
from .allocation import RATES, LayerCurve, check_bits, curve_of, options
from .blocks import Call, hessians, inference, to_device
from .codecs import Codec
from .curvature import is_language, output_power
from .layer_plan import Plan
from .targets import kind_of

USUAL = 2.5  # bits; every layer is measured at the rate nearest to it
ROWS = 128  # of each layer
PROBES = 4  # layers on which every rate is measured
POSITIONS = 4096  # tokens that the output side is measured on, of rows from all the calibration
CALLS = 4  # that they are run in


def make_plan(
    model: nn.Module,
    names: Sequence[str],
    bits: float,
    calls: Sequence[Call] | None,
    codec: str | Codec = "trellis",
    rates: Sequence[float] = RATES,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """The plan of these layers. Raises ValueError before any work where the rates do not reach."""
    codecs = options(codec, rates)
    check_bits(bits, codecs)
    curves, unit = measure(model, names, codecs, calls, seed=seed, progress=progress)
    return Plan.solve(curves, bits, unit)


def measure(
    model: nn.Module,
    names: Sequence[str],
    codecs: Mapping[float, Codec | None],
    calls: Sequence[Call] | None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> tuple[list[LayerCurve], str]:
    """The curve of each named layer over the rates of `codecs`, and what its losses are.

    Whatever rate a plan is for, the curves are the same. With calls the losses are nats per token,
    or for models that are no language models squared errors of the output relative to its power.
    Without, they are squared errors of the weights relative to each layer's own.
    """
    rates = [rate for rate, codec in codecs.items() if codec is not None]
    usual = min(rates, key=lambda rate: abs(rate - USUAL))
    probes = {names[i * len(names) // PROBES] for i in range(PROBES)}
    layers = {name: model.get_submodule(name) for name in names}
    weights = {name: kind_of(layer).dense_weight(layer) for name, layer in layers.items()}
    errors: dict[str, dict[float, _Error]] = {}
    with (
        inference(model),
        torch.no_grad(),
        tqdm(total=len(names), desc="plan", disable=None if progress else True, leave=False) as bar,
    ):
        power, unit = _output_side(model, names, calls, seed, progress)
        groups = [(list(names), None)] if calls is None else hessians(model, layers, calls)
        for group, hessian in groups:
            for name in group:
                bar.set_postfix_str(name)
                weight = _sample(weights[name].detach(), seed)
                errors[name] = {
                    rate: _error(name, weight, codecs[rate], hessian, seed)
                    for rate in (rates if name in probes else [usual])
                }
                bar.update()
    shrink = {rate: _ratio([errors[n] for n in probes], rate, usual) for rate in rates}
    at_usual = _losses({n: e[usual] for n, e in errors.items()}, weights, power)
    found = []
    for name in names:
        shape = (weights[name].shape[0], weights[name].shape[1])
        loss = [at_usual[name] * shrink[r] if r in shrink else 0.0 for r in codecs]
        found.append(curve_of(name, shape, codecs, loss))
    return found, unit


class _Error:
    """Of a sample of rows: relative to the weights, and of the output per row (None: unknown)."""

    def __init__(self, weight: Tensor, decoded: Tensor, hessian: Tensor | None):
        self.relative = metrics.nmse(decoded, weight)
        self.output: float | None = None
        if hessian is not None and bool(hessian.isfinite().all()):
            e = (decoded - weight).double()
            self.output = ((e @ hessian) * e).sum().item() / max(1, weight.shape[0])


def _output_side(
    model: nn.Module, names: Sequence[str], calls: Sequence[Call] | None, seed: int, progress: bool
) -> tuple[dict[str, float], str]:
    """tr(F) / out of each layer, and the unit of the losses."""
    if calls is None:
        return {}, "relative squared error of weights, summed over layers"
    to_device(calls, next(model.parameters()).device)
    few = _few(calls)
    likely = is_language(few[0], few[0].on(model))
    unit = "nats per token" if likely else "relative squared error of the output"
    return output_power(model, few, names, seed=seed, progress=progress), unit


def _few(calls: Sequence[Call]) -> list[Call]:
    """Some of the calibration rows, in small batches; calls of another form as they are."""
    if any(c.kwargs or len(c.args) != 1 or not isinstance(c.args[0], Tensor) for c in calls):
        return list(calls[:: max(1, len(calls) // CALLS)])
    rows = [row for call in calls for row in call.args[0].split(1)]
    first = rows[0]
    length = max(1, first.numel() // (first.shape[-1] if first.is_floating_point() else 1))
    wanted = -(-POSITIONS // length)
    rows = rows[:: max(1, len(rows) // wanted)][:wanted]
    if len({row.shape for row in rows}) > 1:
        return [Call((row,)) for row in rows]
    return [Call((part,)) for part in torch.cat(rows).split(-(-wanted // CALLS))]


def _sample(weight: Tensor, seed: int) -> Tensor:
    """Some rows, the same for the same seed."""
    if weight.shape[0] <= ROWS:
        return weight.float().cpu()
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(seed))
    return weight[order[:ROWS].sort().values.to(weight.device)].float().cpu()


def _error(name: str, weight: Tensor, codec: Codec, hessian: Tensor | None, seed: int) -> _Error:
    try:
        packed = codec.encode(weight, hessian, seed=seed, label=name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return _Error(weight, packed.decode(), hessian)


def _ratio(probes: Sequence[Mapping[float, _Error]], rate: float, usual: float) -> float:
    """The geometric mean over layers of the error at a rate over that at the usual one."""
    logs = []
    for errors in probes:
        here, there = errors[rate], errors[usual]
        known = here.output is not None and there.output is not None
        a, b = (here.output, there.output) if known else (here.relative, there.relative)
        if a > 0 and b > 0:
            logs.append(math.log(a / b))
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def _losses(
    errors: Mapping[str, _Error], weights: Mapping[str, Tensor], power: Mapping[str, float]
) -> dict[str, float]:
    """Half of tr(F) / out * tr E H E^T; where one side is not known, the relative error of the
    weights at the middling price of the other layers."""
    known = {
        name: 0.5 * power[name] * e.output * weights[name].shape[0]
        for name, e in errors.items()
        if e.output is not None and math.isfinite(power.get(name, math.nan))
    }
    prices = sorted(known[n] / errors[n].relative for n in known if errors[n].relative > 0)
    price = prices[len(prices) // 2] if prices else 1.0
    return {name: known.get(name, price * e.relative) for name, e in errors.items()}
