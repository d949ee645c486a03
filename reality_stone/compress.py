"""Compressing a model in place, layer by layer in execution order."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import metrics
from .blocks import Call, Walk, calls_from, hessians, inference, to_device
from .codecs import REGISTRY, Codec, Uniform
from .curvature import OutputSide, check_language, some_rows
from .layer_plan import Plan
from .nn import Compressed, RBEExperts
from .nn.experts import unfused
from .packed import storage_bits
from .sensitivity import make_plan
from .swap import tell
from .targets import (
    ASKED,
    ENOUGH,
    Choice,
    choose,
    kind_of,
    matrices,
    plannable,
    share,
    tied_heads,
)

UNMEASURED = "curvature is measured on calibration data: give some, or do without curvature"


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
    skipped: dict[str, str] = field(default_factory=dict)  # matrices left dense: why
    coverage: float = 1.0  # share of the weights in matrices that codes hold; see targets.matrices
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
            "coverage": self.coverage,
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
            f"bits each in {self.seconds:.1f} s, {self.coverage:.1%} of those in matrices"
        )
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"left dense, {reason}: {_listed(names)}")
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
    curvature: bool = False,
    tokenizer: Any = None,
    context: int = 256,
    batch: int = 16,
    skip: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Replace the linear layers of `model` by compressed ones, in place.

    Those are nn.Linear, the Conv1D of GPT-2, and each matrix of fused experts (see nn.RBEExperts).

    calibration: None (no error feedback), a tensor of inputs or token ids (n, length), a list of
        batches, or texts with `tokenizer` (cut into windows of `context` tokens).
    codec: a name, used at `bits`, or a configured codec (then `bits` is not used). At bits that the
        codec has no setting for, each layer gets a rate of its own; see `plan`.
    plan: a Plan, which says it all, or (name pattern, codec or None for dense) pairs, the first
        match wins over `codec`.
    curvature: weigh errors by what they cost a language model's likelihood too, measured at the
        outputs of layers (see curvature.py) but of experts and those with more than 4,096; needs
        calibration. Holds up to 1 GiB of moments, and what one row's backward pass keeps; each GiB
        is a pass forward and backward over 16,384 tokens.
    skip: name patterns that stay dense. The output head, weights tied to another module and layers
        below 4,096 weights stay dense too, unless a plan names them.

    Embeddings and norms are compressed where a pattern of the plan matches them and no linear layer
    (norms from 1,024 elements); heads tied to such an embedding stay tied to it.

    The report names what stays dense and why; warns where that is more than a tenth of the weights
    in matrices and was not asked for, and where calibration did not reach a layer. An interrupt
    leaves every layer either dense or compressed. Raises ValueError on a weight that is not finite,
    naming layer and position, before that layer is changed.
    """
    if curvature and calibration is None:
        raise ValueError(UNMEASURED)
    calls = None if calibration is None else calls_from(calibration, batch, tokenizer, context)
    start = time.perf_counter()
    with unfused(model), inference(model):
        if curvature:
            to_device(calls, next(model.parameters()).device)
            check_language(model, some_rows(calls, 1)[0])
        choice = _choice(model, bits, codec, plan, skip, calls, seed, progress)
        if "" in choice.codecs:
            raise ValueError(
                "the model is itself the layer to compress: put it into a module first"
            )
        heads = tied_heads(model, choice.codecs)
        tied = {head for names in heads.values() for head in names}
        report = Report(skipped={n: r for n, r in choice.reasons.items() if n not in tied})
        with tqdm(
            total=len(choice.codecs),
            desc="compress",
            disable=None if progress else True,
            leave=False,
        ) as bar:
            job = Job(model, choice.codecs, seed, report, bar, heads, progress)
            job.fit_common()
            if calls is not None:
                to_device(calls, next(model.parameters()).device)
            work(job, calls, curvature)
        cover(model, report)
    tell(model)
    report.seconds = time.perf_counter() - start
    return report


def coverage(model: nn.Module | Report) -> float:
    """Share of the weights in matrices that codes hold; embeddings and the output head count not.

    Of a model as it is, or of the one that a report is about.
    """
    return model.coverage if isinstance(model, Report) else share(matrices(model))


def cover(model: nn.Module, report: Report) -> None:
    """Coverage and what unknown modules hold into the report; a warning where it is low."""
    found = matrices(model)
    dense = [m for m in found if not m.compressed]
    report.coverage = share(found)
    report.skipped |= {m.name: m.reason for m in dense if m.name not in report.skipped}
    unasked = [m for m in dense if report.skipped[m.name] != ASKED]
    if share([m for m in found if m.compressed] + unasked) < ENOUGH:
        unasked.sort(key=lambda m: -m.weights)
        largest = [f"{m.name} ({m.weights:,} weights, {report.skipped[m.name]})" for m in unasked]
        warnings.warn(
            f"only {report.coverage:.1%} of the weights in matrices are compressed; left dense: "
            f"{_listed(largest, 3)}",
            stacklevel=3,
        )


