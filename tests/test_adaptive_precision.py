"""adaptive_precision: every map, every code of every class, which groups get the bits."""

import pytest
import torch
import walk
from test_contract import assert_decodes_alike

import reality_stone as rs
from reality_stone import Packed
from reality_stone.codecs.uniform import pack_bits, unpack_bits


def test_every_map_decodes_alike():
    codec = rs.codec("adaptive_precision", window=64)
    codes = walk.random_bytes(256, 2, codec.tile((256, 128)).bytes)
    codes[..., 0] = torch.arange(256)[:, None]
    assert_decodes_alike(Packed(codec, (256, 128), codes, {"scale": walk.gaussian(256, 2, 3)}))


@pytest.mark.parametrize(("kind", "bits"), [(0, 2), (1, 6), (2, 12)])
def test_every_code_is_its_level(kind, bits):
    codec = rs.codec(
        "adaptive_precision", window=16, high=float(kind == 2), middle=float(kind == 1)
    )
    rows, top = max(1, 2**bits // 16), 2**bits - 1
    code = torch.arange(rows * 16).view(rows, 1, 16) % (top + 1)
    codes = torch.cat((torch.full((rows, 1, 1), kind).byte(), pack_bits(code, bits)), -1)
    scale = torch.zeros(rows, 1, 3)
    scale[..., kind] = 0.7
    packed = Packed(codec, (rows, 16), codes, {"scale": scale})
    packed.check()
    assert_decodes_alike(packed)
    want = (2 * code.double() - top) / top * 0.7
    assert (packed.decode() - want[:, 0]).abs().max() < 1e-6
    assert packed.decode().amax() == torch.tensor(0.7)


def test_a_group_past_the_end_of_a_tile_is_zero():
    codec = rs.codec("adaptive_precision", window=64)
    codes = walk.random_bytes(1, 1, codec.tile((1, 64)).bytes)  # 12 + 6 + 6 + 2 bits a column
    codes[0, 0, 0] = 0b10101010
    decoded = Packed(codec, (1, 64), codes, {"scale": torch.ones(1, 1, 3)}).decode()
    assert decoded[0, :32].all()
    assert not decoded[0, 32:].any()


def test_maps_that_the_shares_do_not_allow_are_rejected():
    codec = rs.codec("adaptive_precision", window=48, high=1 / 3, middle=1 / 3)
    packed = codec.encode(walk.gaussian(4, 48))
    packed.check()
    for wrong in (0b000000, 0b111001, 0b100110 | 1 << 6):
        packed.codes[2, 0, 0] = wrong
        with pytest.raises(ValueError, match=r"tile \(2, 0\).*map"):
            packed.check()


def test_the_largest_groups_get_the_bits():
    size = torch.tensor([1.0, 16, 4, 64]).repeat(4)  # of 16 groups
    weight = walk.gaussian(32, 256) * size.repeat_interleave(16)
    packed = rs.codec("adaptive_precision").encode(weight)
    kinds = unpack_bits(packed.codes[..., :2], 2, 8)
    assert (kinds == torch.tensor([0, 1, 1, 2]).repeat(2)).all()
    error = ((packed.decode() - weight) ** 2).mean(0).view(16, 16).mean(1) / size**2
    assert error[size == 64].max() < 1e-6 < error[size == 16].max() < 0.005


def test_importance_decides_between_equal_groups():
    weight = walk.gaussian(16, 256)
    importance = torch.where(torch.arange(256) // 16 % 4 == 1, 100.0, 1.0)
    packed = rs.codec("adaptive_precision").encode(weight, torch.diag(importance))
    kinds = unpack_bits(packed.codes[..., :2], 2, 8)
    assert (kinds[..., 1::4] == 2).all()


def test_bits_per_weight_are_those_of_the_document():
    assert rs.codec("adaptive_precision").encode(walk.gaussian(64, 512)).bits_per_weight == 7.0


def test_the_gaussian_error_is_that_of_the_lowest_class():
    # A quarter of the groups, those of least energy, at 2 bits; everything else hardly counts.
    weight = walk.gaussian(256, 1024)
    packed = rs.codec("adaptive_precision").encode(weight)
    kinds = unpack_bits(packed.codes[..., :2], 2, 8)
    low = (kinds == 0).flatten(1).repeat_interleave(16, 1)
    miss = (packed.decode() - weight) ** 2
    assert miss[low].sum() > 0.97 * miss.sum()
    share = 0.1188 * (weight[low] ** 2).sum() / (weight**2).sum()  # of 4 uniform levels
    assert abs(walk.nmse(packed.decode(), weight) / share - 1) < 0.15
