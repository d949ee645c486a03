"""Time functions in turns, A B A B, on the host's clock or on a GPU's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LEAST_TURNS = 3
WARM_UPS = 3  # before a capture: lazy handles and workspaces are made outside the graph

Run = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median over turns, and half the middle 80 % as a share of the median."""

    seconds: float
    spread: float
    turns: int


def host_seconds(run: Run, first: int, last: int) -> float:
    """Seconds of run(first), ..., run(last - 1) by the host's clock."""
    started = time.perf_counter()
    for i in range(first, last):
        run(i)
    return time.perf_counter() - started


def device_seconds(run: Run, first: int, last: int) -> float:
    """The same between two events of the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(first, last):
        run(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    cases: Mapping[str, Run],
    *,
    turns: int = 11,
    turn_seconds: float = 0.03,
    limit: float = math.inf,
    clock: Callable[[Run, int, int], float] = host_seconds,
) -> dict[str, Timing]:
    """Time every case in turns, A B C A B C ..., so that slow phases of the machine hit all alike.

    A case is called with a running number, by which it picks its copy of the weights. A turn calls
    it often enough to last about `turn_seconds`. Where all turns would take more than `limit`
    seconds there are fewer, at least LEAST_TURNS.
    """
    calls: dict[str, int] = {}
    round_seconds = 0.0
    for name, run in cases.items():
        run(0)
        once = max(clock(run, 1, 2), 1e-7)
        calls[name] = max(1, round(turn_seconds / once))
        round_seconds += calls[name] * once
    turns = min(turns, max(LEAST_TURNS, int(min(limit / max(round_seconds, 1e-9), turns))))
    taken: dict[str, list[float]] = {name: [] for name in cases}
    at = dict.fromkeys(cases, 0)
    for _ in range(turns):
        for name, run in cases.items():
            first, last = at[name], at[name] + calls[name]
            taken[name].append(clock(run, first, last) / calls[name])
            at[name] = last
    return {name: _timing(values) for name, values in taken.items()}


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    cut = len(ordered) // 10
    middle = statistics.median(ordered)
    return Timing(middle, (ordered[-1 - cut] - ordered[cut]) / 2 / middle, len(ordered))


def graphed(run: Run, copies: int) -> Run:
    """run(0), ..., run(copies - 1) captured as one CUDA graph; a call replays all of it.

    Copies follow one another in the graph, so that each finds the L2 cache full of the others, and
    a launch costs what it costs in a model that is captured. Raises RuntimeError where `run` does
    something that cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM_UPS):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    return lambda _: graph.replay()
