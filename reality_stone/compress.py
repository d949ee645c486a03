"""Compressing a model in place, layer by layer in execution order."""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import metrics
from .blocks import calls_from, hessians, inference, to_device
from .codecs import REGISTRY, Codec, Uniform
from .codecs import codec as make_codec
from .layer_plan import Plan
from .nn import RBELinear
from .packed import storage_bits
from .sensitivity import make_plan

SMALLEST = 4096  # weights; below this a layer stays dense


@dataclass(frozen=True)
class LayerReport:
    """error: |W-Q|^2 / |W|^2; hessian_error: the same in the metric of the input, if known. A table
    that several layers share counts in the first."""

    name: str
    shape: tuple[int, int]
    codec: str
    bits_per_weight: float
    error: float
    hessian_error: float | None
    seconds: float


@dataclass
class Report:
    """What `compress` did. Sizes are in bytes and count everything stored."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # linear layers left dense
    seconds: float = 0.0

    @property
    def weights(self) -> int:
        return sum(out * n for out, n in (layer.shape for layer in self.layers))

    @property
    def bits_per_weight(self) -> float:
        """Average over the compressed matrices, everything counted."""
        bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in self.layers)
        return bits / max(1, self.weights)

    def to_json(self) -> dict:
        return {
            "bits_per_weight": self.bits_per_weight,
            "weights": self.weights,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [
            f"{'layer':{width}}  {'shape':>13}  {'b/w':>6}  {'error':>8}  {'H-error':>8}  {'s':>6}"
        ]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            h = "" if layer.hessian_error is None else f"{layer.hessian_error:.5f}"
            lines.append(
                f"{layer.name:{width}}  {shape:>13}  {layer.bits_per_weight:6.3f}  "
                f"{layer.error:8.5f}  {h:>8}  {layer.seconds:6.2f}"
            )
        lines.append(
            f"{len(self.layers)} layers, {self.weights:,} weights at {self.bits_per_weight:.3f} "
            f"bits each in {self.seconds:.1f} s"
        )
        if self.skipped:
            lines.append(f"left dense: {', '.join(self.skipped)}")
        return "\n".join(lines)

    def print(self) -> None:
        print(self)

    def save(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1)


def compress(
    model: nn.Module,
    bits: float = 2.5,
    calibration: Any = None,
    codec: str | Codec = "trellis",
    *,
    plan: Plan | Sequence[tuple[str, str | Codec | None]] = (),
    tokenizer: Any = None,
    context: int = 256,
    batch: int = 16,
    skip: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Replace the nn.Linear layers of `model` by RBELinear, in place.

    calibration: None (no error feedback), a tensor of inputs or token ids (n, length), a list of
        batches, or texts with `tokenizer` (cut into windows of `context` tokens).
    codec: a name, used at `bits`, or a configured codec (then `bits` is not used). At bits that the
        codec has no setting for, each layer gets a rate of its own; see `plan`.
    plan: a Plan, which says it all, or (name pattern, codec or None for dense) pairs, the first
        match wins over `codec`.
    skip: name patterns that stay dense. The output head, weights tied to another module and layers
        below 4,096 weights stay dense too, unless a plan names them.

    An interrupt leaves every layer either dense or compressed. Raises ValueError on a weight
    that is not finite, naming layer and position, before that layer is changed.
    """
    calls = None if calibration is None else calls_from(calibration, batch, tokenizer, context)
    if isinstance(plan, Plan):
        chosen = _planned(model, plan)
    elif _has_rate(codec, bits):
        chosen = choose_codecs(model, bits, codec, plan, skip)
    else:
        names = plannable(model, plan, skip)
        own = make_plan(model, names, bits, calls, codec, seed=seed, progress=progress)
        chosen = choose_codecs(model, bits, Uniform(), [*plan, *own.entries], skip)
    targets = {name: model.get_submodule(name) for name in chosen}
    report = Report(skipped=[n for n, m in linears(model).items() if n not in targets])
    start = time.perf_counter()
    with (
        inference(model),
        tqdm(
            total=len(targets), desc="compress", disable=None if progress else True, leave=False
        ) as bar,
    ):
        job = _Job(model, chosen, seed, report, bar)
        job.fit_common()
        if calls is None:
            for name in targets:
                job.replace(name, None)
        else:
            _calibrated(job, targets, calls)
    report.seconds = time.perf_counter() - start
    return report


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear by name; one that appears twice under its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def choose_codecs(
    model: nn.Module,
    bits: float,
    codec: str | Codec,
    plan: Sequence[tuple[str, str | Codec | None]] = (),
    skip: Sequence[str] = (),
) -> dict[str, Codec]:
    """The codec of each layer that is to be compressed. Raises ValueError when there is none."""
    if isinstance(codec, str) and codec in REGISTRY:
        default = REGISTRY[codec].at_bits(bits)
    else:
        default = make_codec(codec)
    layers, dense = linears(model), _kept_dense(model)
    chosen: dict[str, Codec] = {}
    for name, layer in layers.items():
        planned = next((c for pattern, c in plan if fnmatch.fnmatchcase(name, pattern)), ...)
        if planned is ...:
            small = layer.weight.numel() < SMALLEST
            skipped = any(fnmatch.fnmatchcase(name, p) for p in skip)
            planned = None if small or skipped or name in dense else default
        if planned is not None:
            chosen[name] = make_codec(planned)
    if not chosen:
        raise ValueError(
            f"nothing to compress: the model has {len(layers)} nn.Linear layers and all are "
            f"output heads, tied, skipped or below {SMALLEST} weights"
        )
    return chosen


