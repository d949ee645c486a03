"""hybrid: its functions and waves, every float16, what its terms leave, rejected tiles."""

import math

import pytest
import torch
import walk
from test_contract import assert_decodes_alike

import reality_stone as rs
from reality_stone import Packed, ops
from reality_stone.codecs.hybrid import tables


@pytest.mark.parametrize("side", [8, 16, 32, 64, 128, 256])
def test_the_waves_are_orthonormal_and_the_functions_those_of_polar_coordinates(side):
    cosine, smooth = (t.double() for t in tables(side))
    assert (cosine @ cosine.t() - torch.eye(side)).abs().max() < 1e-6
    i = torch.arange(side).double()
    assert torch.allclose(
        cosine[3], math.sqrt(2 / side) * ((2 * i + 1) * 3 * math.pi / (2 * side)).cos(), atol=1e-7
    )
    x = (2 * i / (side - 1) - 1).expand(side, side)
    rho, t = torch.hypot(x, x.t()), torch.atan2(x.t(), x)
    one = torch.ones_like(rho)
    want = (one, rho, rho**2, rho**3, t.cos(), t.sin(), (2 * t).cos(), (2 * t).sin())
    assert (smooth - torch.stack(want)).abs().max() < 1e-6
    assert abs(rho[0, 0] - math.sqrt(2)) < 1e-12


def words(values):
    return torch.stack((values & 255, values >> 8), -1).to(torch.uint8).flatten(-2)


def test_every_float16_decodes_alike_and_those_not_finite_are_zero():
    every = torch.arange(1 << 16)
    codes = torch.zeros(64, 128, 16 + 4, dtype=torch.uint8)
    codes[..., :16] = words(every.view(64, 128, 8))
    codes[..., 18:] = words(every.roll(7)[::8].view(64, 128, 1))
    codec = rs.codec("hybrid", block=8, terms=1)
    assert_decodes_alike(Packed(codec, (512, 1024), codes, {"out_scale": torch.ones(512)}))
    alone = torch.zeros(1, 1 << 16, 16, dtype=torch.uint8)
    alone[0, :, :2] = words(every[:, None])
    pure = rs.codec("hybrid", block=8, terms=0)
    packed = Packed(pure, (8, 8 << 16), alone, {"out_scale": torch.ones(8)})
    value = every.to(torch.int32).to(torch.int16).view(torch.float16).float() / 256
    want = torch.where(value.isfinite(), value, 0)
    assert torch.equal(packed.decode()[0, ::8], want)


def test_values_at_one_position_add_up():
    codes = torch.zeros(1, 1, 16 + 4 * 3, dtype=torch.uint8)
    codes[0, 0, 16:22] = words(torch.tensor([9, 9, 20]))
    codes[0, 0, 22:] = words(torch.tensor([0x5C00, 0x6000, 0xDC00]))  # 1, 2 and -1
    packed = Packed(
        rs.codec("hybrid", block=8, terms=3), (8, 8), codes, {"out_scale": torch.ones(8)}
    )
    assert_decodes_alike(packed)
    d = tables(8)[0].double()
    want = 3 * torch.outer(d[1], d[1]) - torch.outer(d[2], d[4])
    assert (packed.decode() - want).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("byte", "value", "match"),
    [
        (1, 0x7C, "not finite"),
        (16 + 2 * 60 + 1, 0xFE, "not finite"),
        (17, 0xFF, "positions must rise"),
        (16 + 2 * 59 + 1, 0x40, "positions must rise"),
    ],
)
def test_tiles_no_encoder_writes_are_rejected(byte, value, match):
    packed = rs.codec("hybrid", terms=60).encode(walk.gaussian(64, 64))
    packed.check()
    packed.codes[0, 0, byte] = value
    with pytest.raises(ValueError, match=match):
        packed.check()


def test_smooth_blocks_with_a_few_waves_are_recovered():
    cosine, smooth = tables(64)
    coefficient = 3 * walk.gaussian(2, 2, 8)
    block = torch.einsum("yxk,kij->yixj", coefficient, smooth)
    for n in range(12):  # high frequencies, which the smooth functions do not hold
        block += torch.outer(cosine[20 + n], cosine[40 - n])[None, :, None] * (4.0 + n)
    weight = block.reshape(128, 128)
    decoded = rs.codec("hybrid", terms=64).encode(weight).decode()
    # Rows are divided by their scales first, which bends the waves a little.
    assert walk.nmse(decoded, weight) < 1e-3


def test_what_is_left_are_the_small_terms():
    weight = walk.gaussian(256, 256)
    cosine = tables(64)[0].double()
    blocks = weight.double().view(4, 64, 4, 64).transpose(1, 2)
    energy = (cosine @ blocks @ cosine.t()).flatten(2) ** 2
    for terms in (124, 252, 508):
        left = 1 - energy.topk(terms, dim=-1).values.sum() / energy.sum()
        error = walk.nmse(rs.codec("hybrid", terms=terms).encode(weight).decode(), weight)
        assert 0.97 * left < error < 1.01 * left  # the smooth part and row scales help a little


def test_column_weights_lower_the_weighted_error_beyond_the_largest_terms():
    weight, importance = walk.gaussian(64, 128), torch.where(torch.arange(128) % 3 == 0, 50.0, 0.1)
    codec = rs.codec("hybrid")
    params = list(codec.initial_params(weight, 0).values())

    def error(h):
        codes, fitted = ops.encode(weight, h, params, codec.spec)
        miss = ops.decode(codes, fitted, codec.spec, weight.shape) - weight
        return (importance * miss.double() ** 2).sum().item()

    assert error(importance) < 0.93 * error(None)


@pytest.mark.parametrize("block", [8, 64, 256])
def test_the_product_in_the_frequency_domain_is_the_product_with_the_decoded_weight(block):
    packed = rs.codec("hybrid", block=block, terms=min(60, block**2)).encode(
        walk.gaussian(300, 520)
    )
    x = walk.gaussian(5, 520)
    want = x.double() @ packed.decode().double().t()
    assert ops.describe(packed.codec.spec, packed.shape)[0]["linear_max_batch"] >= 5
    assert walk.relative(packed.linear(x), want) < 1e-6
