"""Kill compressions at random moments and go on: a program, so that it can fork before any thread.

    python tests/kills.py SOURCE DIRECTORY --times 20 --steps 10 [--codec uniform] [--windows 8]

Prints a JSON list with one object for each kill: what was kept when it came, and the names of files
that differ in the end from those of a run that nobody killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from reality_stone.streaming import compress_checkpoint, journal


def run(source: Path, *options: str) -> list[dict]:
    """What this program prints for `source` and these options; for tests."""
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # fsync costs nothing there
    with tempfile.TemporaryDirectory(dir=home) as directory:
        done = subprocess.run(
            [sys.executable, __file__, source, directory, *options],
            capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def child(work: Callable[[], object]) -> int:
    """Start `work` in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        warnings.simplefilter("ignore")
        work()
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def killed_after(seconds: float, work: Callable[[], object]) -> int:
    pid = child(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return wait(pid)


def killed_at(step: int, work: Callable[[], object]) -> int:
    """Killed right before the step-th call that settles something on the disk."""
    left = [step]

    def last(real: Callable) -> Callable:
        def call(*args, **more):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **more)

        return call

    def run() -> None:
        for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, last(getattr(os, name)))
        work()

    return wait(child(run))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--codec", default="uniform(bits=4, group=16)")
    parser.add_argument("--windows", type=int, default=0, help="of calibration, 12 tokens each")
    args = parser.parse_args()
    tokens = None
    if args.windows:
        from transformers import LlamaForCausalLM  # noqa: F401  once, before any fork

        tokens = torch.arange(args.windows * 12).view(-1, 12) * 7 % 61
    rng = random.Random(0)

    def run(target: Path, resume: bool) -> Callable[[], object]:
        return lambda: compress_checkpoint(
            args.source, target, codec=args.codec, calibration=tokens, batch=4, resume=resume,
            progress=False,
        )  # fmt: skip

    whole = args.directory / "whole"
    took = []
    for name in ("warm", "whole"):
        start = time.perf_counter()
        assert wait(child(run(args.directory / name, False))) == 0
        took.append(time.perf_counter() - start)
    kills = [("time", rng.uniform(0, took[1])) for _ in range(args.times)]
    kills += [("step", step) for step in rng.sample(range(60), args.steps)]
    found = []
    for i, (kind, when) in enumerate(kills):
        target = args.directory / str(i)
        kill = killed_after if kind == "time" else killed_at
        while (code := kill(when, run(target, False))) == 0:  # it was done before
            shutil.rmtree(target)
            when /= 2
        partial = target.with_name(f"{i}.partial")
        kept = sum(len(list(journal.lines(p))) for p in partial.glob("0*.jsonl"))
        shards = len(list(journal.lines(partial / journal.SHARDS)))
        assert wait(child(run(target, True))) == 0
        ours, wanted = content(target), content(whole)
        found.append({
            "kind": kind, "when": when, "killed": code == -signal.SIGKILL, "kept": kept,
            "shards": shards, "left": partial.exists(),
            "differ": sorted(n for n in {*ours, *wanted} if ours.get(n) != wanted.get(n)),
        })  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
