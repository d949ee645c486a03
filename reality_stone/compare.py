"""The rate-distortion table: every codec on every matrix of a safetensors file."""

from __future__ import annotations

import csv
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import bench, tensorfile
from .codecs import REGISTRY, Codec
from .draw import pyplot

BITS = (2.0, 3.0, 4.0)
PLOTTED = 9.0  # bits per weight; what lies beyond would squeeze the rest of a plot


@dataclass(frozen=True)
class Row:
    """One codec on one matrix. `db` is the distance from the Shannon bound 2^(-2R) of a Gaussian
    source at the true rate; speeds in million weights a second; times of a product at batch 1 with
    the weight as warm in the cache as it happens to be."""

    tensor: str
    shape: tuple[int, int]
    codec: str
    bits_per_weight: float
    nmse: float
    db: float
    encode_mws: float
    decode_mws: float
    linear_us: float
    torch_us: float

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Skipped:
    """A codec that could not do a matrix, and why."""

    tensor: str
    codec: str
    reason: str


def settings(names: Sequence[str | Codec], bits: Sequence[float] | None = None) -> list[Codec]:
    """Codecs to compare. A name stands for its settings at those of `bits` that it has; without
    `bits` at all its rates, and at 2, 3 and 4 where it has any."""
    found: list[Codec] = []
    for name in names:
        if isinstance(name, Codec):
            found.append(name)
            continue
        if name not in REGISTRY:
            raise ValueError(
                f"unknown codec {name!r}, this release has {', '.join(sorted(REGISTRY))}"
            )
        kind, usual = REGISTRY[name], []
        rates = bits or sorted(kind.rates) or BITS
        for rate in rates:
            try:
                usual.append(kind.at_bits(rate))
            except ValueError:
                continue
        if not usual:
            asked = ", ".join(f"{rate:g}" for rate in rates)
            raise ValueError(f"{name} has no settings at {asked} bits")
        found += usual
    return list(dict.fromkeys(found))


