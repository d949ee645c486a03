"""What the commands do with model directories: load, work, save."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, hf
from .codecs import Codec
from .compress import UNMEASURED, Report, compress, has_rate
from .evaluate import Evaluation, evaluate
from .nn import lora
from .plan import Plan
from .plan import plan as plan_model
from .streaming import NeedsWholeModel, compress_checkpoint
from .training import TrainingReport, finetune
from .training.resume import FILE as STATE

PIECES = 40  # of calibration text that are read, 4 million characters
ADAPTER = "adapter.safetensors"  # beside a packed model's own files


@dataclass(frozen=True)
class Calibration:
    """`samples` windows of `context` tokens at random places of a text file."""

    file: str
    samples: int = 128
    context: int = 256
    seed: int = 5

    def windows(self, tokens: Tensor) -> Tensor:
        """(n,) tokens -> (samples, context). Raises ValueError when there are too few."""
        last = tokens.numel() - self.context
        if last < 1:
            raise ValueError(
                f"{self.file}: {tokens.numel()} tokens are too few for windows of {self.context}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(0, last, (self.samples,), generator=generator)
        return torch.stack([tokens[i : i + self.context] for i in starts.tolist()])


def compress_directory(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: float,
    codec: str | Codec = "trellis",
    calibration: Calibration | None = None,
    progress: bool = True,
    plan: Plan | None = None,
    resume: bool = False,
    curvature: bool = False,
) -> Report | None:
    """Compress the model in `source` and save it as `target`; refuses early where it can. A plan
    stands for `bits` and `codec`; `curvature` as for `compress`.

    Tensor by tensor or, with calibration, block by block, and resumable (see
    streaming.compress_checkpoint). In memory with `curvature` and where `bits` must be planned
    first, and with a warning where the model cannot run block by block.
    """
    if curvature and calibration is None:
        raise ValueError(UNMEASURED)
    seed = 0 if calibration is None else calibration.seed
    if not curvature and (plan is not None or has_rate(codec, bits)):
        checkpoint.check_target(target)
        tokens = None if calibration is None else _windows(source, calibration)
        try:
            return compress_checkpoint(
                source, target, bits, codec, calibration=tokens, plan=plan or (), seed=seed,
                resume=resume, progress=progress,
            )  # fmt: skip
        except NeedsWholeModel as reason:
            if calibration is None:
                raise
            if resume:
                raise ValueError(f"{reason}; there is no run to go on with") from None
            warnings.warn(str(reason), stacklevel=2)
    elif resume:
        raise ValueError(
            "a run with curvature is not kept on the disk: resume is for one without"
            if curvature
            else f"{codec} has no rate of {bits:g} bits: write a plan first, a run with one resumes"
        )
    checkpoint.check_target(target)
    model, tokens = _dense(source, calibration)
    report = compress(
        model, bits, tokens, codec, plan=plan or (), curvature=curvature, seed=seed,
        progress=progress,
    )  # fmt: skip
    checkpoint.save(model, target, source=source, dense_dtype=hf.source_dtype(source))
    return report


def plan_directory(
    source: str | os.PathLike[str],
    bits: float,
    codec: str | Codec = "trellis",
    calibration: Calibration | None = None,
    skip: Sequence[str] = (),
    progress: bool = True,
) -> Plan:
    """The plan of the dense model in `source`."""
    model, tokens = _dense(source, calibration)
    seed = 0 if calibration is None else calibration.seed
    return plan_model(model, bits, tokens, codec, skip=skip, seed=seed, progress=progress)


def _dense(
    source: str | os.PathLike[str], calibration: Calibration | None
) -> tuple[nn.Module, Tensor | None]:
    """A dense model and its calibration windows."""
    _check_dense(source)
    model = hf.from_pretrained(source)
    if calibration is None:
        return model, None
    return model, hf.check_tokens(model, _windows(source, calibration), source)


def _windows(source: str | os.PathLike[str], calibration: Calibration) -> Tensor:
    """Calibration windows, by the tokenizer of a dense model's directory."""
    _check_dense(source)
    tokens = hf.tokenize_file(hf.load_tokenizer(source), calibration.file, pieces=PIECES)
    return calibration.windows(tokens)


def _check_dense(source: str | os.PathLike[str]) -> None:
    if hf.is_packed(source):
        raise ValueError(f"{source}: this model is already compressed, start from the dense one")


@dataclass(frozen=True)
class DirectoryEvaluation:
    """An Evaluation with the protocol in words."""

    evaluation: Evaluation
    text: str
    used: int  # tokens of the text

    @property
    def protocol(self) -> str:
        e = self.evaluation
        return (
            f"the first {self.used:,} tokens of {Path(self.text).name} in windows of {e.context} "
            f"that do not overlap, each starting cold; mean over tokens 2 to {e.context} of every "
            f"window, {e.tokens:,} in all"
        )

    def to_json(self) -> dict:
        return asdict(self.evaluation) | {"text": str(self.text), "protocol": self.protocol}


