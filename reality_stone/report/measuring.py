"""Everything that the page of a packed directory says; what could not be measured is named."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import bench, checkpoint, hf, inspection, jobs, metrics, tensorfile
from ..blocks import first_output, inference
from ..codecs import codec
from ..evaluate import Evaluation, windows
from ..nn import RBELinear
from .curves import Log
from .dense import DenseFiles
from .structure import group

OUTPUT_TOKENS = 4096  # of the text, through which errors of outputs are measured
SHAPES = 6  # of matrices that are timed, those that hold most weights
BATCHES = (1, 16)


@dataclass(frozen=True)
class Request:
    """What to measure: all else is left out, and the page says so."""

    directory: str | os.PathLike[str]
    reference: str | os.PathLike[str] | None = None  # the dense model
    text: str | os.PathLike[str] | None = None
    context: int = 256
    tokens: int = 65_536
    bench: bool = False
    training: Sequence[str | os.PathLike[str]] = ()  # logs, see Log.read


@dataclass(frozen=True)
class Size:
    """Tensors of one part of the model; bytes before and after, of all that is stored for them."""

    group: str
    tensors: int
    weights: int
    before: int
    after: int


@dataclass(frozen=True)
class Quality:
    """Both models on the same text by the same protocol; KL of the packed from the dense."""

    packed: Evaluation
    dense: Evaluation | None
    protocol: str


@dataclass(frozen=True)
class Measured:
    """errors: normalised squared error of each weight; output_errors: of each layer's output on the
    dense model's inputs. `gaps` says for each part that is missing why, in one sentence."""

    name: str
    architecture: str
    dtype: str  # of the dense model
    contents: inspection.Contents
    sizes: list[Size]
    errors: dict[str, float] = field(default_factory=dict)
    output_errors: dict[str, float] = field(default_factory=dict)
    quality: Quality | None = None
    speed: list[bench.Result] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    gaps: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict:
        rate = self.contents.bits_per_weight
        return asdict(self) | {"contents": self.contents.to_json(), "bits_per_weight": rate}


def measure(request: Request, progress: bool = True) -> Measured:
    """Measure a packed directory. Raises FileNotFoundError or ValueError in one sentence; damage
    in the file is no error but is told."""
    directory, reference = Path(request.directory), request.reference
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory")
    if not hf.is_packed(directory):
        raise ValueError(f"{directory}: this model is dense, compress it first")
    if reference is not None and hf.is_packed(reference):
        raise ValueError(f"{reference}: the reference must be a dense model, this is compressed")
    logs = [Log.read(path) for path in request.training]
    dense = None if reference is None else DenseFiles(reference)
    contents = inspection.inspect(directory, progress)
    gaps: dict[str, str] = {}
    errors, output_errors, quality = {}, {}, None
    if not contents.sound:
        damaged = "The file is damaged, so this was not measured."
        gaps |= dict.fromkeys(("weights", "outputs", "quality"), damaged)
    else:
        if dense is None:
            gaps["weights"] = "No dense model was given (--reference) to take the error from."
        else:
            errors = weight_errors(directory, dense)
        if request.text is None:
            gaps["quality"] = "No text was given (--text) to measure perplexity on."
            gaps["outputs"] = "Errors of outputs take a text (--text) and the dense model."
        else:
            quality = _quality(request, progress)
            if reference is None:
                gaps["outputs"] = "Errors of outputs take the dense model (--reference)."
            else:
                output_errors = _output_errors(request)
    if request.bench:
        speed = _speed(contents, progress)
    else:
        speed = []
        gaps["speed"] = "Speed was not asked for (--bench)."
    if not logs:
        gaps["training"] = "No report of a training was given (--training)."
    config = checkpoint.read_config(directory)
    return Measured(
        directory.resolve().name, ", ".join(map(str, config.get("architectures") or ["unknown"])),
        str(hf.source_dtype(directory)).removeprefix("torch."), contents,
        _sizes(directory, contents, dense), errors, output_errors, quality, speed, logs, gaps,
    )  # fmt: skip


def weight_errors(directory: str | os.PathLike[str], dense: DenseFiles) -> dict[str, float]:
    """|W - Q|^2 / |W|^2 of each layer whose weight the dense files have, one decoded at a time."""
    opened = checkpoint.open_checkpoint(directory)
    header, found = opened.header, {}
    with header.path.open("rb") as file:
        for entry in opened.plan:
            weight = dense.weight(entry.name, entry.shape)
            if weight is None:
                continue
            names = checkpoint.stored_names(header, entry).values()
            tensors = {n: tensorfile.read_tensor(header, header.entries[n], file) for n in names}
            packed = checkpoint.check_layer(header, entry, tensors)
            found[entry.name] = metrics.nmse(packed.decode(), weight)
    return found


