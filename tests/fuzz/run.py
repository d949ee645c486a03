"""Coverage-guided fuzzing of everything that reads untrusted bytes (atheris, libFuzzer inside).

    python tests/fuzz/run.py --seconds 600          each target for that long, two at a time
    python tests/fuzz/run.py --target config FILE   one input again

Prints what each target did; the exit code is 1 when one found something, and its input is kept.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("header", "config", "weights", "codes", "index", "journal", "codec", "plan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=600, help="for each target (default 600)")
    parser.add_argument("--target", choices=NAMES, help="only this one, in this process")
    parser.add_argument("--jobs", type=int, default=2, help="targets at once (default 2)")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="corpus and findings")
    parser.add_argument("files", nargs="*", type=Path, help="inputs to run again")
    args = parser.parse_args()
    if args.target:
        fuzz(args)
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        clean = list(pool.map(lambda name: child(name, args), NAMES))
    failed = [name for name, ok in zip(NAMES, clean, strict=True) if not ok]
    if failed:
        raise SystemExit(f"found something: {', '.join(failed)}; inputs are in {args.keep}")


def child(name: str, args: argparse.Namespace) -> bool:
    """One target in a process of its own: libFuzzer ends the process when its time is over."""
    command = [sys.executable, str(Path(__file__)), "--target", name]
    command += ["--seconds", str(args.seconds), "--keep", str(args.keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    runs = re.findall(r"Done (\d+) runs in (\d+) second", done.stderr)
    if done.returncode == 0 and runs:
        coverage = re.findall(r"cov: (\d+)", done.stderr)
        print(f"{name}: clean, {int(runs[-1][0]):,} inputs in {runs[-1][1]} s, "
              f"{coverage[-1] if coverage else '?'} edges", flush=True)  # fmt: skip
        return True
    print(f"{name}: exit code {done.returncode}\n{done.stderr[-4000:]}", flush=True)
    return False


def fuzz(args: argparse.Namespace) -> None:
    import atheris

    with atheris.instrument_imports(include=["reality_stone"]):
        import targets
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    target = targets.TARGETS[args.target]
    room = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=room) as scratch:
        folder = Path(scratch)
        corpus = args.keep / args.target
        corpus.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(target.seeds(folder)):
            (corpus / f"seed{i}").write_bytes(seed)
        options = [f"-max_total_time={args.seconds}", "-timeout=20", "-rss_limit_mb=4096",
                   "-max_len=16384", f"-artifact_prefix={args.keep}/{args.target}-"]  # fmt: skip
        where = [str(f) for f in args.files] or [str(corpus)]
        atheris.Setup(
            [sys.argv[0], *options, *where], lambda data: bool(target.run(data, folder)) and None
        )
        atheris.Fuzz()


if __name__ == "__main__":
    sys.path[:0] = [str(HERE)]
    main()
