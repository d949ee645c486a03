"""Everything that wants a GPU, in one run: build, tests, sanitizer, benchmarks.

    python benchmarks/gpu.py [STEP ...] [--out DIR] [--limit SECONDS]     # or: make gpu

Uses the Python that runs it and what is installed there (torch built for CUDA, nvcc, pytest) and
installs nothing. A step that fails or takes too long is reported and the rest still run. Steps that
would start after --limit, and all without a GPU, are reported as not run. --out gets log.txt and a
JSON file a benchmark, for docs/measurements.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 690  # seconds of all steps
TOOLKIT = "/usr/local/cuda/bin"  # looked into last
LAST = 25  # lines of a step that are shown as well as logged

# Matrices of 58.7 million weights, at the batches that the targets name.
LARGE = ("--shapes", "14336x4096", "--no-peers")
CODECS = (
    "trellis(bits=2),trellis(bits=3),trellis(bits=4),uniform(bits=4),uniform(bits=8),"
    "palette(bits=3),palette(bits=4),hierarchical,cyclic(activation=int8),cyclic,bitfield"
)
ENCODED = (
    "trellis(bits=2),trellis(bits=3),trellis(bits=4),uniform(bits=4),uniform(bits=8),"
    "palette(bits=4),palette(layout=pair),vq_cyclic"
)
TESTS = (
    "tests/test_cuda.py",
    "tests/test_cuda_encode.py",
    "tests/test_bench.py::test_a_graph_runs_every_copy_once",
    "tests/test_bench.py::test_bench_runs_on_a_gpu",
)
# A test of every kind of kernel, small enough for a checker that slows all of them down.
CHECKED = (
    "tests/test_cuda.py::test_codes_at_any_address_decode_alike",
    "tests/test_cuda.py::test_activations_at_any_address_multiply_alike",
    "tests/test_cuda.py::test_products_straight_from_runs_of_codes_are_exact_but_for_rounding",
    "tests/test_cuda.py::test_input_gradients_straight_from_runs_of_codes_are_exact_but_for_rounding",
    "tests/test_cuda.py::test_trellis_products_shared_by_blocks_agree_and_repeat",
    "tests/test_cuda.py::test_int8_products_have_the_bits_of_the_host",
    "tests/test_cuda.py::test_gradients_of_params_through_a_product_agree",
    "tests/test_cuda.py::test_hadamard_gives_the_same_bits",
    "tests/test_cuda_encode.py::test_many_tiles_are_searched_alike_in_any_order_of_threads",
    "tests/test_cuda_encode.py::test_encoding_gives_the_codes_of_the_cpu",
)
# Racecheck and synccheck look at shared memory, in which only our kernels interest. The others must
# see what torch's kernels write.
OURS = ("--kernel-name", "kns=2rs4cuda")  # part of a mangled name
SANITIZERS = {"memcheck": OURS, "racecheck": OURS, "synccheck": OURS, "initcheck": ()}


@dataclass(frozen=True)
class Step:
    """A command and the seconds it may take. `needs` is a program that it cannot do without."""

    name: str
    command: tuple[str, ...]
    seconds: int
    env: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """`problem` is empty for a step that went well."""

    name: str
    seconds: float
    problem: str


def steps(out: Path) -> list[Step]:
    """All of them in order; their seconds add up to more than LIMIT, which none should need."""
    python = sys.executable
    # The project asks for -q: once more verbose counts the tests, twice names each as it runs.
    pytest = (python, "-m", "pytest", "-v", "--no-header", "--tb=short")
    cuda = {"REQUIRE_CUDA": "1", "OMP_NUM_THREADS": "1"}

    def benchmark(name: str, *options: str, seconds: int) -> Step:
        program = str(ROOT / "benchmarks" / f"{name}.py")
        json = ("--json", str(out / f"{name}.json"))
        return Step(name, (python, program, "--device", "cuda", *options, *json), seconds)

    found = [
        Step("build", (python, "setup.py", "--quiet", "build_ext", "--inplace", "--force"), 240,
             needs="nvcc"),
        Step("doctor", (python, "-m", "reality_stone", "doctor"), 60),
        Step("tests", (*pytest, *_in_processes(), *TESTS), 180, cuda),
    ]  # fmt: skip
    for tool, only in SANITIZERS.items():
        # Each tensor an allocation of its own, so that a step outside it is seen.
        env = cuda | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = (
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "10",
            *only, *pytest, "-v", *CHECKED,
        )  # fmt: skip
        found.append(Step(tool, command, 50, env, "compute-sanitizer"))
    return [
        *found,
        benchmark("linear", *LARGE, "--batches", "1,16,256,4096", "--backward", "none",
                  "--codecs", CODECS, "--turns", "7", seconds=120),
        benchmark("gradients", "--shape", "14336x4096", "--batches", "1,16,256,4096",
                  "--codecs", CODECS, seconds=150),
        benchmark("encoding", "--codecs", ENCODED, "--shape", "2048x4096", seconds=60),
        benchmark("generate", "--graph", "--cases", "bfloat16", "trellis(bits=2)",
                  "uniform(bits=4)", "--tokens", "64", "--turns", "5", seconds=90),
        benchmark("training_step", "--cases", "bfloat16", "bfloat16 lora",
                  "trellis(bits=2) tables", "trellis(bits=2) lora", seconds=90),
    ]  # fmt: skip


def _in_processes() -> tuple[str, ...]:
    """Several at once where pytest-xdist is there."""
    try:
        import xdist  # noqa: F401
    except ImportError:
        return ()
    return "-n", str(min(6, os.cpu_count() or 1))


def no_gpu() -> str:
    """Why nothing can run here, or nothing."""
    try:
        import torch
    except ImportError:
        return "there is no torch, and so no GPU to run on"
    if not torch.cuda.is_available():
        return f"there is no GPU that torch {torch.__version__} can use"
    return ""


def take(step: Step, seconds: float, log: TextIO) -> Outcome:
    """Run a step for at most `seconds`; its output goes to the log, the end of it to the screen."""
    programs = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{TOOLKIT}"
    if step.needs and not shutil.which(step.needs, path=programs):
        return Outcome(step.name, 0, f"not run: there is no {step.needs}")
    began, start = time.monotonic(), log.tell()
    modules = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PATH": programs, "PYTHONPATH": modules} | step.env
    program = shutil.which(step.command[0], path=programs) or step.command[0]
    process = subprocess.Popen(
        (program, *step.command[1:]), cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(timeout=seconds)
        problem = f"failed with exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        problem = f"stopped after {seconds:.0f} s"
    finally:
        _end(process)
    print(*_last_lines(Path(log.name), start), sep="\n", flush=True)
    log.seek(0, os.SEEK_END)
    return Outcome(step.name, time.monotonic() - began, problem)


def _end(process: subprocess.Popen) -> None:
    """End what the step has left of its own process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_lines(path: Path, start: int) -> list[str]:
    with path.open(errors="replace") as file:
        file.seek(start)
        return file.read().splitlines()[-LAST:]


