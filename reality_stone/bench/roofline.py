"""What share of a machine's limits a product reaches; both limits are measured, never assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .. import ops
from .timing import Timing

PASSES = {"none": 1, "input": 2, "all": 3}  # products of a forward with its backward
# (m, k, n) of the product that is taken as the limit of arithmetic.
MATMUL = {"cpu": (512, 2048, 2048), "cuda": (8192, 8192, 8192)}
COPY, READ, MULTIPLY = "(copy)", "(read)", "(matmul)"


@dataclass(frozen=True)
class Work:
    """The least that one call moves from and to memory, and the operations of a dense product."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Ceiling:
    """Bytes and operations a second, as measured."""

    bytes: float
    flops: float


def work(
    shape: tuple[int, int],
    batch: int,
    backward: str,
    item: int,
    weight_bytes: float,
    trained_bytes: float = 0,
    rereads: bool = True,
) -> Work:
    """Work of a linear and its backward ("none", "input", "all") at `item` bytes an activation.

    Weights are larger than the cache, so each product reads them again: but not the one that gives
    the gradient of a dense weight (`rereads` false). `trained_bytes` are gradients that are
    written.
    """
    passes = PASSES[backward]
    reads = passes if rereads else min(passes, 2)
    activations = passes * batch * sum(shape) * item  # each reads one and writes, or reads, another
    written = trained_bytes if passes == 3 else 0
    return Work(
        reads * weight_bytes + activations + written, passes * 2.0 * batch * shape[0] * shape[1]
    )


def share(done: Work, seconds: float, ceiling: Ceiling) -> tuple[float, str]:
    """The larger of the shares of both limits, and which: "memory" or "compute"."""
    memory = done.bytes / seconds / ceiling.bytes
    compute = done.flops / seconds / ceiling.flops
    return (memory, "memory") if memory >= compute else (compute, "compute")


class Limits:
    """The cases to time beside others for a Ceiling: a copy, a read and a product of torch's.

    Buffers are four times `cache` bytes. The product is in bfloat16, and in float32 where the
    device has no instructions for bfloat16.
    """

    def __init__(self, device: torch.device, cache: int):
        count = max(1024, cache)  # float32
        self.bytes = 4.0 * count
        fast = ops.fast_bfloat16(device)
        m, k, n = MATMUL[device.type]
        self.flops = 2.0 * m * k * n
        source = ops.huge_pages(torch.ones(count, device=device))
        target = ops.huge_pages(torch.zeros(count, device=device))
        dtype = torch.bfloat16 if fast else torch.float32
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        self.cases: dict[str, Callable[[int], object]] = {
            COPY: lambda _: target.copy_(source),
            READ: lambda _: source.sum(),
            MULTIPLY: lambda _: a @ b.T,
        }

    def ceiling(self, timings: Mapping[str, Timing]) -> Ceiling:
        """From the timings of `cases`; the faster of copying and reading is the limit of memory."""
        copied = 2 * self.bytes / timings[COPY].seconds
        read = self.bytes / timings[READ].seconds
        return Ceiling(max(copied, read), self.flops / timings[MULTIPLY].seconds)
