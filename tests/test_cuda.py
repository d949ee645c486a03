"""The CUDA kernels against the reference: on a GPU, or as the emulation runs them."""

import cuda_device as cuda
import pytest
import torch
import walk

from reality_stone import ops, reference
from reality_stone.codecs import REGISTRY

SHAPES = [(1, 17), (33, 50), (48, 136), (128, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Activations and decoded weights are rounded to bfloat16, 2^-9 of each, before they are multiplied,
# and so is the result.
PRODUCT = 5e-3


def arguments(packed):
    """What decode and the products take after their input: on the device, and for the reference."""
    codes, params = cuda.tensors(packed.codes, list(packed.params.values()))
    rest = packed.codec.spec, packed.shape
    return (codes, params, *rest), (packed.codes, list(packed.params.values()), *rest)


def error(found, wanted):
    return float((found.cpu().double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_decode_gives_the_same_bits(codec, monkeypatch):
    for shape in SHAPES + walk.EMPTY_SHAPES:
        packed = walk.random_layer(codec, shape)
        mine, theirs = arguments(packed)
        wanted = reference.decode(*theirs)
        for order in cuda.orders(monkeypatch):
            found = cuda.ops.decode(*mine).cpu()
            assert torch.equal(found, wanted), (shape, order)


@pytest.mark.parametrize("batch", [1, 5, 8, 9, 33, 64, 70])
@pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
def test_products_and_input_gradients_agree(codec, batch, monkeypatch):
    for shape, dtype in [
        ((33, 50), torch.float32),
        ((48, 136), torch.float16),
        ((128, 256), torch.bfloat16),
    ]:
        mine, theirs = arguments(walk.encoded(codec, shape))
        x, dy = walk.gaussian(batch, shape[1]).to(dtype), walk.gaussian(batch, shape[0]).to(dtype)
        for order in cuda.orders(monkeypatch):
            y = cuda.ops.linear(*cuda.tensors(x), *mine)
            dx = cuda.ops.linear_grad_input(*cuda.tensors(dy), *mine)
            assert y.dtype == dx.dtype == dtype
            assert error(y, reference.linear(x.float(), *theirs)) < PRODUCT, (shape, order)
            wanted = reference.linear_grad_input(dy.float(), *theirs)
            assert error(dx, wanted) < PRODUCT, (shape, order)


@pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
def test_gradients_of_params_agree_and_repeat(codec, monkeypatch):
    for shape in [(33, 50), (128, 256)]:
        packed = walk.trained(walk.encoded(codec, shape))
        mine, theirs = arguments(packed)
        dw = walk.gaussian(*shape, seed=3)
        wanted = reference.decode_grad_params(dw, *theirs)
        first = None
        for order in cuda.orders(monkeypatch):
            found = [g.cpu() for g in cuda.ops.decode_grad_params(*cuda.tensors(dw), *mine)]
            for f, w in zip(found, wanted, strict=True):
                assert f.shape == w.shape
                if w.numel():  # sums in float32, in another order
                    assert torch.allclose(f, w, rtol=1e-4, atol=1e-5 * float(w.abs().max() + 1))
            first = first or found
            assert all(map(torch.equal, found, first)), order


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_gradients_of_params_through_a_product_agree(codec):
    shape, _batch = (48, 136), 12
    mine, theirs = arguments(walk.trained(walk.encoded(codec, shape)))
    x, dy = walk.gaussian(3, 4, shape[1]), walk.gaussian(3, 4, shape[0], seed=1)
    found = cuda.ops.linear_grad_params(*cuda.tensors(dy, x), *mine)
    wanted = reference.linear_grad_params(dy, x, *theirs)
    for f, w in zip(found, wanted, strict=True):
        if w.numel() and float(w.norm()):
            # dW is a product of rounded factors, of which the params' gradients are sums.
            assert error(f, w) < 4 * PRODUCT


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_gives_the_same_bits(block, dtype, monkeypatch):
    x = walk.gaussian(3, 2, 5 * block).to(dtype)
    wanted = ops.hadamard(x, block)
    for _ in cuda.orders(monkeypatch):
        assert torch.equal(cuda.ops.hadamard(*cuda.tensors(x), block).cpu(), wanted)


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_codes_at_any_address_decode_alike(codec):
    packed = walk.random_layer(codec, (33, 50))
    (codes, *rest), theirs = arguments(packed)
    moved = torch.cat((codes.new_zeros(1), codes.flatten()))[1:].view(codes.shape)
    assert torch.equal(cuda.ops.decode(moved, *rest).cpu(), reference.decode(*theirs))


# Sums so long that several blocks share each, which an emulated device of three processors does
# from 32 steps of a warp on; odd numbers of tiles, of which the last steps hold but a few.
@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 3.5, 4])
def test_trellis_products_shared_by_blocks_agree_and_repeat(bits, monkeypatch):
    codec = REGISTRY["trellis"](bits=bits)
    for shape, batch, dtype in [((80, 2128), 3, torch.bfloat16), ((560, 48), 17, torch.float16)]:
        mine, theirs = arguments(walk.random_layer(codec, shape))
        x, dy = walk.gaussian(batch, shape[1]).to(dtype), walk.gaussian(batch, shape[0]).to(dtype)
        first = None
        for _ in cuda.orders(monkeypatch):
            y = cuda.ops.linear(*cuda.tensors(x), *mine)
            dx = cuda.ops.linear_grad_input(*cuda.tensors(dy), *mine)
            first = first or (y, dx)
            assert torch.equal(y, first[0])
            assert torch.equal(dx, first[1])
        assert error(y, reference.linear(x.float(), *theirs)) < PRODUCT
        assert error(dx, reference.linear_grad_input(dy.float(), *theirs)) < PRODUCT


def test_empty_batches_give_empty_products():
    codec = walk.DEFAULTS[0]
    mine, _ = arguments(walk.encoded(codec, (48, 136)))
    x = torch.zeros(0, 136)
    assert cuda.ops.linear(*cuda.tensors(x), *mine).shape == (0, 48)
    assert cuda.ops.linear_grad_input(*cuda.tensors(x.new_zeros(0, 48)), *mine).shape == (0, 136)


def test_gradients_that_are_not_finite_make_nan_and_nothing_else():
    codec = next(c for c in walk.DEFAULTS if c.name == "palette")
    mine, _ = arguments(walk.encoded(codec, (33, 50)))
    dw = walk.gaussian(33, 50)
    dw[3, 4] = float("inf")
    found = cuda.ops.decode_grad_params(*cuda.tensors(dw), *mine)
    assert all(not bool(g.isfinite().all()) for g in found if g.numel())
