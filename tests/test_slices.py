"""A slice of the codes is the codes of the slice, or is refused in a sentence."""

import pytest
import torch
import walk
from torch import nn

import reality_stone as rs
from reality_stone import parallel
from reality_stone.nn import RBELinear

# Float32 sums of up to 768 terms in another order.
SUMS = 1e-5


def rest_has_long_tiles(codec, at: int) -> bool:
    """Whether a second term has tiles that a cut in the middle of 256 would divide."""
    tiles = [term["tile"][at] for term in rs.ops.describe(codec.spec, (256, 256))[1:]]
    return any(128 % size for size in tiles)


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_slices_decode_to_the_bits_of_the_whole_or_are_refused(codec):
    whole = walk.random_layer(codec, (256, 256))
    for at, side in enumerate(("column", "row")):
        tile = codec.tile(whole.shape)
        if 128 % (tile.rows, tile.cols)[at] or rest_has_long_tiles(codec, at):
            with pytest.raises(ValueError, match="cannot be cut into 2 slices"):
                parallel.slice_packed(whole, 0, 2, side)
            continue
        parts = [parallel.slice_packed(whole, rank, 2, side) for rank in range(2)]
        assert walk.same_bits(torch.cat([part.decode() for part in parts], at), whole.decode())


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_outputs_of_column_slices_follow_each_other_and_those_of_row_slices_add_up(codec, world):
    layer = RBELinear.from_packed(walk.random_layer(codec, (768, 768)), walk.gaussian(768))
    x = walk.gaussian(5, 768, seed=1)
    with rs.accuracy("exact"), torch.no_grad():
        want = layer(x)
        parts = [parallel.slice_linear(layer, rank, world, "column") for rank in range(world)]
        assert walk.relative(torch.cat([part(x) for part in parts], -1), want) < SUMS
        try:
            parts = [parallel.slice_linear(layer, rank, world, "row") for rank in range(world)]
        except ValueError:  # which codecs: the test above
            return
        got = sum(part(piece) for part, piece in zip(parts, x.chunk(world, -1), strict=True))
    # Terms of either sign: errors are as those of the terms, not of what is left of them.
    scale = (x.abs() @ layer.weight.abs().t()).norm().item()
    assert walk.relative(got, want, scale) < SUMS


def test_a_cut_inside_a_tile_or_a_hadamard_block_names_the_sizes_that_work():
    def cut(codec, shape, world, side):
        parallel.slice_packed(walk.random_layer(rs.codec(codec), shape), 0, world, side)

    with pytest.raises(
        ValueError, match=r"384 out_features cannot .* 2 slices .*, 256 and 512 can"
    ):
        cut("trellis(bits=2)", (384, 128), 2, "column")
    with pytest.raises(
        ValueError, match=r"200 in_features cannot be cut into 3 .*, 192 and 288 can"
    ):
        cut("uniform(bits=4, group=32)", (8, 200), 3, "row")
    # 192 = 64 + 128: as many tiles as two slices have, but not the same ones.
    with pytest.raises(ValueError, match=r"192 in_features cannot .*, 256 can"):
        cut("uniform(bits=4, group=128)", (8, 192), 2, "row")
    with pytest.raises(ValueError, match="a tile of this codec runs along all of them"):
        cut("sparse", (8, 256), 2, "row")
    with pytest.raises(ValueError, match="rank must be from 0 to 1, got 2"):
        parallel.slice_packed(walk.random_layer(rs.codec("uniform"), (8, 256)), 2, 2, "row")
    with pytest.raises(ValueError, match="side must be 'column' or 'row', got 'col'"):
        cut("uniform", (8, 256), 2, "col")
    # A block of 32 fits slices of 32, 96 = 3 * 32.
    cut("trellis(bits=2)", (96, 16), 3, "column")


def test_layers_that_are_not_ours_or_have_an_adapter_are_not_cut():
    with pytest.raises(TypeError, match="must be RBELinear, got Linear"):
        parallel.slice_linear(nn.Linear(256, 256), 0, 2, "row")
    with pytest.raises(ValueError, match="with an adapter cannot be cut"):
        parallel.slice_linear(RBELinear(256, 256, codec="uniform", lora_rank=2), 0, 2, "row")
