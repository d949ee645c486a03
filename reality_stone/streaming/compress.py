"""Compressing a model directory in memory of about its largest tensor, or block."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .. import checkpoint, tensorfile
from ..codecs import Codec
from ..compress import LayerReport, Report
from ..layer_plan import Plan
from . import encoding, journal
from .assembly import Assembly, remove
from .calibrated import Calibrated
from .journal import Journal, Record
from .layout import Layout, plan_layout
from .team import Team, team


@dataclass(frozen=True)
class Run:
    """One compression: from `source` to `target`, kept in `place` until it is complete."""

    source: Path
    target: Path
    layout: Layout
    seed: int
    calibrated: Calibrated | None = None

    @property
    def place(self) -> Path:
        return self.target.with_name(f"{self.target.name}.partial")

    def settings(self) -> dict[str, Any]:
        """What the codes follow from, besides source and plan."""
        own = {"seed": self.seed}
        return own if self.calibrated is None else own | {"calibration": self.calibrated.digest}

    def files(self) -> list[dict[str, Any]]:
        """Name, size and sha256 of the header of each file of the source."""
        headers = self.layout.header.shards or (self.layout.header,)
        return [
            {"file": h.path.name, "bytes": h.size, "header": tensorfile.header_digest(h.path)}
            for h in headers
        ]

    def job(self) -> dict[str, Any]:
        """What must be the same for the run to go on."""
        paths = [self.source / f["file"] for f in self.files()]
        config = (self.source / checkpoint.CONFIG).read_bytes()
        return {
            "version": journal.VERSION,
            "settings": self.settings() | self.layout.quantization,
            "source": {
                "files": self.files(),
                "written": [path.stat().st_mtime_ns for path in paths],
                "config": hashlib.sha256(config).hexdigest(),
            },
        }


def compress_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: float = 2.5,
    codec: str | Codec = "trellis",
    *,
    calibration: Tensor | None = None,
    plan: Plan | Sequence[tuple[str, str | Codec | None]] = (),
    batch: int = 16,
    skip: Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> Report | None:
    """Compress the dense model in `source` to the directory `target`; codes as rs.compress's.

    Arguments as there; calibration is None or token ids (n, length). With it the model runs block
    by block, in memory of one dense block, the hidden states of all tokens, and the second moments
    of a layer's input; NeedsWholeModel, a ValueError, where it cannot.
    What is done is kept in target + ".partial" until all is: after an interrupt or a full disk, a
    call with `resume` goes on, and ends in the same bytes. Under torchrun the processes share the
    work, without calibration; the report is None but on rank 0.
    Raises FileNotFoundError or ValueError in one sentence, OSError where the disk does not take it.
    """
    with team() as group:

        def prepare() -> Run:
            with warnings.catch_warnings():
                if not group.leads:  # what is worth a warning is said once
                    warnings.simplefilter("ignore")
                goal = checkpoint.check_target(target)
                if calibration is not None and group.size > 1:
                    raise ValueError(
                        "calibration takes the blocks one after the other: start one process "
                        "instead of torchrun's several"
                    )
                layout = plan_layout(Path(source), bits, codec, plan, skip)
                if calibration is None:
                    return Run(Path(source), goal, layout, seed)
                calibrated = Calibrated.prepare(layout, calibration, batch)
                return Run(Path(source), goal, layout, seed, calibrated)

        run = group.each(prepare)
        with _told(run), ExitStack() as stack:
            return _work(run, group, resume, progress, stack)


def _work(run: Run, group: Team, resume: bool, progress: bool, stack: ExitStack) -> Report | None:
    start = time.perf_counter()
    layout, assembly = run.layout, Assembly(run.place, run.layout)
    entries = {target.entry.name: target.entry for target in layout.targets}
    kept = Journal(run.place, entries, group.rank)
    group.lead(lambda: _open(run, kept, assembly, resume, stack))
    bar = tqdm(
        total=assembly.tensors, desc="compress", unit="tensor", leave=False,
        disable=None if progress and group.leads else True,
    )  # fmt: skip
    with bar:
        if run.calibrated is None:
            # Read once for all: a rank that is late would find the work of others kept already.
            done = group.lead(lambda: frozenset(kept.read()))
            group.each(lambda: _encode(run, kept, done, assembly, group, bar))
        else:
            tables = _tables(run)
            run.calibrated.encode(kept, assembly.shard_of, tables, run.seed, bar)
        if not group.leads:
            return None
        records = kept.read()
        bar.update(len(records) - bar.n)
        assembly.build(records, lambda name: bar.update())
    assembly.finish(run.target, _manifest(run))
    remove(run.place)
    return _report(layout, records, time.perf_counter() - start)


def _open(run: Run, kept: Journal, assembly: Assembly, resume: bool, stack: ExitStack) -> None:
    """Begin or go on; the place is this process's until `stack` is closed."""
    run.place.parent.mkdir(parents=True, exist_ok=True)
    goes_on = journal.open_job(run.place, run.job(), resume)
    stack.enter_context(_lock(run.place))
    stack.callback(_tidy, run.place)
    if goes_on:
        kept.repair(assembly.repair())
    if journal.kept_common(run.place) is None:
        tables = encoding.common_tables(run.layout.targets, run.seed)
        if tables:
            journal.keep_common(run.place, tables)


