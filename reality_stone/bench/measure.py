"""Time the linear of codecs beside torch and other libraries, in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from .. import ops
from ..codecs import Codec
from . import contenders, roofline
from .contenders import AGAINST, Contender
from .peers import Peer
from .timing import Run, device_seconds, graphed, host_seconds, interleaved


@dataclass(frozen=True)
class How:
    """`backward` is "none", "input" or "all": gradients of the input, or also of everything
    trainable (params of a codec, the weight of torch). `accuracy` is that of the codecs' products
    (`ops.accuracy`). `roofline` measures the limits too. `limit` are seconds for a shape and batch,
    beyond which there are fewer turns."""

    backward: str = "none"
    accuracy: str = "auto"
    device: str = "cpu"
    roofline: bool = True
    turns: int = 11
    turn_seconds: float = 0.03
    limit: float = 15.0

    def __post_init__(self) -> None:
        if self.backward not in roofline.PASSES:
            raise ValueError(
                f"backward is one of {', '.join(roofline.PASSES)}, got {self.backward!r}"
            )
        if self.accuracy not in ops.ACCURACIES:
            raise ValueError(
                f"accuracy is one of {', '.join(ops.ACCURACIES)}, got {self.accuracy!r}"
            )
        if self.device not in AGAINST:
            raise ValueError(f"device is one of {', '.join(AGAINST)}, got {self.device!r}")


@dataclass(frozen=True)
class Result:
    """One row of the table. `speedup` is over `against` at the same shape, batch and backward.

    `share` is that of the limit named by `bound`, "memory" or "compute"; both limits are beside it
    in bytes and operations a second, all None where they were not measured.
    """

    shape: tuple[int, int]
    batch: int
    what: str
    kind: str  # ours, torch or peer
    backward: str
    accuracy: str
    device: str
    bits_per_weight: float
    seconds: float
    spread: float
    speedup: float
    against: str
    share: float | None
    bound: str | None
    memory_limit: float | None
    compute_limit: float | None
    copies: int
    threads: int
    isa: str

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Failed:
    """A peer that is not there or could not do a shape and batch, and why."""

    shape: tuple[int, int]
    batch: int
    what: str
    backward: str
    reason: str

    def to_json(self) -> dict:
        return asdict(self)


def check_device(name: str) -> None:
    """ValueError with one sentence where there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"there is no GPU that torch {torch.__version__} can use; run with --device cpu"
        )


def bench(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    codecs: Sequence[Codec],
    peers: Sequence[Peer] = (),
    how: How = How(),
    progress: bool = True,
) -> Iterator[Result | Failed]:
    """Every codec beside torch in float32 and bfloat16 and beside peers, for each shape and batch.

    Activations are float32 on a CPU and bfloat16 on a GPU, those of torch bfloat16 and of a peer
    its own. Peers train nothing but the input. ValueError where there is no such device.
    """
    check_device(how.device)
    limits = None
    if how.roofline:
        limits = roofline.Limits(torch.device(how.device), contenders.cache_bytes(how.device))
    bar = tqdm(
        total=len(shapes) * len(batches), desc="bench", leave=False, disable=not progress or None
    )
    with bar:
        for shape in shapes:
            found = contenders.dense(shape, how.device)
            for codec in codecs:
                found[codec.spec] = contenders.packed(codec, shape, how.device)
            reasons = {}
            for peer in peers:
                try:
                    found[peer.name] = contenders.foreign(
                        peer, shape, how.device, how.backward != "none"
                    )
                except Exception as error:  # whatever another library raises
                    reasons[peer.name] = _reason(error)
            for batch in batches:
                with ops.accuracy(how.accuracy):  # not while the caller has a row
                    rows = list(_turns(found, limits, dict(reasons), shape, batch, how))
                yield from rows
                bar.update()


def _turns(
    layers: dict[str, Contender],
    limits: roofline.Limits | None,
    reasons: dict[str, str],
    shape: tuple[int, int],
    batch: int,
    how: How,
) -> Iterator[Result | Failed]:
    """All layers at one batch, in the same turns with the machine's limits."""
    cuda = how.device == "cuda"
    cases: dict[str, Run] = {}
    for name, one in layers.items():
        x = torch.randn(batch, shape[1], device=how.device).to(one.dtype)
        run = contenders.case(one, x, how.backward)
        try:
            run(0)
            cases[name] = graphed(run, len(one.copies)) if cuda else run
        except Exception as error:
            if one.kind != "peer":
                raise
            reasons[name] = _reason(error)
    if limits is not None:
        cases |= limits.cases
    found = interleaved(
        cases, turns=how.turns, turn_seconds=how.turn_seconds, limit=how.limit,
        clock=device_seconds if cuda else host_seconds,
    )  # fmt: skip
    ceiling = None if limits is None else limits.ceiling(found)
    seconds = {
        name: found[name].seconds / (len(one.copies) if cuda else 1)  # a graph runs all copies
        for name, one in layers.items()
        if name in found
    }
    for name, reason in reasons.items():
        yield Failed(shape, batch, name, how.backward, reason)
    for name, one in layers.items():
        if name not in seconds:
            continue
        share = bound = None
        if ceiling is not None:
            share, bound = roofline.share(
                one.work(shape, batch, how.backward), seconds[name], ceiling
            )
        yield Result(
            shape=shape,
            batch=batch,
            what=name,
            kind=one.kind,
            backward=how.backward,
            accuracy=how.accuracy,
            device=how.device,
            bits_per_weight=one.bits,
            seconds=seconds[name],
            spread=found[name].spread,
            speedup=seconds[AGAINST[how.device]] / seconds[name],
            against=AGAINST[how.device],
            share=share,
            bound=bound,
            memory_limit=ceiling and ceiling.bytes,
            compute_limit=ceiling and ceiling.flops,
            copies=len(one.copies),
            threads=torch.get_num_threads(),
            isa=how.device if cuda else ops.isa(),
        )


def _reason(error: Exception) -> str:
    """The first line of what a library says."""
    text = str(error).strip().split("\n")[0]
    if text and isinstance(error, (ImportError, ValueError)):
        return text
    return f"{type(error).__name__}: {text}"
