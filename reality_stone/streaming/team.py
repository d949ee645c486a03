"""The processes of one torchrun as a team: torch.distributed over gloo, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
# Layers may differ much in their time, and nobody is there to answer while one is encoded.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Team:
    """This process is `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def lead(self, work: Callable[[], T]) -> T:
        """What rank 0's `work` returns, on all; where it fails, rank 0 has the error to tell."""
        result, error = self._try(work if self.leads else None)
        self._settle(error)
        if self.size == 1:
            return result
        box = [result]
        dist.broadcast_object_list(box)
        return box[0]

    def each(self, work: Callable[[], T]) -> T:
        """What `work` returns here; where it fails on any, rank 0 has the first error to tell."""
        result, error = self._try(work)
        self._settle(error)
        return result

    def share(self, sizes: Sequence[int]) -> list[int]:
        """The positions of what is this rank's: the largest goes to who has least so far."""
        loads = [0] * self.size
        mine: list[int] = []
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            rank = loads.index(min(loads))
            loads[rank] += sizes[i]
            if rank == self.rank:
                mine.append(i)
        return sorted(mine)

    def _try(self, work: Callable[[], T] | None) -> tuple[Any, Exception | None]:
        if work is None:
            return None, None
        try:
            return work(), None
        except Exception as error:
            if self.size == 1:
                raise
            return None, error

    def _settle(self, error: Exception | None) -> None:
        """Raise everywhere if any has an error: rank 0 the first one, the others SystemExit."""
        if self.size == 1:
            return
        told: list[Exception | None] = [None] * self.size
        dist.all_gather_object(told, error)
        first = next((e for e in told if e is not None), None)
        if first is not None:
            raise first if self.leads else SystemExit(1)


@contextmanager
def team() -> Iterator[Team]:
    """The team of the process group that is there, or of the one torchrun asks for."""
    if not dist.is_available():
        yield Team()
    elif dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ:
        dist.init_process_group("gloo", timeout=PATIENCE)
        try:
            yield Team(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Team()
