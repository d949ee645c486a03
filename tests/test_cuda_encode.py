"""Encoding on CUDA tensors against the CPU's: on a GPU, or as the emulation runs the kernels."""

import cuda_device as cuda
import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import ops
from reality_stone.codecs.trellis import default_tables


def searched(targets, bits, search, tables=None):
    """Ring codes from the device and from the CPU."""
    arguments = targets, *(tables or default_tables())
    found = cuda.ops.trellis_encode(*cuda.tensors(*arguments), float(bits), search).cpu()
    return found, ops.trellis_encode(*arguments, bits, search)


# The settings that codecs take below search the other rates.
@pytest.mark.parametrize("bits", [2.5, 3, 3.5])
def test_the_trellis_search_finds_the_codes_of_the_cpu(bits):
    found, wanted = searched(walk.gaussian(2, 256, seed=int(2 * bits)), bits, "exact")
    assert torch.equal(found, wanted)


# 1.5 and 2.5 bits of the coarse grain, a short seam with the fine one.
@pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
def test_the_fast_trellis_search_finds_the_codes_of_the_cpu(bits):
    found, wanted = searched(walk.gaussian(2, 256, seed=int(2 * bits)), bits, "fast")
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("search", ["exact", "fast"])
def test_targets_far_outside_the_table_get_the_codes_of_the_cpu(search):
    targets = walk.gaussian(2, 256) * torch.tensor([[2.5], [1e5]])
    targets[0, 128:] = 0
    found, wanted = searched(targets, 2, search)
    assert torch.equal(found, wanted)


# 7 are more than two for each of three processors, and odd.
@pytest.mark.parametrize(("tiles", "order"), [(7, 7), (2, 1)])
def test_many_tiles_are_searched_alike_in_any_order_of_threads(tiles, order, monkeypatch):
    monkeypatch.setenv("EMULATED_ORDER", str(order))
    found, wanted = searched(walk.gaussian(tiles, 256), 2, "fast")
    assert torch.equal(found, wanted)


def test_the_search_of_no_tiles_gives_no_codes():
    found, _ = searched(torch.zeros(0, 256), 2, "exact")
    assert found.shape == (0, 64)


def test_what_cannot_be_encoded_is_refused_in_the_words_of_the_cpu():
    bad = torch.zeros(3, 256)
    bad[2, 5] = float("nan")
    tables = cuda.tensors(*default_tables())
    with pytest.raises(ValueError, match=r"not finite at \(2, 5\)"):
        cuda.ops.trellis_encode(*cuda.tensors(bad), *tables, 2.0, "exact")
    with pytest.raises(ValueError, match="search must be exact or fast"):
        cuda.ops.trellis_encode(*cuda.tensors(bad), *tables, 2.0, "best")
    codec = rs.codec("uniform")
    params = list(codec.encode(torch.zeros(3, 256)).params.values())
    with pytest.raises(ValueError, match=r"not finite at \(2, 5\)"):
        cuda.ops.encode(*cuda.tensors(bad), None, *cuda.tensors(params), codec.spec)
    given = cuda.tensors(torch.zeros(256))[0]
    with pytest.raises(ValueError, match="importance must be 256 positive"):
        cuda.ops.encode(*cuda.tensors(bad), given, *cuda.tensors(params), codec.spec)


# What a kernel encodes, and what is copied to the CPU's search and back.
CODECS = [
    *(c for c in walk.FEW if walk.one_term(c)),
    *(rs.codec("uniform", bits=b, group=g) for b, g in [(3, 5), (5, 32), (6, 1), (7, 200)]),
    rs.codec("palette", layout="words"),
    rs.codec("palette", layout="pair"),
    rs.codec("palette", bits=1),
    rs.codec("vq_cyclic", block=20),
]


@pytest.mark.parametrize("codec", CODECS, ids=walk.spec)
def test_encoding_gives_the_codes_of_the_cpu(codec, monkeypatch):
    # The trellis has 65536 states: two tiles, searched in one order of threads.
    slow = codec.name == "trellis"
    shape = (16, 17) if slow else (5, 130)
    weight = walk.gaussian(*shape)
    weight[0] *= 1e-20
    weight[1] = 0
    importance = walk.gaussian(shape[1], seed=1).exp()
    params = list(codec.encode(weight).params.values())
    for given in [importance] if slow else [None, importance]:
        wanted = ops.encode(weight, given, params, codec.spec)
        columns = given if given is None else cuda.tensors(given)[0]
        for _ in (0,) if slow else cuda.orders(monkeypatch):
            codes, fitted = cuda.ops.encode(
                *cuda.tensors(weight), columns, *cuda.tensors(params), codec.spec
            )
            assert torch.equal(codes.cpu(), wanted[0])
            for f, w in zip(fitted, wanted[1], strict=True):
                assert torch.equal(f.cpu(), w)


@pytest.mark.skipif(not cuda.on_gpu, reason="needs a GPU")
@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_a_weight_on_the_gpu_is_compressed_as_on_the_cpu(codec):
    weight, hessian = walk.gaussian(48, 64), torch.eye(64) + 0.1
    found, wanted = codec.encode(weight.cuda(), hessian), codec.encode(weight, hessian)
    assert torch.equal(found.codes, wanted.codes)
