"""Time the linear of codecs beside torch: turns in A B A B order, weights larger than the cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import ops
from .codecs import Codec
from .packed import Packed

STRIP = 16  # least rows that are encoded to get valid params
DENSE = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median over turns, and half the middle 80 % as a share of the median."""

    seconds: float
    spread: float
    turns: int


@dataclass(frozen=True)
class Result:
    """One row of the table: `speedup` is against torch float32 of the same shape and batch."""

    shape: tuple[int, int]
    batch: int
    what: str
    backward: bool
    bits_per_weight: float
    seconds: float
    spread: float
    speedup: float
    copies: int
    threads: int
    isa: str

    def to_json(self) -> dict:
        return asdict(self)


def interleaved(
    cases: Mapping[str, Callable[[int], object]], *, turns: int = 11, turn_seconds: float = 0.03
) -> dict[str, Timing]:
    """Time every case in turns, A B C A B C ..., so that slow phases of the machine hit all alike.

    A case is called with a running number, by which it picks its copy of the weights. A turn calls
    it often enough to last about `turn_seconds`.
    """
    calls: dict[str, int] = {}
    for name, run in cases.items():
        run(0)
        started = time.perf_counter()
        run(1)
        once = max(time.perf_counter() - started, 1e-7)
        calls[name] = max(1, round(turn_seconds / once))
    taken: dict[str, list[float]] = {name: [] for name in cases}
    at = dict.fromkeys(cases, 0)
    for _ in range(turns):
        for name, run in cases.items():
            first, last = at[name], at[name] + calls[name]
            started = time.perf_counter()
            for i in range(first, last):
                run(i)
            taken[name].append((time.perf_counter() - started) / calls[name])
            at[name] = last
    return {name: _timing(values) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    cut = len(ordered) // 10
    middle = statistics.median(ordered)
    return Timing(middle, (ordered[-1 - cut] - ordered[cut]) / 2 / middle, len(ordered))


def cache_bytes() -> int:
    """Size of the last-level cache as Linux tells it; 32 MiB where it does not."""
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


def bench(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    codecs: Sequence[Codec],
    *,
    backward: bool = False,
    turns: int = 11,
    turn_seconds: float = 0.03,
    progress: bool = True,
) -> Iterator[Result]:
    """Every codec beside torch in float32 and bfloat16, one result each for a shape and batch.

    Forward, or with `backward` forward and the gradients of the input and of everything trainable
    (params of a codec, the weight of torch). Activations are float32; bfloat16 for torch bfloat16.
    """
    bar = tqdm(
        total=len(shapes) * len(batches), desc="bench", leave=False, disable=not progress or None
    )
    with bar:
        for shape in shapes:
            weights: dict[str, list] = {}
            bits: dict[str, float] = {}
            for name, dtype in DENSE.items():
                count = copies_for(shape[0] * shape[1] * dtype.itemsize)
                weights[name] = [torch.randn(shape).to(dtype) for _ in range(count)]
                bits[name] = 8.0 * dtype.itemsize
            for codec in codecs:
                first = random_packed(codec, shape)
                count = copies_for(first.bits / 8)
                weights[codec.spec] = [first, *(_clone(first) for _ in range(count - 1))]
                bits[codec.spec] = first.bits_per_weight
            for batch in batches:
                cases = {
                    name: _case(copies, batch, shape[1], backward)
                    for name, copies in weights.items()
                }
                found = interleaved(cases, turns=turns, turn_seconds=turn_seconds)
                base = found["torch float32"].seconds
                for name, timing in found.items():
                    yield Result(
                        shape=shape,
                        batch=batch,
                        what=name,
                        backward=backward,
                        bits_per_weight=bits[name],
                        seconds=timing.seconds,
                        spread=timing.spread,
                        speedup=base / timing.seconds,
                        copies=len(weights[name]),
                        threads=torch.get_num_threads(),
                        isa=ops.isa(),
                    )
                bar.update()


def _clone(packed: Packed) -> Packed:
    params = {name: p.clone() for name, p in packed.params.items()}
    return Packed(packed.codec, packed.shape, packed.codes.clone(), params)


def _case(
    copies: list[Packed] | list[Tensor], batch: int, features: int, backward: bool
) -> Callable[[int], object]:
    """A function of a running number that multiplies by one copy after the other."""
    first = copies[0]
    dtype = torch.float32 if isinstance(first, Packed) else first.dtype
    x = torch.randn(batch, features).to(dtype)

    def forward(i: int) -> object:
        w = copies[i % len(copies)]
        with torch.no_grad():
            return w.linear(x) if isinstance(w, Packed) else torch.nn.functional.linear(x, w)

    def both(i: int) -> object:
        w = copies[i % len(copies)]
        if isinstance(w, Packed):
            params = {
                name: p.detach().requires_grad_(p.is_floating_point())
                for name, p in w.params.items()
            }
            leaves = [p for p in params.values() if p.requires_grad]
            inner = x.detach().requires_grad_()
            y = Packed(w.codec, w.shape, w.codes, params).linear(inner)
        else:
            leaf = w.detach().requires_grad_()
            leaves, inner = [leaf], x.detach().requires_grad_()
            y = torch.nn.functional.linear(inner, leaf)
        return torch.autograd.grad(y, [inner, *leaves], torch.ones_like(y))

    return both if backward else forward
