"""Execute the notebooks of this folder, each in a fresh kernel; any error fails the run."""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of this folder")
    parser.add_argument("--quick", action="store_true", help="the small budgets of CI")
    parser.add_argument("--timeout", type=int, default=900, help="seconds a cell may take")
    parser.add_argument("--out", type=Path, help="folder for the executed copies")
    args = parser.parse_args()
    if args.quick:
        os.environ["QUICK"] = "1"  # the kernels inherit it
    failed = 0
    for path in args.notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        start, problem = time.perf_counter(), ""
        client = NotebookClient(
            notebook, timeout=args.timeout, kernel_name="python3",
            resources={"metadata": {"path": str(FOLDER)}},
        )  # fmt: skip
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            problem, failed = str(error), failed + 1
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, args.out / path.name)
        verdict = "FAILED" if problem else "ok"
        print(f"{path.name}: {verdict} in {time.perf_counter() - start:.0f} s", flush=True)
        if problem:
            print(problem, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
