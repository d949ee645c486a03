"""Everything that the page of a packed directory says; what could not be measured is named."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import bench, checkpoint, hf, inspection, jobs
from ..codecs import codec
from ..evaluate import Evaluation, windows
from .curves import Log
from .dense import DenseFiles
from .errors import output_errors, weight_errors
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
    if request.text is not None and not Path(request.text).is_file():
        raise FileNotFoundError(f"{request.text}: there is no such file")
    logs = [Log.read(path) for path in request.training]
    dense = None if reference is None else DenseFiles(reference)
    contents = inspection.inspect(directory, progress)
    gaps = _gaps(request, contents.sound)
    config = checkpoint.read_config(directory)
    return Measured(
        name=directory.resolve().name,
        architecture=", ".join(map(str, config.get("architectures") or ["unknown"])),
        dtype=str(hf.source_dtype(directory)).removeprefix("torch."),
        contents=contents,
        sizes=_sizes(directory, contents, dense),
        errors={} if "weights" in gaps else weight_errors(directory, dense),
        output_errors={} if "outputs" in gaps else _output_errors(request),
        quality=None if "quality" in gaps else _quality(request, progress),
        speed=[] if "speed" in gaps else _speed(contents, progress),
        logs=logs,
        gaps=gaps,
    )


def _gaps(request: Request, sound: bool) -> dict[str, str]:
    """What is not measured, and why."""
    gaps = {}
    if request.reference is None:
        gaps["weights"] = "No dense model was given (--reference) to take the error from."
        gaps["outputs"] = "Errors of outputs take the dense model (--reference)."
    if request.text is None:
        gaps["outputs"] = "Errors of outputs take a text (--text) and the dense model."
        gaps["quality"] = "No text was given (--text) to measure perplexity on."
    if not sound:
        damaged = "The file is damaged, so this was not measured."
        gaps |= dict.fromkeys(("weights", "outputs", "quality"), damaged)
    if not request.bench:
        gaps["speed"] = "Speed was not asked for (--bench)."
    if not request.training:
        gaps["training"] = "No report of a training was given (--training)."
    return gaps


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
    how = bench.How(roofline=False, turns=5, turn_seconds=0.01)
    for shape, specs in shapes.items():
        codecs = [codec(spec) for spec in specs]
        found += bench.bench([shape], BATCHES, codecs, how=how, progress=progress)
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
