"""Builds reality_stone._C from csrc; csrc/cuda joins where torch has CUDA and nvcc is there."""

import os
import pathlib

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = pathlib.Path(__file__).parent.resolve()

# Decided by what torch was built for, never by whether a GPU is present.
WITH_CUDA = bool(torch.version.cuda and CUDA_HOME and list((ROOT / "csrc/cuda").glob("*.cu")))


def sources():
    found = [p for p in (ROOT / "csrc").rglob("*.cpp") if "cuda" not in p.relative_to(ROOT).parts]
    if WITH_CUDA:
        found += [p for suffix in ("*.cpp", "*.cu") for p in (ROOT / "csrc/cuda").glob(suffix)]
    return sorted(str(p.relative_to(ROOT)) for p in found)


def extension():
    macros = [
        ("RS_TORCH", f'"{torch.__version__}"'),
        ("RS_CUDA", f'"{torch.version.cuda if WITH_CUDA else ""}"'),
        ("RS_COMPILER", "__VERSION__"),
    ]
    # No multiply-add contraction: decode is bit-exact on every instruction set.
    flags = [
        "-O3",
        "-std=c++20",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-g0",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    # at::parallel_for is serial in code compiled without OpenMP; torch brings the runtime.
    flags += ["-fopenmp"]
    flags += os.environ.get("REALITY_STONE_CXXFLAGS", "").split()
    compile_args = {"cxx": flags}
    if WITH_CUDA:
        compile_args["nvcc"] = [
            "-O3",
            "-std=c++20",
            "--fmad=false",
            "--expt-relaxed-constexpr",
            "-lineinfo",
        ]
    kind = CUDAExtension if WITH_CUDA else CppExtension
    return kind(
        "reality_stone._C",
        sources(),
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=["-fopenmp"],
    )


os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 2))
setup(
    packages=find_packages(include=["reality_stone", "reality_stone.*"]),
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
