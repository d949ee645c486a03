"""Products by bfloat16 panels and their gradients where blocks, pairs and pieces do not divide."""

import math

import pytest
import torch
import walk

from reality_stone import ops

# Relative error (Frobenius) of a product in accuracy("auto").
AUTO = 3e-3
# Odd `in`, odd `out`, pieces of rows with some left over, rows larger than a piece.
CASES = [
    ((33, 51), (9, 15, 33, 513)),
    ((17, 50), (9, 15, 33, 513)),
    ((301, 1000), (9, 19, 33, 513)),
    ((3, 40_002), (9, 33)),
]

EVERY = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)


def products(packed, x, grad):
    arguments = walk.arguments(packed)
    found = [ops.linear(x, *arguments), ops.linear_grad_input(grad, *arguments)]
    return found + ops.linear_grad_params(grad, x, *arguments)


def operands(shape, batch):
    return walk.gaussian(batch, shape[1], seed=1), walk.gaussian(batch, shape[0], seed=2)


def in_int8(packed):
    terms = ops.describe(packed.codec.spec, packed.shape)
    return any(term["linear"].startswith("int8") for term in terms)


@EVERY
def test_products_of_odd_shapes_and_batches_are_those_of_float64(codec):
    for shape, batches in CASES:
        packed = walk.random_layer(codec, shape)
        if in_int8(packed):
            continue
        w = packed.decode().double()
        for batch in batches:
            x, grad = operands(shape, batch)
            y, dx, *dparams = products(packed, x, grad)
            for got, left, right in ((y, x.double(), w.t()), (dx, grad.double(), w)):
                size = (left.norm() * right.norm() / math.sqrt(right.shape[0])).item()
                # Half an ulp of bfloat16 in either operand, where few of them carry the norm.
                assert walk.relative(got, left @ right, size) <= 2 * AUTO, (shape, batch)
            dw = (grad.double().t() @ x.double()).float()
            wanted = ops.decode_grad_params(dw, *walk.arguments(packed))
            for got, want in zip(dparams, wanted, strict=True):
                assert got.shape == want.shape
                if want.numel() >= 64:
                    assert walk.relative(got, want) <= 4 * AUTO, (shape, batch)


@EVERY
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(codec, bad):
    packed = walk.random_layer(codec, (65, 130))
    w = packed.decode()
    for batch in (9, 15, 18, 33):
        for at in (1, batch - 1):
            x, grad = operands(packed.shape, batch)
            x[at, 5] = grad[at, 7] = bad
            y, dx, *_ = products(packed, x, grad)
            others = [i for i in range(batch) if i != at]
            assert y[others].isfinite().all()
            assert dx[others].isfinite().all()
            if w[:, 5].any():
                assert not y[at].isfinite().all()
            if w[7].any():
                assert not dx[at].isfinite().all()


@EVERY
def test_panels_have_the_same_bits_on_one_thread_and_two(codec):
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("torch's product sums in another order on more threads")
    packed = walk.random_layer(codec, (302, 1000))
    for batch in (18, 33, 513):
        x, grad = operands(packed.shape, batch)
        found = []
        for threads in (1, 2):
            with walk.threads(threads):
                found.append(products(packed, x, grad))
        for one, two in zip(*found, strict=True):
            assert walk.same_bits(one, two), batch
