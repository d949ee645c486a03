"""block_sparse: every mask and phase, the rule of four ones, searches against brute force."""

import pytest
import torch
import walk
from test_contract import assert_decodes_alike

import reality_stone as rs
from reality_stone import Packed, ops
from reality_stone.codecs.block_sparse import _ones, _sets_of_four, fit_masks

TABLE, FREE = rs.codec("block_sparse"), rs.codec("block_sparse", mask16=True)
ROW = rs.codec("block_sparse", layout="row")


def ones(*shape):
    return torch.ones(shape)


def two_bytes(value: torch.Tensor) -> torch.Tensor:
    return torch.stack((value & 255, value >> 8), -1).to(torch.uint8)


def test_every_free_mask_decodes_alike():
    codes = walk.random_bytes(256, 256, 6)
    codes[..., :2] = two_bytes(torch.arange(1 << 16).view(256, 256))
    params = {"value_scale": torch.tensor([0.37]), "out_scale": walk.gaussian(1024)}
    assert_decodes_alike(Packed(FREE, (1024, 1024), codes, params))


def test_every_mask_in_the_table_decodes_alike():
    every = torch.arange(1 << 16).view(256, 256)
    codes = walk.random_bytes(16, 16, 5)
    codes[..., 0] = torch.arange(256).view(16, 16)
    for masks in every[::16]:
        params = {
            "value_scale": torch.tensor([0.37]),
            "masks": two_bytes(masks),
            "out_scale": ones(64),
        }
        assert_decodes_alike(Packed(TABLE, (64, 64), codes, params))


def test_every_mask_and_phase_of_a_row_decodes_alike():
    codes = walk.random_bytes(256, 256, 3)
    codes[..., 0] = torch.arange(256)[:, None]
    codes[..., 2] = torch.arange(256)
    params = {"value_scale": torch.tensor([-0.02]), "out_scale": ones(256)}
    packed = Packed(ROW, (256, 2048), codes, params)
    assert_decodes_alike(packed)
    angle = 2 * torch.pi * (torch.arange(256).double()[:, None] / 256 + torch.arange(8) / 8)
    wave = codes[..., 1].view(torch.int8).double()[..., None] * -0.02 * angle.cos()
    kept = (codes[..., :1].int() >> torch.arange(8) & 1).double()
    assert (packed.decode() - (wave * kept).flatten(1)).abs().max() < 1e-6


def test_of_more_than_four_ones_the_first_four_count():
    codes = torch.tensor([0xFF, 0xFF, 1, 2, 3, 4], dtype=torch.uint8).view(1, 1, 6)
    packed = Packed(FREE, (4, 4), codes, {"value_scale": ones(1), "out_scale": ones(4)})
    want = torch.zeros(4, 4)
    want[0] = torch.tensor([1.0, 2, 3, 4])
    assert torch.equal(packed.decode(), want)
    with pytest.raises(ValueError, match="at most four ones"):
        packed.check()


def test_values_without_a_one_and_masks_of_other_weight_are_rejected():
    codes = torch.tensor([7, 0, 1, 2, 3, 0], dtype=torch.uint8).view(1, 1, 6)
    params = {"value_scale": ones(1), "out_scale": ones(4)}
    Packed(FREE, (4, 4), codes, params).check()
    codes[0, 0, 5] = 1
    with pytest.raises(ValueError, match="without a one"):
        Packed(FREE, (4, 4), codes, params).check()
    packed = TABLE.encode(walk.gaussian(8, 8))
    packed.params["masks"] = packed.params["masks"].clone()
    used = int(packed.codes[1, 0, 0])
    for mask in (0, 7, 31, 0xFFFF):
        packed.params["masks"][used] = two_bytes(torch.tensor(mask))
        with pytest.raises(ValueError, match=r"tile \(\d, \d\).*must have four ones"):
            packed.check()


def blocks_of(weight):
    return weight.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("codec", [TABLE, FREE], ids=walk.spec)
def test_no_mask_would_keep_more(codec):
    weight, importance = walk.gaussian(64, 96), torch.linspace(0.2, 3, 96)
    params = codec.initial_params(weight, 0)
    codes, _ = ops.encode(weight, importance, list(params.values()), codec.spec)
    normal = weight / params["out_scale"][:, None]
    energy = blocks_of(normal**2 * importance).double()
    if codec is FREE:
        masks, best = codes[..., 0].int() | codes[..., 1].int() << 8, energy.topk(4, -1).values
        best = best.sum(-1)
    else:
        table = params["masks"].int()
        table = table[:, 0] | table[:, 1] << 8
        masks, best = table[codes[..., 0].long()], (energy @ _ones(table).double().t()).amax(-1)
    kept = (energy * _ones(masks.flatten()).view_as(energy)).sum(-1)
    assert (kept >= best * (1 - 1e-6)).all()


def test_the_fitted_table_finds_the_masks_that_a_layer_is_made_of():
    hidden = torch.randperm(1820, generator=torch.Generator().manual_seed(0))[:256]
    pattern = _ones(_sets_of_four()[hidden])
    scale = 0.3 + pattern[torch.arange(1 << 14) % 256]
    energy = (walk.gaussian(1 << 14, 16) * scale) ** 2
    masks = fit_masks(energy)
    assert (_ones(masks).sum(1) == 4).all()

    def kept(table):
        return (energy @ table.t()).amax(1).mean()

    assert kept(_ones(masks)) > 0.98 * kept(pattern)


def test_the_row_search_finds_the_best_mask_size_and_phase():
    weight, importance = walk.gaussian(8, 64), torch.linspace(0.3, 2, 64)
    params = {"value_scale": torch.full((1,), 6.0 / 127), "out_scale": ones(8)}
    codes, _ = ops.encode(weight, importance, list(params.values()), ROW.spec)
    got = Packed(ROW, (8, 64), codes, params).decode()
    w, h = weight.view(-1, 1, 1, 8).double(), importance.view(8, 8).repeat(8, 1)[:, None, None]
    phase = torch.arange(256)[:, None]
    c = (2 * torch.pi * (phase / 256 + torch.arange(8) / 8)).double().cos()[:, None]
    mask = (torch.arange(256)[:, None] >> torch.arange(8) & 1).double()
    along = (h * w * c * mask).sum(-1)
    power = (h * c * c * mask).sum(-1).clamp_min(1e-12)
    size = (along / power).clamp(-6, 6)
    best = (size * (2 * along - size * power)).flatten(1).amax(1)
    gain = (importance * (weight.double() ** 2 - (weight - got).double() ** 2)).view(-1, 8).sum(1)
    # The size is rounded to int8.
    assert gain.sum() >= 0.999 * best.sum()
    assert (gain >= 0.99 * best).all()


def test_the_gaussian_error_of_free_masks_is_what_the_four_largest_leave():
    weight = walk.gaussian(256, 256)
    left = 1 - blocks_of(weight**2).topk(4, -1).values.sum() / (weight**2).sum()
    error = walk.nmse(FREE.encode(weight).decode(), weight)
    assert abs(error / left.item() - 1) < 0.01
    assert left < walk.nmse(TABLE.encode(weight).decode(), weight) < 1.25 * left