def _encode(
    run: Run, kept: Journal, done: Set[str], assembly: Assembly, group: Team, bar: tqdm
) -> None:
    """This rank's share of the layers that are not yet done."""
    targets = run.layout.targets
    tables = _tables(run)
    left = [t for t in targets if t.entry.name not in done]
    bar.update(len(done))
    for i in group.share([t.entry.shape[0] * t.entry.shape[1] for t in left]):
        target, start = left[i], time.perf_counter()
        name, codec = target.entry.name, target.entry.codec
        bar.set_postfix_str(name)
        try:
            packed, error = encoding.encode(target, run.seed, tables[codec])
        except ValueError as wrong:
            raise ValueError(f"{name}: {wrong}") from None
        kept.add(packed, name, assembly.shard_of(name), error, time.perf_counter() - start)
        bar.update()


def _tables(run: Run) -> dict[Codec, dict[str, Tensor]]:
    return encoding.given_tables(run.layout.targets, journal.kept_common(run.place) or {})


def _manifest(run: Run) -> dict[str, Any]:
    from .. import __version__

    layout = run.layout
    return {
        "version": journal.VERSION, "written_by": f"reality-stone {__version__}",
        "source": run.files(), "settings": run.settings(),
        "left_dense": sorted(layout.report.skipped), "left_out": layout.left_out,
    }  # fmt: skip


def _report(layout: Layout, records: Mapping[str, Record], seconds: float) -> Report:
    """As of rs.compress: a table that several layers share counts in the first."""
    report = replace(layout.report, layers=[], seconds=seconds)
    seen: set[tuple] = set()
    for target in layout.targets:
        record, entry = records[target.entry.name], target.entry
        bits = 0
        for name, tensor in record.tensors.items():
            own = name.removeprefix(entry.prefix)
            table = (entry.codec, own, record.digests[name])
            if table not in seen:
                bits += 8 * tensor.bytes
            if own in entry.codec.common:
                seen.add(table)
        weights = max(1, entry.shape[0] * entry.shape[1])
        report.layers.append(
            LayerReport(
                entry.name, entry.shape, entry.codec.spec, bits / weights, record.error,
                record.hessian_error, record.seconds,
            )
        )  # fmt: skip
    return report


def _tidy(place: Path) -> None:
    """Leave nothing behind where nothing was done."""
    if place.exists() and not (place / journal.OUT).exists() and not any(place.glob("*.bin")):
        remove(place)


@contextmanager
def _told(run: Run) -> Iterator[None]:
    """Say in an error or an interrupt how the run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if not run.place.exists():
            raise
        raise KeyboardInterrupt(
            f"what is done is kept in {run.place}; the same call with --resume goes on"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        kept = f"; what is done is kept in {run.place}, the same call with --resume goes on"
        raise OSError(
            f"{run.target}: the checkpoint could not be written: {reason}"
            + (kept if run.place.exists() else "")
        ) from error


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    """Two runs must not write to one place; the lock goes with the process that holds it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (place / journal.JOB).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{place}: another process is at work on this run") from None
        yield
