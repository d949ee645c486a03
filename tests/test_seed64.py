"""seed64: its functions and gradients, exact recovery, the quadtree's shape."""

import math

import pytest
import torch
import walk
from test_contract import assert_decodes_alike

import reality_stone as rs
from reality_stone import Packed, ops, reference
from reality_stone.codecs.seed64 import gradients, leaves, pattern, seed_bytes, seed_value

TREE = rs.codec("seed64", block=0, seeds=16, bound=0.01)


def random_words(*shape, seed=0):
    return walk.random_bytes(*shape, 8, seed=seed)


def test_a_seed_is_the_documented_product():
    words = random_words(4096)
    byte = words.double() * (8 * torch.arange(8)).double().exp2()
    theta = 2 * math.pi * byte[:, :4].sum(-1) / 2.0**32
    r = (byte[:, 4:].sum(-1) / 2.0**64).clamp(1e-6, 0.999)
    want = (2 * r.atanh()).tanh() * theta.sin()
    assert (seed_value(words) - want).abs().max() < 1e-7


def test_many_seeds_and_the_edges_of_their_ranges_decode_alike():
    codes = random_words(256, 256)
    edges = torch.tensor([0, 1, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000001, 0xFFFFFFFF])
    word = torch.cartesian_prod(edges, edges)
    shift = 8 * torch.arange(4)
    codes[0, :49] = torch.cat((word[:, :1] >> shift, word[:, 1:] >> shift), 1).to(torch.uint8)
    codec = rs.codec("seed64", block=4)
    assert_decodes_alike(Packed(codec, (1024, 1024), codes, {"scale": torch.tensor([0.3])}))


@pytest.mark.parametrize("block", [0, 4, 8, 16, 256])
def test_products_through_the_wave_are_those_of_the_decoded_weight(block):
    """More rows of x than fit a pass, widths that end inside a vector; the same bits on any ISA."""
    packed = walk.random_layer(rs.codec("seed64", block=block), (70, 1300))
    weight = packed.decode().double()
    for batch in (1, 3, 32, 130):
        x = walk.gaussian(batch, 1300, seed=batch)
        found = []
        for isa in walk.isas():
            with ops.use_isa(isa), ops.accuracy("exact"):
                found.append(torch.ops.reality_stone.linear(x, *walk.arguments(packed)))
        assert walk.relative(found[0], x.double() @ weight.t()) < 2e-6
        assert all(torch.equal(y, found[0]) for y in found)


def test_products_keep_the_digits_of_short_and_of_nearly_vanishing_seeds():
    """r from its least on, and angles next to the zeros of the sine, one block to an output."""
    r = torch.tensor([0, 4295, 4297, 65537, 1 << 24, (1 << 32) - 1])
    turn = torch.tensor([1, 77, (1 << 30) + 1, (1 << 31) - 3, (1 << 31) + 5, (1 << 32) - 1])
    words = torch.cartesian_prod(r, turn)
    codes = torch.cat([words[:, 1:] >> 8 * torch.arange(4), words[:, :1] >> 8 * torch.arange(4)], 1)
    codec = rs.codec("seed64", block=4)
    packed = Packed(codec, (144, 4), codes.to(torch.uint8)[:, None], {"scale": torch.ones(1)})
    x = walk.gaussian(1, 4)
    got = torch.ops.reality_stone.linear(x, *walk.arguments(packed)).double()
    want = x.double() @ packed.decode().double().t()
    assert ((got - want).abs() <= 2e-6 * want.abs()).all()


def test_the_pattern_is_the_documented_one():
    i, j = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    want = 1 + 0.1 * (2 * math.pi * ((31 * i + 17 * j) % 256).double() / 256).sin()
    assert (pattern(256) - want).abs().max() < 1e-7


def test_gradients_agree_with_central_differences():
    r = torch.rand(1000, dtype=torch.float64) * 0.99 + 0.005
    theta = torch.rand(1000, dtype=torch.float64) * 2 * math.pi

    def value(r, theta):
        return (2 * r.atanh()).tanh() * theta.sin()

    step = 1e-6
    by_r, by_theta = gradients(r, theta)
    want_r = (value(r + step, theta) - value(r - step, theta)) / (2 * step)
    want_theta = (value(r, theta + step) - value(r, theta - step)) / (2 * step)
    assert (by_r - want_r).abs().max() < 1e-8
    assert (by_theta - want_theta).abs().max() < 1e-8


def test_the_closed_form_reaches_every_product():
    p = torch.cat((torch.linspace(-1, 1, 4001), torch.tensor([1e-9, -1e-7, 1e-5, 0.0])))
    miss = (seed_value(seed_bytes(p)).double() - p.double()).abs()
    # A float32, but where r is cut at 0.999.
    assert (miss <= 2.0**-24 * p.abs() + 2.0**-32 * p.abs().sqrt() + 6e-7 * (p.abs() > 0.999)).all()


