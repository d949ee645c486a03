"""The ops on CUDA tensors: on a GPU where there is one, otherwise under the emulation.

`ops` has the schemas of reality_stone; `tensors` moves what it is given to where they run.
REQUIRE_CUDA=1 takes no emulation for a GPU.
"""

import os
from pathlib import Path

import pytest
import torch

from reality_stone import ops as compiled

EMULATED = Path(__file__).parent.parent / "build/emulated/cuda.so"
ORDERS = (0, 1, 7)  # forwards, backwards, shuffled: see emulation.cpp

on_gpu = torch.cuda.is_available() and bool(compiled.build_info().get("cuda"))

if os.environ.get("REQUIRE_CUDA") and not on_gpu:
    raise RuntimeError(
        "REQUIRE_CUDA is set, but there is no GPU or the library was built without CUDA"
    )
if not on_gpu and not EMULATED.exists():
    pytest.skip("no GPU, and no emulation: see `make emulated`", allow_module_level=True)

if on_gpu:
    ops = torch.ops.reality_stone
    device = torch.device("cuda")
else:
    _library = torch.library.Library("reality_stone_emulated", "DEF")
    for _name, _schema in compiled.SCHEMAS.items():
        _library.define(_name + _schema)
    torch.ops.load_library(str(EMULATED))
    ops = torch.ops.reality_stone_emulated
    device = torch.device("cpu")


def tensors(*given):
    """Each tensor, or list of them, on the device."""
    return [
        [t.to(device) for t in value] if isinstance(value, (list, tuple)) else value.to(device)
        for value in given
    ]


def orders(monkeypatch):
    """Once for each order in which the emulation runs a block's threads; once on a GPU."""
    for order in (0,) if on_gpu else ORDERS:
        monkeypatch.setenv("EMULATED_ORDER", str(order))
        yield order
