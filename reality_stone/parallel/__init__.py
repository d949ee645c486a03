"""Compressed layers on several ranks: what torch.distributed needs to know about codes.

DDP takes a compressed model as it is (`broadcast_buffers=False` spares sending the codes with every
forward pass), and so does torch.distributed.checkpoint. `fully_shard` divides parameters and leaves
buffers whole: `shard_codes` makes the codes parameters. Tensor parallelism is torch's
`parallelize_module` with the styles ColwiseCodes and RowwiseCodes: a slice of the codes is the
codes of the slice. Everything that is sent is sent by DTensor, FSDP2 or DDP.
"""

from .sharding import gathered, load, shard_codes
from .slices import slice_linear, slice_packed
from .styles import ColwiseCodes, RowwiseCodes, Sliced

__all__ = [
    "ColwiseCodes", "RowwiseCodes", "Sliced", "gathered", "load", "shard_codes", "slice_linear",
    "slice_packed",
]  # fmt: skip
