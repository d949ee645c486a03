"""uniform: products in bytes, for every width, kind of group and number of rows of x."""

import math

import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import ops

# Activations are held to 16 bits per row: a step is the peak, some 4 deviations, over 32639, and
# its rounding a step over sqrt(12), 4e-5 of a row. Five times that for rows with larger peaks.
SIXTEEN_BITS = 2e-4
# Shorter than a register, parts of one, longer than what is unpacked, sums or registers at a time.
GROUPS = {32: 3, 64: 9, 96: 5, 128: 3, 160: 1, 512: 1, 1056: 1}  # columns of one: groups in a row
BATCHES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 48, 64, 65, 130, 513)


def products(packed, batches):
    w = packed.decode().double()
    for batch in batches:
        x = walk.gaussian(batch, packed.shape[1], seed=batch)
        want = x.double() @ w.t()
        # What the norm is when nothing cancels.
        scale = x.double().norm() * w.norm() / math.sqrt(packed.shape[1])
        yield x, want, scale.item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_any_number_of_rows_is_multiplied_to_sixteen_bits(bits, symmetric):
    for group, count in GROUPS.items():
        codec = rs.codec("uniform", bits=bits, group=group, symmetric=symmetric)
        for out in (1, 9, 51):
            packed = walk.random_layer(codec, (out, group * count), seed=bits)
            for x, want, scale in products(packed, BATCHES):
                y = packed.linear(x)
                error = walk.relative(y, want, scale)
                assert error <= SIXTEEN_BITS, (group, out, len(x), error)


def test_the_product_in_bytes_is_named_and_exact_products_do_not_take_it():
    codec = rs.codec("uniform", bits=8)
    packed = walk.random_layer(codec, (51, 576))
    if ops.isa() == "avx512":
        (term,) = ops.describe(codec.spec, packed.shape)
        assert "16-bit activations" in term["linear"]
        assert term["linear_max_batch"] > 512
    for x, want, scale in products(packed, (2, 9, 65)):
        with ops.accuracy("exact"):
            exact = packed.linear(x)
        # Sums of 576 products in float32, in any order.
        assert walk.relative(exact, want, scale) <= math.sqrt(576) * 2.0**-24, len(x)


def test_rows_of_x_do_not_depend_on_their_neighbours():
    packed = walk.random_layer(rs.codec("uniform", bits=4), (51, 576))
    x = walk.gaussian(130, 576)
    y = packed.linear(x)
    louder = x.clone()
    louder[1::2] *= 1e6
    assert walk.same_bits(packed.linear(louder)[::2], y[::2])
    spoilt = x.clone()
    spoilt[3, 7] = torch.nan
    got = packed.linear(spoilt)
    assert got[3].isnan().all()
    assert walk.same_bits(got[4:], y[4:])
