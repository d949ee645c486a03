"""palette: theory's errors, all code values, and what each layout accepts."""

import dataclasses

import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import Packed, ops, reference
from reality_stone.codecs.palette import group_codebooks, lloyd

# Lloyd-Max on a unit Gaussian; the pair is a codebook of 32 points in the plane.
GAUSSIAN = {1: 0.3634, 2: 0.1175, 2.5: 0.0575, 3: 0.0345, 3.2: 0.0345, 4: 0.0095}


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_gaussian_weights_meet_the_error_of_lloyd_and_max(bits):
    weight = walk.gaussian(256, 480, seed=1)
    packed = rs.codec("palette").at_bits(bits).encode(weight)
    error = walk.nmse(packed.decode(), weight)
    assert abs(error / GAUSSIAN[bits] - 1) <= 0.03
    assert abs(packed.bits_per_weight - bits) < 0.05


def every_code(codec, entries: int) -> Packed:
    """A layer in which each tile value occurs: all words, or all codes at all places."""
    if codec.layout == "words":
        value = torch.arange(1 << 16)
        codes = torch.stack((value & 255, value >> 8), -1).to(torch.uint8).view(256, 256, 2)
    else:
        codes = walk.random_bytes(64, 256, codec.tile((1, 1)).bytes)
    shape = (codes.shape[0], codes.shape[1] * codec.tile((1, 1)).cols)
    params = {p.name: walk.gaussian(*p.sizes) for p in codec.params(shape)}
    return Packed(codec, shape, codes, params)


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_every_code_value_decodes_alike_on_every_instruction_set(bits):
    packed = every_code(rs.codec("palette").at_bits(bits), 16)
    want = reference.decode(*walk.arguments(packed))
    x = walk.gaussian(2, packed.shape[1])
    for isa in walk.isas():
        with ops.use_isa(isa):
            assert walk.same_bits(packed.decode(), want), isa
            assert walk.relative(packed.linear(x), x.double() @ want.double().t()) <= 3e-3


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [128, 256])
@pytest.mark.parametrize("isa", walk.isas())
def test_products_heed_the_codebook_of_every_group_at_any_size(bits, group, isa):
    packed = walk.random_layer(rs.codec(f"palette(bits={bits}, group={group})"), (33, 3 * group))
    book = packed.params["codebook"]
    # Groups of any size, one of zeros and one whose least entry is far below the others.
    book *= torch.logspace(-12, 12, 33)[:, None, None]
    book[5, 1] = 0
    book[6, 2, 1:] *= 1e-9
    book[7, 0, 0] = -2 * book[7, 0].abs().max()
    w = reference.decode(*walk.arguments(packed)).double()
    for batch in (1, 2, 3, 8, 11):
        x = walk.gaussian(batch, 3 * group, seed=batch)
        with ops.use_isa(isa):
            y = packed.linear(x)
        for row in range(33):
            want = x.double() @ w[row]
            noise = x.norm(dim=1) * w[row].norm()  # of a product that may cancel
            assert ((y[:, row] - want).abs() <= 3e-3 * noise).all(), row
    book[3, 1, 2] = float("nan")
    with ops.use_isa(isa):
        y = packed.linear(walk.gaussian(2, 3 * group))
    used = packed.decode()[3].isnan().any()
    assert not used or y[:, 3].isnan().all()
    assert y[:, [r for r in range(33) if r != 3]].isfinite().all()


