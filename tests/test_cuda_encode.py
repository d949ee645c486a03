"""Encoding on CUDA tensors against the CPU's: on a GPU, or as the emulation runs the kernels."""

import cuda_device as cuda
import pytest
import torch
import walk

from reality_stone import ops
from reality_stone.codecs.trellis import default_tables


def searched(targets, bits, search, tables=None):
    """Ring codes from the device and from the CPU."""
    arguments = targets, *(tables or default_tables())
    found = cuda.ops.trellis_encode(*cuda.tensors(*arguments), float(bits), search).cpu()
    return found, ops.trellis_encode(*arguments, bits, search)


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 3.5, 4])
def test_the_trellis_search_finds_the_codes_of_the_cpu(bits):
    targets = walk.gaussian(1, 256, seed=int(2 * bits))
    found, wanted = searched(targets, bits, "exact")
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 3.5, 4])
def test_the_fast_trellis_search_finds_the_codes_of_the_cpu(bits):
    targets = walk.gaussian(1, 256, seed=int(2 * bits))
    found, wanted = searched(targets, bits, "fast")
    assert torch.equal(found, wanted)