def plannable(
    model: nn.Module,
    plan: Sequence[tuple[str, str | Codec | None]] = (),
    skip: Sequence[str] = (),
) -> list[str]:
    """The layers that get the usual codec: named by no plan, and not kept dense."""
    return list(choose_codecs(model, 0, Uniform(), [(pattern, None) for pattern, _ in plan], skip))


def _planned(model: nn.Module, plan: Plan) -> dict[str, Codec]:
    """As choose_codecs, for a plan that says it all. ValueError where it is of another model."""
    names = list(linears(model))
    for pattern, _ in plan.entries:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"the plan names {pattern!r}, but the model has no such linear layer")
    return choose_codecs(model, 0, Uniform(), [*plan.entries, ("*", None)])


def _has_rate(codec: str | Codec, bits: float) -> bool:
    if not isinstance(codec, str) or codec not in REGISTRY:
        return True  # configured, or refused by name later
    try:
        REGISTRY[codec].at_bits(bits)
    except ValueError:
        return False
    return True


def _kept_dense(model: nn.Module) -> set[str]:
    """Names of linear layers that are an output head or share their weight with another module."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.device.type != "meta":
            owners.setdefault(weight.data_ptr(), []).append(name)
    kept = {n for names in owners.values() if len(names) > 1 for n in names}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return kept | {n for n, m in model.named_modules() if m is head}


@dataclass
class _Job:
    """Encoding and swapping of single layers, with their report."""

    model: nn.Module
    chosen: Mapping[str, Codec]
    seed: int
    report: Report
    bar: tqdm
    # By codec: the params that its layers share, and the one Parameter each of them became.
    given: dict[Codec, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[tuple, nn.Parameter] = field(default_factory=dict)

    def fit_common(self) -> None:
        """The tables that a codec wants one of for the whole model."""
        for codec in dict.fromkeys(c for c in self.chosen.values() if c.common):
            names = [name for name, c in self.chosen.items() if c == codec]
            weights = [self.model.get_submodule(name).weight for name in names]
            self.given[codec] = codec.fit_common(weights, self.seed)

    def tie(self, layer: RBELinear) -> float:
        """Share the common params with the layers before; the bits that this saves."""
        saved = 0
        for name in layer.codec.common:
            own = getattr(layer, name)
            one = self.shared.setdefault((layer.codec, name, own.device), own)
            if one is not own and torch.equal(one, own):
                saved += storage_bits(own.detach())
                setattr(layer, name, one)
        return saved

    def replace(self, name: str, hessian: Tensor | None) -> None:
        start = time.perf_counter()
        dense = self.model.get_submodule(name)
        self.bar.set_postfix_str(name)
        try:
            layer = RBELinear.from_linear(
                dense,
                self.chosen[name],
                hessian,
                seed=self.seed + len(self.report.layers),
                label=name,
                given=self.given.get(self.chosen[name]),
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        w, q = dense.weight.detach().float(), layer.weight
        usable = hessian is not None and bool(hessian.isfinite().all())
        saved = self.tie(layer)
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, layer)
        self.report.layers.append(
            LayerReport(
                name,
                layer.shape,
                layer.codec.spec,
                layer.bits_per_weight - saved / w.numel(),
                metrics.nmse(q, w),
                metrics.hessian_nmse(q, w, hessian) if usable else None,
                time.perf_counter() - start,
            )
        )
        self.bar.update()


def _calibrated(job: _Job, targets: Mapping[str, nn.Module], calls: list) -> None:
    to_device(calls, next(job.model.parameters()).device)
    for group, hessian in hessians(job.model, targets, calls):
        for name in group:
            job.replace(name, hessian)
