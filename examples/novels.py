"""The language model and the texts that ship with the examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reality_stone import hf
from reality_stone.evaluate import windows as cut
from reality_stone.jobs import Calibration

DATA = Path(__file__).parent / "data"
MODEL = DATA / "novels_lm"
CONTEXT = 256


def model() -> nn.Module:
    """The dense model in float32."""
    return hf.from_pretrained(MODEL)


def tokenizer() -> Any:
    return hf.load_tokenizer(MODEL)


def validation(tokens: int = 65_536) -> Tensor:
    """The first token ids (n,) of the validation text."""
    return hf.tokenize_file(tokenizer(), DATA / "novels_valid.txt.xz", tokens=tokens)


def calibration(windows: int = 128) -> Tensor:
    """(windows, CONTEXT) token ids from random places of the training text."""
    file = str(DATA / "novels_train.txt.xz")
    return Calibration(file, windows, CONTEXT).windows(hf.tokenize_file(tokenizer(), file))


def training(windows: int, seed: int = 0) -> Tensor:
    """(windows, CONTEXT) token ids of the training text, without overlap, shuffled."""
    pieces = cut(hf.tokenize_file(tokenizer(), DATA / "novels_train.txt.xz"), CONTEXT)
    order = torch.randperm(pieces.shape[0], generator=torch.Generator().manual_seed(seed))
    return pieces[order[:windows]]
