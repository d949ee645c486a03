"""cyclic_scalar: the level table against its formulas, every code value, the best code of all."""

import itertools
from dataclasses import replace

import pytest
import torch
import walk
from mpmath import cos, cosh, e, exp, mp, mpf, nint, pi, sinh, tanh

import reality_stone as rs
from reality_stone import Packed, ops, reference
from reality_stone.codecs import cyclic_tables

mp.dps = 30
EIGHT, SIXTEEN = rs.codec("cyclic_scalar", bits=8), rs.codec("cyclic_scalar", bits=16)
BOTH = pytest.mark.parametrize("codec", [EIGHT, SIXTEEN], ids=walk.spec)


def formula(family: int, diff: int) -> list:
    """The sixteen levels before they are rounded."""
    x = [(p - mpf("7.5")) / mpf("7.5") for p in range(16)]
    if family == 0:
        return [127 * cos(2 * pi * p / 16 + diff * pi / 2) for p in range(16)]
    if family == 1:
        return [127 * (cosh(t) / cosh(1) if diff % 2 else sinh(t) / sinh(1)) for t in x]
    if family == 2:
        return [127 * exp(t) / e for t in x]
    values = [mp.diff(lambda s: tanh(2 * s), t, diff) for t in x]
    return [127 * v / max(abs(u) for u in values) for v in values]


def test_the_levels_are_the_rounded_functions():
    table = cyclic_tables.cyclic_scalar()
    for family, diff in itertools.product(range(4), range(4)):
        assert table[family, diff].tolist() == [int(nint(v)) for v in formula(family, diff)]
    assert torch.equal(table[0], cyclic_tables.cyclic())
    assert table.flatten().tolist() == ops._C.cyclic_tables()["cyclic_scalar"]


def every_code(codec) -> Packed:
    """All codes, each row with other scales."""
    groups, rows = (4, 3) if codec.bits == 8 else (1024, 1)
    shape = (rows, groups * codec.group)
    codes = torch.arange(shape[1]).expand(shape).reshape(rows, groups, codec.group)
    if codec.bits == 8:
        codes = codes.to(torch.uint8)
    else:
        codes = torch.stack((codes & 255, codes >> 8), -1).flatten(-2).to(torch.uint8)
    return Packed(codec, shape, codes, {"scale": walk.gaussian(rows, groups)})


@BOTH
@pytest.mark.parametrize("group", [64, 16, 4])
def test_every_code_decodes_alike_on_every_instruction_set(codec, group):
    packed = every_code(replace(codec, group=64))
    scale = packed.params["scale"].repeat_interleave(64 // group, 1)
    codes = packed.codes.view(packed.shape[0], -1, group * codec.bits // 8)
    packed = replace(
        packed, codec=replace(codec, group=group), codes=codes, params={"scale": scale}
    )
    packed.check()
    want = reference.decode(*walk.arguments(packed))
    x = walk.gaussian(3, packed.shape[1])
    for isa in walk.isas():
        with ops.use_isa(isa):
            assert walk.same_bits(packed.decode(), want), isa
            assert walk.relative(packed.linear(x), x.double() @ want.double().t()) <= 3e-3, isa


@BOTH
@pytest.mark.parametrize("isa", walk.isas())
def test_products_of_the_largest_codes_and_activations_fit(codec, isa):
    shape = (2, 64 * codec.group)
    code = (
        torch.tensor([[0x00], [0x08]])
        if codec.bits == 8
        else torch.tensor([[0, 0xFC], [0x80, 0xFC]])
    )
    codes = code.to(torch.uint8).repeat(1, shape[1]).view(2, 64, -1)
    packed = Packed(codec, shape, codes, {"scale": torch.ones(2, 64)})
    for batch in (1, 8):
        with ops.use_isa(isa):
            y = packed.linear(torch.ones(batch, shape[1]))
        want = torch.tensor([1.0, -1.0]) * shape[1]
        assert torch.allclose(y, want.expand(batch, 2), rtol=3e-3)


def test_a_weight_is_its_level_times_the_scale():
    eight = every_code(EIGHT)
    level = cyclic_tables.cyclic_scalar().flatten().double()
    want = level / 127 * eight.params["scale"].double().repeat_interleave(64, 1)
    assert torch.allclose(eight.decode().double(), want, rtol=2e-7, atol=0)
    sixteen = every_code(SIXTEEN)
    got = sixteen.decode()[0].double() / sixteen.params["scale"][0].double().repeat_interleave(64)
    code = torch.arange(1 << 16).double()
    micro, phase = code % 16, code // 16 % 16
    turn = 2 * torch.pi * (16 * phase + micro) / 256 + code // 256 % 4 * torch.pi / 2
    assert (got - turn.cos() * (code // 1024 + 1) / 64).abs().max() < 2e-7


@BOTH
def test_the_encoder_finds_the_nearest_of_all_values(codec):
    weight = walk.gaussian(8, 128)
    packed = codec.encode(weight)
    values = every_code(codec).codec._levels(torch.float64) * codec._unit.double()
    for row, group in itertools.product(range(8), range(2)):
        scale = packed.params["scale"][row, group].double()
        goal = weight[row, 64 * group : 64 * group + 64].double()
        best = (goal[:, None] - values.unique() * scale).abs().amin(1)
        miss = (goal - packed.decode()[row, 64 * group : 64 * group + 64]).abs()
        assert (miss <= best + 1e-6 * goal.abs().max()).all()


def test_the_gaussian_errors():
    # The distinct levels are few (73 and 8065) and unevenly spread: uniform codes of 8 bits have
    # 0.00004.
    weight = walk.gaussian(256, 256)
    assert walk.nmse(EIGHT.encode(weight).decode(), weight) == pytest.approx(0.00135, rel=0.03)
    assert walk.nmse(SIXTEEN.encode(weight).decode(), weight) == pytest.approx(1.18e-7, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 4}, "bits must be 8 or 16"), ({"group": 0}, "group must be a whole number from 1")],
)
def test_settings_out_of_range_are_refused_in_both_languages(settings, message):
    with pytest.raises(ValueError, match=message):
        rs.codec("cyclic_scalar", **settings)
    text = ", ".join(f"{key}={value}" for key, value in settings.items())
    with pytest.raises(ValueError, match=message):
        ops._C.describe(f"cyclic_scalar({text})", 16, 32)
