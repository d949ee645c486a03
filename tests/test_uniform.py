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


# --- accuracy("int8") ---

INT8 = pytest.mark.skipif(ops.isa() != "avx512", reason="products of single bytes need AVX-512")


def piece_of(group: int) -> int:
    return 32 if group % 64 else 64


def steps(x, group):
    """What one is of the integers of x, for each piece."""
    return x.unflatten(-1, (-1, piece_of(group))).abs().amax(-1, keepdim=True) / 127


def in_bytes(x, group):
    """x in 8 bits, in float64: 127 is the largest of each row and piece."""
    parts = x.unflatten(-1, (-1, piece_of(group)))
    peak = parts.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(peak, 127) / peak  # 127 / peak would round twice
    return ((parts * inverse).round().double() * steps(x, group).double()).flatten(-2)


@INT8
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_int8_is_the_product_with_activations_in_eight_bits(bits, symmetric):
    for group, count in GROUPS.items():
        codec = rs.codec("uniform", bits=bits, group=group, symmetric=symmetric)
        for out in (1, 9, 51):
            packed = walk.random_layer(codec, (out, group * count), seed=bits)
            w = packed.decode().double()
            for x, _, scale in products(packed, BATCHES[1:]):
                with ops.accuracy("int8"):
                    y = packed.linear(x)
                # Sums in float32 of codes and, apart from them, of zero points.
                bound = 4 * math.sqrt(x.shape[1]) * 2.0**-24
                error = walk.relative(y, in_bytes(x, group) @ w.t(), scale)
                assert error <= bound, (group, out, len(x), error)


@INT8
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_int8_of_integers_is_equal_to_the_product_of_integers(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    for group, count in {32: 3, 64: 5, 96: 2, 512: 1}.items():
        codec = rs.codec("uniform", bits=bits, group=group, symmetric=symmetric)
        packed = walk.random_layer(codec, (51, group * count), seed=bits)
        packed.params["scale"].fill_(0.5)
        if not symmetric:
            zero = packed.params["zero"]
            zero.copy_(torch.randint(2**bits, zero.shape, generator=generator))
        w = (packed.decode() * 2).long()
        for batch in BATCHES[1:]:
            x = torch.randint(-127, 128, (batch, packed.shape[1]), generator=generator)
            x[:, :: piece_of(group)] = 127  # a step of one
            with ops.accuracy("int8"):
                y = packed.linear(x.float() * 2)
            assert torch.equal(y.long(), x @ w.t()), (group, batch)


@INT8
def test_int8_is_off_by_a_step_of_its_activations():
    packed = walk.random_layer(rs.codec("uniform", bits=8), (200, 4096))
    w = packed.decode().double()
    flat = walk.gaussian(130, 4096)
    heavy = flat**5
    single = flat.clone()
    single[:, 70] = 1000
    # The largest of 64 Gaussian numbers is about 2.4 (rms), and rounding a step of it over 127 is
    # off by a step over sqrt(12): 5.6e-3. Fifth powers have a largest of 400 with an rms of 31.
    for x, most in ((flat, 7e-3), (heavy, 5e-2), (single, 2e-2)):
        for batch in (1, 3, 8, 16, 130):
            some = x[:batch]
            with ops.accuracy("int8"):
                y = packed.linear(some)
            scale = (some.double().norm() * w.norm() / math.sqrt(4096)).item()
            error = walk.relative(y, some.double() @ w.t(), scale)
            expected = (steps(some, 64).double().pow(2).sum() * 64 / 12).sqrt() / some.norm()
            # Numbers far below a step are rounded to zero, and correlate with w by chance.
            assert error <= min(most, 2 * expected.item()), (batch, error, expected)
    # An outlier costs only the 63 columns beside it.
    with ops.accuracy("int8"):
        y, calm = packed.linear(single), packed.linear(flat)
    beside = (single - flat).double() @ w.t()
    off = (y - beside - calm).norm() / calm.norm()
    assert off <= 1000 / 254 / math.sqrt(3) * math.sqrt(63 / 4096) * 1.5


@INT8
def test_int8_keeps_what_is_not_finite_in_its_row_of_x():
    packed = walk.random_layer(rs.codec("uniform", bits=4), (51, 576))
    for batch in (2, 4, 8, 17, 130):
        x = walk.gaussian(batch, 576)
        with ops.accuracy("int8"):
            y = packed.linear(x)
            for bad in (torch.nan, torch.inf, -torch.inf):
                spoilt = x.clone()
                spoilt[1, 70] = bad
                got = packed.linear(spoilt)
                assert not got[1].isfinite().any()
                assert walk.same_bits(got[2:], y[2:])
                assert walk.same_bits(got[:1], y[:1])
            assert not packed.linear(x * 0).any()
            for size in (1e-25, 1e30):
                assert walk.relative(packed.linear(x * size) / size, y.double(), 0) <= 1e-5
    packed.params["scale"][7, 3] = torch.nan
    with ops.accuracy("int8"):
        for batch in (1, 8, 17):
            bad = packed.linear(walk.gaussian(batch, 576)).isnan()
            assert bad[:, 7].all()
            assert bad.sum() == batch


@INT8
def test_int8_does_not_depend_on_threads():
    packed = walk.random_layer(rs.codec("uniform", bits=4), (1000, 576))
    before = torch.get_num_threads()
    for mode in ("auto", "int8"):
        for batch in (1, 3, 8, 40):
            x = walk.gaussian(batch, 576)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with ops.accuracy(mode):
                    found.append(packed.linear(x))
            torch.set_num_threads(before)
            for other in found[1:]:
                assert walk.same_bits(other, found[0])


def test_int8_leaves_everything_else_as_it_is():
    one = walk.random_layer(rs.codec("uniform", bits=4), (51, 576))
    with ops.accuracy("int8"):
        got = one.linear(walk.gaussian(1, 576))
    assert walk.same_bits(got, one.linear(walk.gaussian(1, 576)))
    for packed in (
        walk.random_layer(rs.codec("uniform", bits=4, group=48), (51, 576)),
        walk.random_layer(rs.codec("trellis", bits=2), (51, 576)),
    ):
        for batch in (1, 3, 40):
            x = walk.gaussian(batch, 576)
            want = packed.linear(x)
            with ops.accuracy("int8"):
                assert walk.same_bits(packed.linear(x), want)
    packed = walk.random_layer(rs.codec("uniform", bits=4), (51, 576))
    x = walk.gaussian(3, 576)
    for isa in walk.isas():
        if isa != "avx512":
            with ops.use_isa(isa):
                want = packed.linear(x)
                with ops.accuracy("int8"):
                    assert walk.same_bits(packed.linear(x), want)
    grads = []
    for mode in ("auto", "int8"):
        y = x.clone().requires_grad_()
        with ops.accuracy(mode):
            packed.linear(y).backward(torch.ones(3, 51))
        grads.append(y.grad)
    assert walk.same_bits(*grads)


@INT8
def test_doctor_says_where_activations_may_have_eight_bits():
    from reality_stone.doctor import kernel_names

    (names,) = kernel_names(rs.codec("uniform", bits=8))
    assert "8-bit activations from batch 2 on with accuracy int8" in names
    (names,) = kernel_names(rs.codec("trellis", bits=2))
    assert "int8" not in names
