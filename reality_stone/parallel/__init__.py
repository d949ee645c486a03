"""Compressed layers on several ranks: what torch.distributed needs to know about codes.

DDP and torch.distributed.checkpoint take a compressed model as it is. `codes_as_parameters` spares
DDP sending the codes with every forward pass and has `fully_shard` divide them, which leaves
buffers whole. Tensor parallelism is torch's `parallelize_module` with the styles ColwiseCodes and
RowwiseCodes: a slice of the codes is the codes of the slice. All that is sent, DTensor, FSDP2 and
DDP send.
"""

from .sharding import codes_as_parameters, gathered, load
from .slices import slice_linear, slice_packed
from .styles import ColwiseCodes, RowwiseCodes, Sliced

__all__ = [
    "ColwiseCodes", "RowwiseCodes", "Sliced", "codes_as_parameters", "gathered", "load",
    "slice_linear", "slice_packed",
]  # fmt: skip