@pytest.mark.parametrize("block", [4, 32, 256])
def test_a_weight_of_that_shape_is_recovered(block):
    down, across = -(-300 // block), -(-520 // block)
    p = walk.gaussian(down, across)
    weight = (p[:, None, :, None] * pattern(block)[:, None, :]).reshape(down * block, -1)
    decoded = rs.codec("seed64", block=block).encode(weight).decode()
    assert (decoded - weight).abs().max() < 1e-6 * weight.abs().max()


@pytest.mark.parametrize(("block", "degrees"), [(4, 16), (8, 64), (16, 256)])
def test_a_gaussian_block_loses_all_but_one_degree_of_freedom(block, degrees):
    weight = walk.gaussian(512, 512)
    error = walk.nmse(rs.codec("seed64", block=block).encode(weight).decode(), weight)
    assert abs(error - (1 - 1 / degrees)) < 0.03 / degrees + 2e-3 / math.sqrt(degrees)


def test_a_block_at_the_edge_is_fitted_to_the_weights_there_are():
    weight = 1.7 * pattern(8)[:3, :5]
    assert walk.nmse(rs.codec("seed64").encode(weight).decode(), weight) < 1e-12


def test_adam_is_never_worse_and_the_closed_form_is_already_best():
    weight = walk.gaussian(128, 128)
    closed, adam = (rs.codec("seed64", fit=fit).encode(weight) for fit in ("closed", "adam"))
    misses = [(p.decode() - weight).double() ** 2 for p in (closed, adam)]
    per_block = [m.view(16, 8, 16, 8).sum((1, 3)) for m in misses]
    assert (per_block[1] <= per_block[0] * (1 + 1e-6)).all()
    assert misses[1].sum() >= (1 - 1e-6) * misses[0].sum()


def test_with_a_hessian_the_products_are_least_squares_in_its_metric():
    x = walk.gaussian(200, 40) @ (torch.eye(40) + 0.1 * walk.gaussian(40, 40, seed=1))
    h, weight = (x.t() @ x / len(x)).double(), walk.gaussian(20, 40)
    h += 0.01 * h.diagonal().mean() * torch.eye(40)  # the damping of the encoder

    def loss(w):
        return torch.einsum("ij,jk,ik->", w, h, w).item()

    packed = rs.codec("seed64").encode(weight, x.t() @ x / len(x))
    miss = packed.decode().double() - weight
    assert loss(miss) < loss(rs.codec("seed64").encode(weight).decode().double() - weight)
    # A step along any block's pattern does not lower it.
    for y in range(3):
        for c in range(5):
            step = torch.zeros(24, 40, dtype=torch.float64)
            step[8 * y : 8 * y + 8, 8 * c : 8 * c + 8] = pattern(8)
            slope = torch.einsum("ij,jk,ik->", step[:20], h, miss).item()
            assert abs(slope) < 1e-4 * loss(step[:20])


# --- the quadtree ---------------------------------------------------------------------------------


def piecewise():
    """256 x 256 of one 128 block each way, one cut once more, one of its parts twice."""
    weight = torch.zeros(256, 256)
    parts = [(0, 0, 128, 1.0), (0, 128, 128, -2.0), (128, 0, 128, 0.5)]
    parts += [(128, 128, 64, 3.0), (128, 192, 64, -1.0), (192, 128, 64, 2.0)]
    parts += [(192, 192, 32, 1.0), (192, 224, 32, -3.0), (224, 192, 32, 4.0), (224, 224, 32, -4.0)]
    for y, x, size, p in parts:
        weight[y : y + size, x : x + size] = p * pattern(size)
    return weight, [(y, x, size) for y, x, size, _ in parts]


def test_the_tree_finds_the_blocks_a_weight_is_made_of():
    weight, parts = piecewise()
    packed = TREE.encode(weight)
    packed.check()
    assert leaves(packed.codes[0, 0, :171].tolist()) == parts
    assert (packed.decode() - weight).abs().max() < 1e-5
    assert not packed.codes[0, 0, 171 + 8 * len(parts) :].any()


def test_a_bound_of_one_keeps_tiles_whole_and_few_seeds_go_where_they_help_most():
    weight, _ = piecewise()
    whole = rs.codec("seed64", block=0, bound=1).encode(weight)
    assert leaves(whole.codes[0, 0, :171].tolist()) == [(0, 0, 256)]
    four = rs.codec("seed64", block=0, seeds=6, bound=0).encode(weight)
    found = leaves(four.codes[0, 0, :171].tolist())
    assert found == [(0, 0, 128), (0, 128, 128), (128, 0, 128), (128, 128, 128)]


def test_both_encoders_build_the_same_tree():
    weight = walk.gaussian(200, 300) * torch.linspace(0.1, 3, 300)
    codec = rs.codec("seed64", block=0)
    params = list(codec.initial_params(weight, 0).values())
    ours, _ = ops.encode(weight, None, params, codec.spec)
    theirs, _ = reference.encode(weight, None, params, codec.spec)
    assert torch.equal(ours[..., :171], theirs[..., :171])
    decoded = [ops.decode(c, params, codec.spec, weight.shape) for c in (ours, theirs)]
    assert walk.relative(*decoded) < 1e-6


def test_more_leaves_than_seeds_share_the_last():
    codes = torch.full((1, 1, TREE.tile((256, 256)).bytes), 255, dtype=torch.uint8)
    codes[..., 171:] = random_words(16).flatten()
    packed = Packed(TREE, (256, 256), codes, {"scale": torch.ones(1)})
    assert_decodes_alike(packed)
    last = seed_value(codes[0, 0, -8:]) * pattern(4)
    assert torch.equal(packed.decode()[-4:, -4:], last)
    with pytest.raises(ValueError, match="more leaves than seeds"):
        packed.check()


def test_bits_of_no_node_and_words_of_no_leaf_are_rejected():
    weight, parts = piecewise()
    for byte, match in [(0, "does not exist"), (170, "does not exist"), (-1, "must be zero")]:
        packed = TREE.encode(weight)
        packed.codes[0, 0, byte] ^= 0x80 if byte else 0x40
        if byte == 0:  # a child of a block that is a leaf
            assert (0, 0, 128) in parts
        with pytest.raises(ValueError, match=match):
            packed.check()
