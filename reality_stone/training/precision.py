"""The number format of a training forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from .. import ops


def training_precision(
    precision: str, device: torch.device
) -> Callable[[], AbstractContextManager]:
    """A maker of autocast contexts: "float32" (none), "bfloat16", or "auto": bfloat16 where the
    processor multiplies it faster than float32."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16', got {precision!r}")
    fast = precision == "bfloat16" or (precision == "auto" and ops.fast_bfloat16(device))
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=fast)