@pytest.mark.parametrize("spec", ["palette(layout=words, group=40)", "palette(bits=3, group=40)"])
def test_codes_lie_where_the_layout_says(spec):
    codec = rs.codec(spec)
    codes = torch.zeros(1, 1, codec.tile((1, 40)).bytes, dtype=torch.uint8)
    at = 16 + 6 if codec.layout == "words" else 3 * 7  # the seventh code
    codes[0, 0, at // 8] |= 5 << at % 8 & 255
    codes[0, 0, at // 8 + 1] |= (5 << at % 8) >> 8
    w = Packed(codec, (1, 40), codes, {"codebook": torch.arange(8.0).view(1, 1, 8)}).decode()
    assert w[0].tolist() == [5.0 if i == 7 else 0.0 for i in range(40)]


@pytest.mark.parametrize("spec", ["palette(layout=words)", "palette(bits=3, group=5)"])
def test_reserved_bits_are_refused_by_the_check_alone(spec):
    packed = rs.codec(spec).encode(walk.gaussian(4, 20))
    packed.check()
    want = packed.decode()
    packed.codes[1, 2, 1] |= 0x80
    with pytest.raises(ValueError, match=r"tile \(1, 2\) is no valid code"):
        packed.check()
    assert walk.same_bits(packed.decode(), want)


@pytest.mark.parametrize("spec", ["palette(bits=3, group=48)", "palette(layout=words, group=40)"])
@pytest.mark.parametrize("weighed", [False, True])
def test_codebooks_of_groups_are_as_good_as_the_reference(spec, weighed):
    codec, weight = rs.codec(spec), walk.gaussian(64, 240, seed=2)
    h = torch.linspace(0.1, 4, 240) if weighed else None
    params = list(codec.initial_params(weight, 0).values())
    error = []
    for encode in (ops.encode, reference.encode):
        codes, fitted = encode(weight, h, params, codec.spec)
        miss = ops.decode(codes, fitted, codec.spec, weight.shape) - weight
        error.append((miss.double() ** 2 * (1 if h is None else h)).sum().item())
    assert error[0] <= 1.01 * error[1]


def test_as_many_entries_as_weights_are_exact():
    weight = walk.gaussian(8, 32).half().float()
    assert torch.equal(rs.codec("palette(bits=3, group=8)").encode(weight).decode(), weight)


def test_importance_moves_the_entries_of_a_group():
    weight = walk.gaussian(16, 64, seed=3)
    h = torch.ones(64)
    h[:8] = 1e4
    plain = group_codebooks(weight[:, None], torch.ones(1, 1, 64), 8)
    assert not torch.equal(group_codebooks(weight[:, None], h[None, None], 8), plain)
    params = list(rs.codec("palette(group=64)").initial_params(weight, 0).values())
    codes, fitted = ops.encode(weight, h, params, "palette(layout=dense, bits=3, group=64)")
    miss = ops.decode(codes, fitted, "palette(layout=dense, bits=3, group=64)", weight.shape)
    assert (miss - weight)[:, :8].abs().max() < 1e-2


def test_lloyd_ends_where_every_entry_is_the_mean_of_its_cell():
    values = walk.gaussian(20000, seed=4)
    book = lloyd(values, torch.ones(20000), 8)
    cell = (values[:, None] - book).abs().argmin(1)
    means = torch.stack([values[cell == i].mean() for i in range(8)])
    assert torch.allclose(means, book, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits must be a whole number from 1 to 4"),
        ({"bits": 2.5}, "bits must be a whole number from 1 to 4"),
        ({"layout": "words", "bits": 2}, "bits must be 3 with layout=words"),
        ({"layout": "pair", "bits": 3}, "bits must be 2.5 with layout=pair"),
        ({"layout": "pair", "group": 16}, "group must be 0 with layout=pair"),
        ({"layout": "words", "group": 16}, "group must be a multiple of 5 with layout=words"),
        ({"group": -1}, "group must be a whole number from 0 to 1048576"),
        ({"layout": "5x3"}, "layout must be dense, words or pair"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_both_languages(settings, message):
    with pytest.raises(ValueError, match=message):
        rs.codec("palette", **settings)
    text = ", ".join(f"{k}={v}" for k, v in settings.items())
    with pytest.raises(ValueError, match=message):
        ops._C.describe(f"palette({text})", 16, 32)


def test_the_bits_of_a_layout_are_its_own_where_none_are_given():
    assert rs.codec("palette", layout="pair").bits == 2.5
    assert rs.codec("palette(layout=words)").bits == 3
    assert dataclasses.replace(rs.codec("palette"), bits=None) == rs.codec("palette(bits=3)")