def matrices(
    path: str | os.PathLike[str], limit: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The two-dimensional floating-point tensors of a file as float32, in its order."""
    header = tensorfile.read_header(Path(path))
    chosen = [e for e in header.entries.values() if len(e.shape) == 2 and 0 not in e.shape]
    chosen = [e for e in chosen if e.dtype.is_floating_point][:limit]
    if not chosen:
        raise ValueError(f"{path}: there is no floating-point matrix in this file")
    with header.path.open("rb") as file:
        for entry in chosen:
            yield entry.name, tensorfile.read_tensor(header, entry, file).float()


def compare(
    path: str | os.PathLike[str],
    codecs: Sequence[Codec],
    limit: int | None = None,
    progress: bool = True,
) -> Iterator[Row | Skipped]:
    """Encode every matrix of `path` with every codec. Raises FileNotFoundError or ValueError."""
    todo = list(matrices(path, limit))
    bar = tqdm(
        total=len(todo) * len(codecs), desc="compare", leave=False, disable=not progress or None
    )
    with bar:
        for name, weight in todo:
            for codec in codecs:
                bar.set_postfix_str(f"{name} {codec.spec}", refresh=True)
                try:
                    yield measure(name, weight, codec)
                except ValueError as error:
                    yield Skipped(name, codec.spec, str(error))
                bar.update()


def measure(name: str, weight: Tensor, codec: Codec) -> Row:
    """Rate, distortion and speed of one codec on one matrix."""
    started = time.perf_counter()
    packed = codec.encode(weight, label=name)
    encode = time.perf_counter() - started
    decoded = packed.decode()
    power = weight.double().pow(2).sum().item()
    if power == 0:
        raise ValueError(f"{name} is all zero, so its relative error is not defined")
    nmse = (weight.double() - decoded.double()).pow(2).sum().item() / power
    x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        timing = bench.interleaved(
            {
                "decode": lambda _: packed.decode(),
                "linear": lambda _: packed.linear(x),
                "torch": lambda _: torch.nn.functional.linear(x, weight),
            },
            turns=5,
            turn_seconds=0.005,
        )
    million = weight.numel() / 1e6
    rate = packed.bits_per_weight
    return Row(
        tensor=name,
        shape=(weight.shape[0], weight.shape[1]),
        codec=codec.spec,
        bits_per_weight=rate,
        nmse=nmse,
        db=decibels(nmse, rate),
        encode_mws=million / encode,
        decode_mws=million / timing["decode"].seconds,
        linear_us=timing["linear"].seconds * 1e6,
        torch_us=timing["torch"].seconds * 1e6,
    )


def decibels(nmse: float, rate: float) -> float:
    """10 log10 of the error over the Shannon bound 2^(-2 rate); minus infinity without error."""
    return 10 * math.log10(nmse) + 20 * rate * math.log10(2) if nmse > 0 else -math.inf


def summary(rows: Iterable[Row]) -> list[Row]:
    """One row a codec over all matrices: rates and errors weighted by size, speeds by work."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.codec, []).append(row)
    return sorted((_mean(rows) for rows in groups.values()), key=lambda r: r.bits_per_weight)


def _mean(rows: list[Row]) -> Row:
    sizes = [row.shape[0] * row.shape[1] for row in rows]
    total = sum(sizes)

    def weighted(values: Iterable[float]) -> float:
        return sum(v * n for v, n in zip(values, sizes, strict=True)) / total

    rate = weighted(row.bits_per_weight for row in rows)
    nmse = weighted(row.nmse for row in rows)
    return Row(
        tensor=f"{len(rows)} matrices",
        shape=(0, 0),
        codec=rows[0].codec,
        bits_per_weight=rate,
        nmse=nmse,
        db=decibels(nmse, rate),
        encode_mws=1 / weighted(1 / row.encode_mws for row in rows),
        decode_mws=1 / weighted(1 / row.decode_mws for row in rows),
        linear_us=sum(row.linear_us for row in rows),
        torch_us=sum(row.torch_us for row in rows),
    )


def write_csv(rows: Iterable[Row], path: str | os.PathLike[str]) -> None:
    """One line a row, the field names first; a shape is written as OUTxIN."""
    names = [f.name for f in fields(Row)]
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = asdict(row) | {"shape": f"{row.shape[0]}x{row.shape[1]}"}
            writer.writerow([values[name] for name in names])


def plot(rows: Iterable[Row], path: str | os.PathLike[str], title: str = "") -> None:
    """Error over true rate with the Shannon bound; PNG, SVG or PDF by the file's ending. Settings
    beyond PLOTTED bits are left out where there are others, and the axis says so."""
    plt = pyplot()
    points: dict[str, list[tuple[float, float]]] = {}
    means = summary(rows)
    beyond = [row for row in means if row.bits_per_weight > PLOTTED]
    for row in means if len(beyond) == len(means) else [r for r in means if r not in beyond]:
        points.setdefault(row.codec.split("(")[0], []).append((row.bits_per_weight, row.nmse))
    # From the nearest to the bound to the farthest, so that the legend is a ranking.
    nearest = {name: min(decibels(e, r) for r, e in found) for name, found in points.items()}
    figure, axes = plt.subplots(figsize=(9, 5.5))
    styles = itertools.product(("-", ":"), ("o", "s", "^", "D", "v", "P", "X", "*"))
    colours = plt.get_cmap("tab10").colors
    for i, name in enumerate(sorted(points, key=nearest.get)):
        line, marker = next(styles)
        axes.plot(
            *zip(*sorted(points[name]), strict=True),
            linestyle=line, marker=marker, markersize=5, linewidth=1.2,
            color=colours[i % 10], label=f"{name}, {nearest[name]:.1f} dB",
        )  # fmt: skip
    top = max((rate for found in points.values() for rate, _ in found), default=4.0)
    rates = [top * i / 50 for i in range(51)]
    axes.plot(rates, [2 ** (-2 * r) for r in rates], "k--", label="Shannon bound, Gaussian")
    label = "bits per weight, all counted"
    if beyond and len(beyond) < len(means):
        label += f" (settings above {PLOTTED:g} left out: {len(beyond)})"
    axes.set(xlabel=label, ylabel="normalised squared error", title=title)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=8,
        title="best distance from the bound",
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
