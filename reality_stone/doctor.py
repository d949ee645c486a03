"""What is installed, what will run, and whether it computes right."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass, field

import torch

from . import __version__, ops
from .codecs import REGISTRY, Codec

SHAPE = (4096, 4096)  # for which kernels are named
TEST_SHAPE = (40, 72)  # no multiple of most tiles, and quick
REFERENCE_SHAPE = (12, 20)  # the plain-torch encoders are slow
ISAS = ("generic", "avx2", "avx512")
OPTIONAL = {"transformers": "hf", "accelerate": "hf", "peft": "peft", "matplotlib": "plot"}


@dataclass(frozen=True)
class Check:
    """One codec's self-test: `kernels` in words, `error` is the normalised error on noise."""

    codec: str
    kernels: list[str]
    error: float
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything doctor finds. `problems` fail the command, `notes` do not."""

    versions: dict[str, str]
    devices: list[str]
    isa: str
    best_isa: str
    threads: int
    packages: dict[str, str]
    checks: list[Check]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict:
        return asdict(self) | {"sound": not self.problems}


def diagnose() -> Diagnosis:
    """Look at everything; never raises for what is missing."""
    notes: list[str] = []
    info = ops.build_info()
    versions = {
        "reality_stone": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": info.get("compiler", "none: the compiled library is not there"),
        "built for torch": info.get("torch", "-"),
        "built for CUDA": info.get("cuda") or "no",
    }
    if not ops.compiled():
        notes.append(
            f"the compiled library is not there ({ops.MISSING}), so everything runs on the slow "
            "plain-torch reference; build it with: pip install --no-build-isolation reality-stone"
        )
    elif info.get("torch") != torch.__version__:
        notes.append(
            f"the library was built for torch {info.get('torch')} and runs with "
            f"{torch.__version__}; reinstall with: pip install --no-build-isolation reality-stone"
        )
    notes += _isa_notes()
    packages = {name: _version(name) for name in OPTIONAL}
    notes += [
        f"{name} is not installed: pip install reality-stone[{OPTIONAL[name]}]"
        for name, version in packages.items()
        if not version
    ]
    checks = [check_codec(kind()) for kind in REGISTRY.values()]
    problems = [f"{check.codec}: {check.problem}" for check in checks if check.problem]
    return Diagnosis(
        versions, _devices(), ops.isa(), _best_isa(), torch.get_num_threads(), packages,
        checks, problems, notes,
    )  # fmt: skip


def check_codec(codec: Codec) -> Check:
    """Encode noise, and hold decode and linear against the plain-torch reference."""
    try:
        kernels = kernel_names(codec)
        error, problem = _self_test(codec)
    except Exception as failure:
        return Check(codec.spec, [], float("nan"), f"{type(failure).__name__}: {failure}")
    return Check(codec.spec, kernels, error, problem)


def kernel_names(codec: Codec) -> list[str]:
    """Which kernel each term of a codec uses at SHAPE, in words."""
    found = []
    for term in ops.describe(codec.spec, SHAPE):
        panels = "bfloat16 panels" if term["fast_panels"] else "float32 panels"
        batch = term["linear_max_batch"]
        direct = f"{term['linear']} straight from the codes"
        if not batch:
            text = panels
        elif batch > 1 << 20:
            text = f"{direct} at any batch"
        else:
            text = f"{direct} to batch {batch}, then {panels}"
        if term["linear_int8"]:
            text += "; 8-bit activations from batch 2 on with accuracy int8"
        found.append(f"{term['name']}: {text}")
    return found or ["plain torch"]


def _self_test(codec: Codec) -> tuple[float, str]:
    generator = torch.Generator().manual_seed(0)
    shape = TEST_SHAPE if ops.compiled() else REFERENCE_SHAPE
    weight = torch.randn(shape, generator=generator)
    packed = codec.encode(weight)
    packed.check()
    decoded = packed.decode()
    error = ((decoded - weight).pow(2).sum() / weight.pow(2).sum()).item()
    reference = codec.decode_reference(packed.codes, packed.params, packed.shape)
    if not torch.equal(decoded, reference):
        return error, "decode does not give the bits of the reference"
    if not error < 1:
        return error, f"the weights it encodes are lost (normalised error {error:.3f})"
    x = torch.randn(3, shape[1], generator=generator)
    with ops.accuracy("exact"):
        off = (packed.linear(x) - x @ decoded.t()).abs().max() / (x @ decoded.t()).abs().max()
    # float32 sums of 72 products in another order.
    if not off < 1e-5:
        return error, f"linear is off by {off:.1e} of the largest output"
    return error, ""


def _isa_notes() -> list[str]:
    wanted = os.environ.get("REALITY_STONE_ISA")
    if not wanted or not ops.compiled() or wanted == ops.isa():
        return []
    if wanted not in ISAS:
        return [
            f"REALITY_STONE_ISA is {wanted!r}, which is none of {', '.join(ISAS)}: it is ignored"
        ]
    return [f"REALITY_STONE_ISA is {wanted}, which this processor does not have: it is ignored"]


def _best_isa() -> str:
    return ops.best_isa()


def _devices() -> list[str]:
    found = [f"cpu: {platform.machine()}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found.append(f"cuda:{i}: {torch.cuda.get_device_name(i)}")
    return found


def _version(package: str) -> str:
    """The installed version, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