def _choice(
    model: nn.Module,
    bits: float,
    codec: str | Codec,
    plan: Plan | Sequence[tuple[str, str | Codec | None]],
    skip: Sequence[str],
    calls: list[Call] | None,
    seed: int,
    progress: bool,
) -> Choice:
    """What is compressed how; planned here where the codec itself has no such rate."""
    if isinstance(plan, Plan) or has_rate(codec, bits):
        return choose(model, bits, codec, plan, skip)
    names = plannable(model, plan, skip)
    own = make_plan(model, names, bits, calls, codec, seed=seed, progress=progress)
    return choose(model, bits, Uniform(), [*plan, *own.entries], skip)


def has_rate(codec: str | Codec, bits: float) -> bool:
    """Whether a codec can be used at `bits` for every layer; a configured one is as it is."""
    if not isinstance(codec, str) or codec not in REGISTRY:
        return True  # configured, or refused by name later
    try:
        REGISTRY[codec].at_bits(bits)
    except ValueError:
        return False
    return True


def _listed(names: Sequence[str], most: int = 20) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


@dataclass
class Job:
    """Encoding and swapping of single layers, with their report."""

    model: nn.Module
    chosen: Mapping[str, Codec]
    seed: int
    report: Report
    bar: tqdm
    heads: Mapping[str, list[str]] = field(default_factory=dict)
    progress: bool = True
    unreached: list[str] = field(default_factory=list)  # encoded without the calibration there was
    # By codec: the params that its layers share, and the one Parameter each of them became.
    given: dict[Codec, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[tuple, nn.Parameter] = field(default_factory=dict)
    # Everywhere a module hangs, so that layers used twice stay one.
    places: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict)

    def __post_init__(self):
        for parent in self.model.modules():
            for leaf, child in parent._modules.items():
                self.places.setdefault(id(child), []).append((parent, leaf))

    def fit_common(self) -> None:
        """The tables that a codec wants one of for the whole model."""
        for codec in dict.fromkeys(c for c in self.chosen.values() if c.common):
            names = [name for name, c in self.chosen.items() if c == codec]
            layers = map(self.model.get_submodule, names)
            weights = [kind_of(layer).dense_weight(layer) for layer in layers]
            self.given[codec] = codec.fit_common(weights, self.seed)

    def tie(self, layer: Compressed) -> float:
        """Share the common params with the layers before; the bits that this saves."""
        saved = 0
        for name in layer.codec.common:
            own = getattr(layer, name)
            one = self.shared.setdefault((layer.codec, name, own.device), own)
            if one is not own and torch.equal(one, own):
                saved += storage_bits(own.detach())
                setattr(layer, name, one)
        return saved

    def put(self, old: nn.Module, new: nn.Module) -> None:
        for parent, leaf in self.places[id(old)]:
            parent._modules[leaf] = new

    def replace(
        self,
        name: str,
        hessian: Tensor | None,
        outputs: Tensor | None = None,
        calibrated: bool = False,
    ) -> None:
        start = time.perf_counter()
        dense = self.model.get_submodule(name)
        kind = kind_of(dense)
        self.bar.set_postfix_str(name)
        try:
            layer = kind.from_dense(
                dense,
                self.chosen[name],
                hessian,
                outputs=outputs,
                seed=self.seed + len(self.report.layers),
                label=name,
                given=self.given.get(self.chosen[name]),
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        w, q = kind.dense_weight(dense).detach().float(), layer.packed.decode()
        usable = hessian is not None and bool(hessian.isfinite().all())
        saved = self.tie(layer)
        self.put(dense, layer)
        for tied in self.heads.get(name, ()):
            head = self.model.get_submodule(tied)
            self.put(head, layer.head(head.bias).train(head.training))
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
        if calibrated and hessian is None:
            self.unreached.append(name)
        self.bar.update()


def work(
    job: Job, calls: list[Call] | None, curvature: bool = False, walk: Walk | None = None
) -> None:
    """Encode every layer of the job, in the order of the model or, with calls, of execution."""
    rest = list(job.chosen)
    while rest and (calls is None or kind_of(job.model.get_submodule(rest[0])).on_request):
        job.replace(rest.pop(0), None)
    if calls is not None:
        _calibrated(job, rest, calls, curvature, walk)


def _calibrated(
    job: Job, names: Sequence[str], calls: list[Call], curvature: bool, walk: Walk | None
) -> None:
    targets = {name: job.model.get_submodule(name) for name in names}
    side = _output_side(job, targets, calls) if curvature else None
    for group, hessian in hessians(job.model, targets, calls, walk):
        for name in group:
            outputs = None if side is None or hessian is None else side.take(name)
            job.replace(name, hessian, outputs, calibrated=True)
    if job.unreached:
        warnings.warn(
            f"no calibration input reaches {len(job.unreached)} of {len(targets)} layers, which "
            f"are encoded without it: {_listed(job.unreached)}",
            stacklevel=4,
        )


def _output_side(job: Job, targets: Mapping[str, nn.Module], calls: list[Call]) -> OutputSide:
    """The output side of all layers but experts, of which each sees but a few tokens."""
    outputs = {
        name: kind_of(layer).dense_weight(layer).shape[0]
        for name, layer in targets.items()
        if not isinstance(job.model.get_submodule(".".join(name.split(".")[:-2])), RBEExperts)
    }
    return OutputSide(job.model, outputs, calls, seed=job.seed, progress=job.progress)
