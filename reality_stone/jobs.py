"""What the commands do with model directories: load, work, save."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint, hf
from .codecs import Codec
from .compress import Report, compress
from .evaluate import Evaluation, evaluate

PIECES = 40  # of calibration text that are read, 4 million characters


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
) -> Report:
    """Compress the model in `source` and save it as `target`; refuses early where it can."""
    checkpoint.check_target(target)
    if hf.is_packed(source):
        raise ValueError(f"{source}: this model is already compressed, start from the dense one")
    model = hf.from_pretrained(source)
    tokens = None
    if calibration is not None:
        tokenizer = hf.load_tokenizer(source)
        tokens = hf.tokenize_file(tokenizer, calibration.file, pieces=PIECES)
        tokens = calibration.windows(_known(model, tokens, source))
    seed = 0 if calibration is None else calibration.seed
    report = compress(model, bits, tokens, codec, seed=seed, progress=progress)
    checkpoint.save(model, target, source=source, dense_dtype=hf.source_dtype(source))
    return report


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
    model = hf.from_pretrained(directory)
    dense = None if reference is None else hf.from_pretrained(reference)
    ids = hf.tokenize_file(hf.load_tokenizer(directory), text, tokens=tokens)
    used = ids.numel() // max(1, context) * context
    if used == 0:
        raise ValueError(f"{text}: {ids.numel()} tokens are less than one window of {context}")
    for one, name in ((model, directory), (dense, reference)):
        if one is not None:
            _known(one, ids, name)
    found = evaluate(model, ids, context, reference=dense, progress=progress)
    return DirectoryEvaluation(found, str(text), used)


def _known(model: nn.Module, tokens: Tensor, directory: str | os.PathLike[str] | None) -> Tensor:
    """The tokens, if the model has a row for each."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens.numel() and int(tokens.max()) >= rows:
        raise ValueError(
            f"{directory}: the tokenizer gives token {int(tokens.max())}, the model knows {rows}"
        )
    return tokens
