"""vq_cyclic: the four transforms, all 64 codes, and the search over them."""

import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import Packed, ops, reference
from reality_stone.codecs.vq_cyclic import codewords

BLOCKS = pytest.mark.parametrize("block", [4, 8, 12, 24, 64])


def layer(block: int, codes: torch.Tensor) -> Packed:
    codec = rs.codec("vq_cyclic", block=block)
    shape = (codes.shape[0], codes.shape[1] * 4 * block)
    return Packed(
        codec, shape, codes, {p.name: walk.gaussian(*p.sizes) for p in codec.params(shape)}
    )


@BLOCKS
def test_every_code_at_every_place_decodes_alike_on_every_instruction_set(block):
    code = torch.arange(64)
    four = torch.stack((code, (code + 7) % 64, (5 * code + 1) % 64, 63 - code), -1)  # (64, 4)
    word = (four << torch.tensor([0, 6, 12, 18])).sum(-1)
    codes = torch.stack((word & 255, word >> 8 & 255, word >> 16), -1).to(torch.uint8)
    packed = layer(block, codes.view(8, 8, 3))
    want = reference.decode(*walk.arguments(packed))
    x = walk.gaussian(3, packed.shape[1])
    for isa in walk.isas():
        with ops.use_isa(isa):
            assert walk.same_bits(packed.decode(), want), isa
            assert walk.relative(packed.linear(x), x.double() @ want.double().t()) <= 3e-3


@BLOCKS
def test_transforms_are_identity_roll_negation_and_both(block):
    codec, p = rs.codec("vq_cyclic", block=block), walk.gaussian(16, block)
    word = 5 | (5 + 16) << 6 | (5 + 32) << 12 | (5 + 48) << 18
    codes = torch.tensor([[[word & 255, word >> 8 & 255, word >> 16]]], dtype=torch.uint8)
    params = {"prototypes": p, "out_scale": torch.ones(1)}
    w = Packed(codec, (1, 4 * block), codes, params).decode().view(4, block)
    rolled = p[5].roll(block // 4)
    assert torch.equal(w, torch.stack((p[5], rolled, -p[5], -rolled)))
    assert torch.equal(codewords(p)[[5, 21, 37, 53]], w)


@BLOCKS
@pytest.mark.parametrize("weighed", [False, True])
def test_the_encoder_takes_the_nearest_of_all_codewords(block, weighed):
    codec, weight = rs.codec("vq_cyclic", block=block), walk.gaussian(8, 8 * block)
    h = torch.linspace(0.1, 4, 8 * block) if weighed else torch.ones(8 * block)
    p = walk.gaussian(16, block, seed=1)
    params = [p, torch.ones(8)]
    codes, _ = ops.encode(weight, h, params, codec.spec)
    got = (h * (ops.decode(codes, params, codec.spec, weight.shape) - weight) ** 2).sum()
    miss = weight.view(8, 8, 1, block) - codewords(p)
    best = (h.view(8, 1, block) * miss**2).sum(-1).amin(-1).sum()
    assert torch.allclose(got, best, rtol=1e-5)


def test_prototypes_are_fitted_beyond_plain_means():
    weight = walk.gaussian(128, 256)
    codec = rs.codec("vq_cyclic")
    packed = codec.encode(weight)
    # 64 codewords in 4 dimensions: above the bound of 1.5 bits, below a 1.5-bit scalar code.
    assert 0.125 < walk.nmse(packed.decode(), weight) < 0.2
    assert packed.bits_per_weight == 1.5 + 16 * (64 + 128) / 32768


@pytest.mark.parametrize("block", [0, 2, 6, 260, 4.5, "4"])
def test_other_blocks_are_refused_in_both_languages(block):
    with pytest.raises(ValueError, match="block must be a multiple of 4 from 4 to 256"):
        rs.codec("vq_cyclic", block=block)
    if not isinstance(block, str):
        with pytest.raises(ValueError, match="block must be a multiple of 4 from 4 to 256"):
            ops._C.describe(f"vq_cyclic(block={block})", 16, 32)
