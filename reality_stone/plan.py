"""`plan`: a rate for every layer, so that an average is met at the least predicted loss."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .allocation import DENSE, RATES
from .blocks import calls_from
from .codecs import Codec, Uniform
from .layer_plan import Plan
from .nn.experts import unfused
from .sensitivity import make_plan
from .targets import choose

__all__ = ["DENSE", "RATES", "Plan", "plan"]


def plan(
    model: nn.Module | str | os.PathLike[str],
    bits: float = 2.5,
    calibration: Any = None,
    codec: str | Codec = "trellis",
    *,
    rates: Sequence[float] = RATES,
    skip: Sequence[str] = (),
    tokenizer: Any = None,
    context: int = 256,
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Choose a rate for each layer that `compress` would compress; the model stays as it is.

    model: a module, or the directory of a Hugging Face language model.
    bits: what is stored, everything counted, is at most what `compress` stores at this many bits,
        on the line between the codec's rates where it lies between them.
    calibration, tokenizer, context, batch: as for `compress`. Without, layers are weighed by the
        relative error of their weights alone.
    codec: a name, or a configured one whose `bits` are varied; at 8 bits `uniform` where it has
        none. rates: the candidates that it has are used; 16 is dense.

    Predictions are of second order and for comparing plans: the divergence itself came out 1.5 to
    1.8 times as large at 2 to 3 bits.
    Raises ValueError where no mixture of the rates has this average.
    """
    if not isinstance(model, nn.Module):
        from . import hf

        if calibration is not None and tokenizer is None and not isinstance(calibration, Tensor):
            tokenizer = hf.load_tokenizer(model)
        model = hf.from_pretrained(model)
    calls = None if calibration is None else calls_from(calibration, batch, tokenizer, context)
    with unfused(model):
        found = choose(model, 0, Uniform(), (), skip)
        made = make_plan(
            model, list(found.codecs), bits, calls, codec, rates, seed=seed, progress=progress
        )
    return replace(made, skipped=tuple(found.reasons))