def evaluate_directory(
    directory: str | os.PathLike[str],
    text: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    context: int = 256,
    tokens: int = 65536,
    progress: bool = True,
) -> DirectoryEvaluation:
    """Perplexity of the model in `directory`, and its KL from the one in `reference`."""
    model = _predicts(load_directory(directory), directory)
    dense = None if reference is None else _predicts(hf.from_pretrained(reference), reference)
    ids = hf.tokenize_file(hf.load_tokenizer(directory), text, tokens=tokens)
    used = ids.numel() // max(1, context) * context
    if used == 0:
        raise ValueError(f"{text}: {ids.numel()} tokens are less than one window of {context}")
    for one, name in ((model, directory), (dense, reference)):
        if one is not None:
            hf.check_tokens(one, ids, name)
    found = evaluate(model, ids, context, reference=dense, progress=progress)
    return DirectoryEvaluation(found, str(text), used)


def load_directory(directory: str | os.PathLike[str]) -> nn.Module:
    """The model of a dense or packed directory, with the adapters that stand in it."""
    model = hf.from_pretrained(directory)
    file = Path(directory) / ADAPTER
    if file.is_file():
        lora.load_adapter(model, file)
    return model


@dataclass(frozen=True)
class Judge:
    """A text to measure on before and after, from its beginning."""

    file: str
    tokens: int = 16_384


@dataclass(frozen=True)
class DirectoryTraining:
    """before, after: on the judge's text, None without one; KL from the teacher."""

    target: str
    mode: str
    training: TrainingReport
    before: Evaluation | None
    after: Evaluation | None

    def to_json(self) -> dict:
        return asdict(self)


def finetune_directory(
    directory: str | os.PathLike[str],
    target: str | os.PathLike[str],
    text: Calibration,
    teacher: str | os.PathLike[str] | None = None,
    mode: str = "tables",
    judge: Judge | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> DirectoryTraining:
    """Train the packed model in `directory` on windows of a text and save it as `target`.

    With mode "lora" `target` gets the model as it was and `adapter.safetensors` beside it, which
    `load_directory` puts on. The run is kept in `state` (default: target + ".state") until the
    result is saved, and goes on from there. options: those of `finetune`.
    """
    goal = checkpoint.check_target(target)
    if not hf.is_packed(directory):
        raise ValueError(f"{directory}: this model is dense, compress it first")
    if teacher is not None and hf.is_packed(teacher):
        raise ValueError(f"{teacher}: the teacher must be a dense model, this one is compressed")
    model = _predicts(load_directory(directory), directory)
    if mode != "lora" and lora.adapters(model):
        raise ValueError(f"{directory}: this model has adapters; train it in mode 'lora'")
    tokenizer = hf.load_tokenizer(directory)
    tokens = hf.tokenize_file(tokenizer, text.file, pieces=PIECES)
    batches = text.windows(hf.check_tokens(model, tokens, directory))
    judged = None
    if judge is not None:
        ids = hf.tokenize_file(tokenizer, judge.file, tokens=judge.tokens)
        judged = hf.check_tokens(model, ids, directory)
        if judged.numel() < text.context:
            raise ValueError(f"{judge.file}: this is less than one window of {text.context} tokens")
    dense = None if teacher is None else _predicts(hf.from_pretrained(teacher), teacher)
    if dense is not None:
        hf.check_tokens(dense, batches, teacher)

    def measure() -> Evaluation | None:
        if judged is None:
            return None
        return evaluate(model, judged, text.context, reference=dense, progress=progress)

    before = measure()
    place = Path(state) if state is not None else goal.with_name(f"{goal.name}.state")
    report = finetune(model, batches, dense, mode, state=place, progress=progress, **options)
    after = measure()
    _save(model, goal, directory, place)
    return DirectoryTraining(str(target), mode, report, before, after)


def _save(model: nn.Module, target: Path, source: str | os.PathLike[str], state: Path) -> None:
    """The checkpoint, and the adapters beside it; then the state has had its day."""
    adapted = bool(lora.adapters(model))
    kept = state / ADAPTER
    if adapted:
        lora.save_adapter(model, kept)
        lora.remove_lora(model)
    checkpoint.save(model, target, source=source, dense_dtype=hf.source_dtype(source))
    if adapted:
        shutil.move(kept, target / ADAPTER)
    (state / STATE).unlink(missing_ok=True)
    if not any(state.iterdir()):
        state.rmdir()


def _predicts(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """The model, if its logits are those of next tokens, which an encoder's are not."""
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{directory}: perplexity and training on text are for causal language models, "
            f"{type(model).__name__} is none"
        )
    return model
