"""What the numbers of a page were measured on."""

from __future__ import annotations

import os
import platform

import torch

from .. import __version__, ops


def machine(date: str = "") -> dict[str, str]:
    """Processor, memory and versions in words; the date only where one is given."""
    info = ops.build_info()
    memory = 0
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    compiled = f"compiler {info['compiler']}" if info else "not compiled, plain torch"
    found = {
        "Processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "Threads": f"{torch.get_num_threads()}",
        "Instruction set": ops.isa(),
        "Memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "System": platform.platform(terse=True),
        "Python, torch": f"{platform.python_version()}, {torch.__version__}",
        "Library": f"reality-stone {__version__}, {compiled}",
    }
    return {"Date": date, **found} if date else found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line for line in file if line.startswith("model name"))
            return name.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