def take_all(chosen: Sequence[Step], limit: float, out: Path) -> list[Outcome]:
    """Each step within its own seconds and what is left of `limit`."""
    began, found = time.monotonic(), []
    why = no_gpu()
    with (out / "log.txt").open("w") as log:
        for step in chosen:
            if why:
                found.append(Outcome(step.name, 0, f"not run: {why}"))
                print(line(found[-1]), flush=True)
                continue
            left = limit - (time.monotonic() - began)
            print(f"\n=== {step.name}", flush=True)
            print(f"\n=== {step.name}: {' '.join(step.command)}", file=log, flush=True)
            if left < 5:
                found.append(Outcome(step.name, 0, f"not run: {limit:.0f} s are over"))
            else:
                found.append(take(step, min(step.seconds, left), log))
            print(line(found[-1]), flush=True)
            print(line(found[-1]), file=log, flush=True)
    return found


def line(outcome: Outcome) -> str:
    seconds = f" ({outcome.seconds:.0f} s)" if outcome.seconds else ""
    return f"{outcome.name}: {outcome.problem or 'done'}{seconds}"


def main(argv: Sequence[str] | None = None) -> int:
    names = [step.name for step in steps(Path())]
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}")
    options.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", metavar="DIR")
    options.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS")
    args = options.parse_args(argv)
    unknown = [name for name in args.steps if name not in names]
    if unknown:
        options.error(f"no step is called {unknown[0]}; they are {', '.join(names)}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in steps(out) if not args.steps or step.name in args.steps]
    found = take_all(chosen, args.limit, out)
    if any(outcome.seconds for outcome in found):
        print("\n=== all", *map(line, found), f"log and JSON in {out}", sep="\n")
    return 1 if any(outcome.problem for outcome in found) else 0


if __name__ == "__main__":
    sys.exit(main())
