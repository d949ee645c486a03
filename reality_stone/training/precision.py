"""The number format of a training forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch


def training_precision(
    precision: str, device: torch.device
) -> Callable[[], AbstractContextManager]:
    """A maker of autocast contexts: "float32" (none), "bfloat16", or "auto": bfloat16 where the
    processor multiplies it faster than float32."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16', got {precision!r}")
    fast = precision == "bfloat16" or (precision == "auto" and _has_bfloat16(device))
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=fast)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
