"""hierarchical: the base's 65536 values, the masks, and what its searches find."""

import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import Packed, ops, reference
from reality_stone.codecs.cyclic_tables import cyclic
from reality_stone.codecs.hierarchical import (
    FIXED_MULTIPLIERS,
    LEVELS,
    search_mul,
    search_xor,
    xor_parts,
)

T = cyclic()[0].tolist()
MODES = pytest.mark.parametrize("mode", ["mul", "xor"])


def tiles(base: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    return torch.stack((base & 255, base >> 8, deltas & 255, deltas >> 8), -1).to(torch.uint8)


@MODES
def test_every_base_decodes_alike_on_every_instruction_set(mode):
    codec, base = rs.codec("hierarchical", mode=mode), torch.arange(1 << 16)
    # All four deltas in every tile, in two orders.
    deltas = torch.where(base % 2 == 0, 0b1110010000011011, 0b0001101111100100)
    codes = tiles(base, deltas).view(256, 256, 4)
    shape = (256, 2048)
    params = {p.name: walk.gaussian(*p.sizes) for p in codec.params(shape)}
    packed = Packed(codec, shape, codes, params)
    want = reference.decode(*walk.arguments(packed))
    x = walk.gaussian(2, 2048)
    for isa in walk.isas():
        with ops.use_isa(isa):
            assert walk.same_bits(packed.decode(), want), isa
            assert walk.relative(packed.linear(x), x.double() @ want.double().t()) <= 3e-3


@MODES
def test_every_word_of_deltas_decodes_alike_on_every_instruction_set(mode):
    codec, deltas = rs.codec("hierarchical", mode=mode), torch.arange(1 << 16)
    codes = tiles(torch.full_like(deltas, 0x96C5), deltas).view(256, 256, 4)
    params = {p.name: walk.gaussian(*p.sizes) for p in codec.params((256, 2048))}
    packed = Packed(codec, (256, 2048), codes, params)
    want = reference.decode(*walk.arguments(packed))
    for isa in walk.isas():
        with ops.use_isa(isa):
            assert walk.same_bits(packed.decode(), want), isa


def test_fields_are_where_the_header_says():
    ones = torch.ones(1)
    codes = tiles(torch.tensor([[0xFE00]]), torch.tensor([[0b11_10_01_00]]))  # base -512: -1
    m = torch.tensor([0.5, -2.0, 3.0, 4.0])
    w = Packed(rs.codec("hierarchical"), (1, 8), codes, {"multipliers": m, "out_scale": ones})
    assert w.decode()[0].tolist() == [-0.5, 2.0, -3.0, -4.0, -0.5, -0.5, -0.5, -0.5]
    # phase 1, diff 2, amp 5, idx 3; then amp 5 ^ 15, diff 2 ^ 3 with amp 5 ^ 48, idx 3 ^ 15 too.
    codes = tiles(torch.tensor([[0x1853]]), torch.tensor([[0b11_10_01_00]]))
    levels = torch.arange(16.0)
    w = Packed(
        rs.codec("hierarchical", mode="xor"), (1, 8), codes, {"levels": levels, "out_scale": ones}
    )
    want = [
        T[9] * 6 * 3 / 8192,
        T[9] * 11 * 3 / 8192,
        T[5] * 54 * 3 / 8192,
        T[9] * 11 * 12 / 8192,
    ]
    assert w.decode()[0, :4].tolist() == want


def test_bases_with_diff_zero_stand_for_all_bases():
    base = torch.arange(1 << 16)
    factor, level = xor_parts(base[:, None], torch.arange(4))
    sets = {tuple(v) for v in torch.cat((factor, level), 1).tolist()}
    canonical = base[(base >> 10) & 3 == 0]
    factor, level = xor_parts(canonical[:, None], torch.arange(4))
    covered = {tuple(v) for v in torch.cat((factor, level), 1).tolist()}
    assert covered == sets


def test_the_multiplier_search_finds_the_best_of_all_choices():
    # All 4^4 ways to choose for four weights, the other four of no importance.
    w, m = walk.gaussian(50, 8), torch.tensor([-1.2, -0.4, 0.2, 0.8])
    h = torch.cat((0.1 + walk.gaussian(50, 4, seed=1).abs(), torch.full((50, 4), 1e-12)), 1)
    chosen = m[torch.cartesian_prod(*[torch.arange(4)] * 4)]
    dot = (h[:, None, :4] * w[:, None, :4] * chosen).sum(-1)
    power = (h[:, None, :4] * chosen**2).sum(-1)
    least = (h * w * w)[:, :4].sum(1) - (dot**2 / power).amax(1)
    base, delta = search_mul(w, h, m)
    found = (h * (w - base[:, None] / 512 * m[delta]) ** 2)[:, :4].sum(1)
    assert ((found - least) <= 1e-4 * least + 1e-5).all()
    params = [m, torch.ones(50)]
    for i in range(50):  # importance is per column: one row at a time
        codes, _ = ops.encode(w[i : i + 1], h[i], [m, params[1][:1]], "hierarchical(mode=mul)")
        got = ops.decode(codes, [m, params[1][:1]], "hierarchical(mode=mul)", (1, 8))
        error = (h[i] * (w[i] - got[0]) ** 2)[:4].sum()
        assert error <= 1.0001 * least[i] + 1e-5


def test_the_search_for_xor_bases_is_within_a_few_percent_of_all_bases():
    w = walk.gaussian(64, 64, seed=5)
    for levels in (torch.tensor(LEVELS), (torch.arange(16.0) * 2 - 15) / 8):
        params, spec = [levels, torch.ones(64)], "hierarchical(mode=xor)"
        codes, _ = ops.encode(w, None, params, spec)
        got = (ops.decode(codes, params, spec, (64, 64)) - w).pow(2).sum()
        base, delta = search_xor(w.view(-1, 8), torch.ones(512, 8), levels)
        factor, index = xor_parts(base[:, None], delta)
        best = (factor / 8192 * levels[index] - w.view(-1, 8)).pow(2).sum()
        assert best <= got <= 1.02 * best


@MODES
def test_fitting_helps_and_fixed_tables_stay(mode):
    weight = walk.gaussian(64, 128)
    fitted = rs.codec("hierarchical", mode=mode).encode(weight)
    fixed = rs.codec("hierarchical", mode=mode, fitted=False).encode(weight)
    assert walk.nmse(fitted.decode(), weight) < walk.nmse(fixed.decode(), weight)
    start = fixed.codec.initial_params(weight, 0)[fixed.codec.table]
    assert torch.equal(fixed.params[fixed.codec.table], start)
    if mode == "mul":
        assert torch.allclose(start, torch.tensor(FIXED_MULTIPLIERS), atol=1e-3)
        multipliers = fitted.params["multipliers"]
        assert (multipliers < 0).any()
        assert (multipliers > 0).any()


def test_gaussian_weights_meet_the_error_measured_for_the_format():
    weight = walk.gaussian(128, 512, seed=1)
    for mode, error in (("mul", 0.0576), ("xor", 0.0355)):
        got = walk.nmse(rs.codec("hierarchical", mode=mode).encode(weight).decode(), weight)
        assert abs(got / error - 1) <= 0.03
