"""What is timed: copies of a weight beyond the cache, and the product with one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import ops
from ..codecs import Codec
from ..packed import Packed
from . import roofline
from .peers import Peer
from .roofline import Work
from .timing import Run

STRIP = 16  # least rows that are encoded to get valid params
DENSE = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}
# By device: what the others are held against; its activations are ours too.
AGAINST = {"cpu": "torch float32", "cuda": "torch bfloat16"}


@dataclass(frozen=True)
class Contender:
    """A layer to time: copies of its weight and the product with one of them."""

    kind: str  # ours, torch or peer
    bits: float  # stored for a weight
    dtype: torch.dtype  # of activations
    copies: list
    product: Callable[[object, Tensor, bool], tuple[Tensor, list[Tensor]]]

    def work(self, shape: tuple[int, int], batch: int, backward: str) -> Work:
        """The least one call has to do."""
        weight = shape[0] * shape[1] * self.bits / 8
        first = self.copies[0]
        trained = 0 if self.kind == "peer" else weight
        if isinstance(first, Packed):
            trained = sum(p.nbytes for p in first.params.values() if p.is_floating_point())
        return roofline.work(
            shape, batch, backward, self.dtype.itemsize, weight, trained, self.kind == "ours"
        )


def cache_bytes(device: str = "cpu") -> int:
    """Size of the last-level cache, or of a GPU's L2; 32 MiB where Linux does not tell it."""
    if device == "cuda":
        return torch.cuda.get_device_properties("cuda").L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes) or 32 << 20


def copies_for(weight_bytes: float, cache: int | None = None) -> int:
    """Copies of a weight that together are more than three times the last-level cache."""
    cache = cache_bytes() if cache is None else cache
    return int(3 * cache // max(1.0, weight_bytes)) + 1


def random_packed(codec: Codec, shape: tuple[int, int], seed: int = 0) -> Packed:
    """A valid Packed of any size in no time: for measuring, not for use.

    A few rows are encoded; their params are repeated down the matrix. Codes are random bytes where
    the codec takes any, otherwise those of the few rows repeated.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = math.lcm(codec.tile(shape).rows, STRIP)
    strip_shape = (min(rows, shape[0]), shape[1])
    weight = torch.randn(strip_shape, generator=generator) / math.sqrt(max(1, shape[1]))
    strip = codec.encode(weight, seed=seed)
    tile = codec.tile(shape)
    size = (*tile.grid(shape), tile.bytes)
    codes = torch.randint(0, 256, strip.codes.shape, dtype=torch.uint8, generator=generator)
    try:
        ops.check_codes(codes, list(strip.params.values()), codec.spec, strip_shape)
        codes = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    except ValueError:
        codes = _repeat(strip.codes, size)
    params = dict(strip.params)
    for p in codec.params(shape):
        if p.axis in ("out", "both"):
            params[p.name] = _repeat(params[p.name], p.sizes)
    packed = Packed(codec, shape, codes, params)
    packed.check()
    for tensor in (codes, *params.values()):
        ops.huge_pages(tensor)
    return packed


def _repeat(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Repeat along the first dimension and cut to `sizes`."""
    if not values.numel():
        return values.new_zeros(tuple(sizes))
    times = -(-sizes[0] // values.shape[0])
    return values.repeat(times, *[1] * (values.dim() - 1))[: sizes[0]].contiguous()


def dense(shape: tuple[int, int], device: str) -> dict[str, Contender]:
    """torch's own linear in each of DENSE."""
    found = {}
    for name, dtype in DENSE.items():
        bits = 8.0 * dtype.itemsize
        count = _count(shape, bits, device)
        copies = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
        found[name] = Contender("torch", bits, dtype, copies, _dense_product)
    return found


def packed(codec: Codec, shape: tuple[int, int], device: str) -> Contender:
    """One of ours, with random codes."""
    first = random_packed(codec, shape)
    bits = first.bits_per_weight
    first = first.to(device)
    copies = [first, *(_clone(first) for _ in range(_count(shape, bits, device) - 1))]
    return Contender("ours", bits, DENSE[AGAINST[device]], copies, _packed_product)


def foreign(peer: Peer, shape: tuple[int, int], device: str, training: bool) -> Contender:
    """Layers of another library; raises what `Peer.layer` raises."""
    weight = torch.randn(shape, device=device) / math.sqrt(shape[1])
    bits = peer.bits(shape)
    copies = [peer.layer(weight, training) for _ in range(_count(shape, bits, device))]
    return Contender("peer", bits, peer.dtype, copies, _peer_product)


def _count(shape: tuple[int, int], bits: float, device: str) -> int:
    return copies_for(shape[0] * shape[1] * bits / 8, cache_bytes(device))


def _clone(packed: Packed) -> Packed:
    params = {name: ops.huge_pages(p.clone()) for name, p in packed.params.items()}
    return Packed(packed.codec, packed.shape, ops.huge_pages(packed.codes.clone()), params)


def _dense_product(weight: Tensor, x: Tensor, train: bool) -> tuple[Tensor, list[Tensor]]:
    leaf = weight.detach().requires_grad_() if train else weight
    return nn.functional.linear(x, leaf), [leaf] if train else []


def _packed_product(packed: Packed, x: Tensor, train: bool) -> tuple[Tensor, list[Tensor]]:
    if not train:
        return packed.linear(x), []
    params = {
        name: p.detach().requires_grad_(p.is_floating_point()) for name, p in packed.params.items()
    }
    leaves = [p for p in params.values() if p.requires_grad]
    return Packed(packed.codec, packed.shape, packed.codes, params).linear(x), leaves


def _peer_product(layer: nn.Module, x: Tensor, train: bool) -> tuple[Tensor, list[Tensor]]:
    return layer(x), []


def case(one: Contender, x: Tensor, backward: str) -> Run:
    """A function of a running number that multiplies by one copy after the other."""

    def forward(i: int) -> object:
        with torch.no_grad():
            return one.product(one.copies[i % len(one.copies)], x, False)

    def both(i: int) -> object:
        inner = x.detach().requires_grad_()
        y, leaves = one.product(one.copies[i % len(one.copies)], inner, backward == "all")
        return torch.autograd.grad(y, [inner, *leaves], torch.ones_like(y))

    return forward if backward == "none" else both