@torch.no_grad()
def output_errors(packed: nn.Module, dense: nn.Module, tokens: Tensor) -> dict[str, float]:
    """|y - y'|^2 / |y|^2 of each compressed layer, y = W x without bias, x the dense model's input.

    That is `metrics.hessian_nmse` with H = E[x x^T] over `tokens` (n, context), but H, which is
    (in, in), is never built. Layers that the tokens do not reach are left out.
    """
    sums: dict[str, tuple[float, float]] = {}

    def compare(name: str, layer: RBELinear):
        def see(module: nn.Module, args: tuple, output: Tensor) -> None:
            y, bias = first_output(output).float(), getattr(module, "bias", None)
            error = (layer(args[0]).float() - y).double().pow(2).sum().item()
            power = (y if bias is None else y - bias.float()).double().pow(2).sum().item()
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + error, before[1] + power

        return see

    layers = {n: m for n, m in packed.named_modules() if isinstance(m, RBELinear)}
    handles = [
        dense.get_submodule(name).register_forward_hook(compare(name, layer))
        for name, layer in layers.items()
    ]
    try:
        with inference(dense), inference(packed):
            for part in tokens.split(4):
                dense(part)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: sums[name][0] / sums[name][1] if sums[name][1] else math.inf
        for name in layers
        if name in sums
    }


def _quality(request: Request, progress: bool) -> Quality:
    how = request.context, request.tokens, progress
    packed = jobs.evaluate_directory(request.directory, request.text, request.reference, *how)
    dense = None
    if request.reference is not None:
        dense = jobs.evaluate_directory(request.reference, request.text, None, *how).evaluation
    return Quality(packed.evaluation, dense, packed.protocol)


def _output_errors(request: Request) -> dict[str, float]:
    tokenizer = hf.load_tokenizer(request.directory)
    count = min(request.tokens, max(OUTPUT_TOKENS, request.context))
    ids = hf.tokenize_file(tokenizer, request.text, tokens=count)
    packed, dense = jobs.load_directory(request.directory), hf.from_pretrained(request.reference)
    return output_errors(packed, dense, windows(ids, request.context))


def _speed(contents: inspection.Contents, progress: bool) -> list[bench.Result]:
    """Each codec on the shapes it is used at, those with most weights, quickly."""
    weights: Counter[tuple[tuple[int, int], str]] = Counter()
    for layer in contents.layers:
        weights[layer.shape, layer.codec] += math.prod(layer.shape)
    shapes: dict[tuple[int, int], list[str]] = {}
    for (shape, spec), count in weights.most_common():
        if count and (shape in shapes or len(shapes) < SHAPES):
            shapes.setdefault(shape, []).append(spec)
    found = []
    for shape, specs in shapes.items():
        codecs = [codec(spec) for spec in specs]
        found += bench.bench(
            [shape], BATCHES, codecs, turns=5, turn_seconds=0.01, progress=progress
        )
    return found


def _sizes(directory: Path, contents: inspection.Contents, dense: DenseFiles | None) -> list[Size]:
    """By part of the model. Without the dense files, before is the same tensors in its dtype."""
    item = hf.source_dtype(directory).itemsize
    after: Counter[str] = Counter()
    before: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for layer in contents.layers:
        part = group(f"{layer.name}.weight")
        tensors[part] += 1
        weights[part] += math.prod(layer.shape)
        after[part] += layer.bytes
        before[part] += math.prod(layer.shape) * item
    for other in contents.others:
        part = group(other.name)
        tensors[part] += 1
        weights[part] += math.prod(other.shape)
        after[part] += other.bytes
        before[part] += other.bytes
    if dense is not None:
        before = Counter()
        for name, size in dense.sizes().items():
            before[group(name)] += size
    adapter = directory / jobs.ADAPTER
    if adapter.is_file():
        after["adapters"] += adapter.stat().st_size
        tensors["adapters"] += 1
    return [
        Size(part, tensors[part], weights[part], before[part], after[part])
        for part in sorted(before | after, key=lambda p: (-before[p], p))
    ]
