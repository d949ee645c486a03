"""bitfield: the functions of a radius, every word of 22 bits, subsets, lossless settings."""

import mpmath
import numpy as np
import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import Packed, ops, reference
from reality_stone.codecs import Bitfield
from reality_stone.codecs.bitfield import entry_functions, parse_functions
from reality_stone.codecs.bitfield_fit import fit_range
from reality_stone.codecs.radial import radial_functions, radial_table

m = mpmath


def definitions():
    """The text of the functions, and where a pole stops the radius of those that have one."""
    root = m.sqrt
    rows = [
        [lambda r: m.tanh(r / 2), lambda r: -m.tanh(r / 2), lambda r: 2 * m.tanh(r / 4)],
        [lambda r: m.tanh(r / 2) ** 2, lambda r: m.sinh(r) / (1 + m.cosh(r))],
        [lambda r: (m.cosh(r) - 1) / (1 + m.cosh(r)), m.tanh, lambda r: m.sinh(r) / r],
        [lambda r: m.sin(r) / r, m.cos, lambda r: (1 - m.cos(r)) / r**2],
        [lambda r: m.sin(r) * m.cos(r), lambda r: (m.exp(r) - 1) / r],
        [lambda r: m.exp(r) / (1 + m.exp(r)), lambda r: m.log(1 + r) / r],
        [lambda r: r / (1 + abs(r))],
        [m.sinh, lambda r: m.cosh(r) - 1, m.tanh, lambda r: m.sinh(r) / m.cosh(r)],
        [lambda r: 2 * m.sinh(r / 2), lambda r: m.cosh(r / 2), lambda r: m.exp(r) - 1],
        [lambda r: 1 - m.exp(-r), lambda r: r * m.cosh(r), lambda r: r * m.sinh(r)],
        [lambda r: (m.sinh(r) - r) / r**2, lambda r: (m.cosh(r) - 1 - r**2 / 2) / r**3],
        [lambda r: root(m.cosh(r)), lambda r: m.sign(r) * root(abs(m.sinh(r)))],
        [lambda r: m.tanh(r**2), lambda r: m.tanh(r) / r],
        [lambda r: r / (1 + r), lambda r: r / root(1 + r**2), lambda r: r**2 / (1 + r**2)],
        [lambda r: 1 - 1 / (1 + r), lambda r: 2 * r / (1 + r**2)],
        [lambda r: (1 - r**2) / (1 + r**2), lambda r: 4 * r / (1 + r**2) ** 2],
        [lambda r: 2 * m.atan(r) / m.pi, lambda r: r / (1 + r + r**2 / 2)],
        [lambda r: r / (1 + r - r**2 / 2), lambda r: r - r**3 / 3 + r**5 / 5],
        [lambda r: r / (1 + r**2 / 3), lambda r: r / (1 + abs(r))],
        [lambda r: m.sign(r) * root(abs(r)), lambda r: r**3 / (1 + r**2)],
        [lambda r: r * m.exp(-(r**2) / 2)],
        [lambda r: (m.besselj(0, r) + m.besselj(1, r)) / 2],
        [lambda r: m.sin(r) / r * m.cos(r / 2), lambda r: 2 * m.besselj(1, r) / r],
        [lambda r: m.besselj(0, r) * m.cos(r)],
        [lambda r: m.exp(-(r**2) / 2), lambda r: r * m.exp(-(r**2) / 2)],
        [lambda r: (1 - r**2) * m.exp(-(r**2) / 2), lambda r: 1 / root(1 + r**2)],
        [lambda r: m.cos(r) * m.exp(-(r**2) / 4), lambda r: m.sin(r) * m.exp(-(r**2) / 4)],
        [lambda r: m.cos(r**2), lambda r: m.sin(r**2)],
        [lambda r: m.tan(r) / r, lambda r: m.sin(r) * m.cos(r) / r],
        [lambda r: (1 - m.cos(r)) / (r * m.sin(r)), lambda r: m.log(1 + r**2) / r],
    ]
    ends = {14: (-0.75, 8), 32: (-0.75, 8), 35: (-0.75, 8), 41: (-0.5, 2.25)}
    ends |= {60: (-1.5, 1.5), 62: (-3, 3)}
    return [f for row in rows for f in row], ends


# Smallest radius of any table, places on either side of every stop, and beyond.
RADII = [0.5 / 1023, 0.01, 0.2, 0.49, 0.7, 1.0, 1.4, 1.6, 2.2, 2.3, 2.9, 3.2, 4.7, 6.3, 8.0]


def test_the_functions_and_their_derivatives_are_those_of_the_text():
    functions, ends = definitions()
    assert len(functions) == 64
    radii = np.array([*RADII, *(-r for r in RADII)])
    got = radial_functions(radii)
    with mpmath.workdps(40):
        for number, f in enumerate(functions):
            low, high = ends.get(number, (-8, 8))
            for i, r in enumerate(radii.tolist()):
                at = mpmath.mpf(min(max(r, low), high))
                value = float(f(at))
                slope = float(mpmath.diff(f, at, h=mpmath.mpf(10) ** -15)) if at == r else 0.0
                assert abs(got.v[number, i] - value) <= 1e-9 * abs(value) + 1e-12, (number, r)
                assert abs(got.d[number, i] - slope) <= 1e-6 * abs(slope) + 1e-10, (number, r)


def test_the_derivatives_are_central_differences():
    radii = np.linspace(-7.9, 7.9, 401)
    kinks = np.array([0, -0.75, -0.5, 2.25, -1.5, 1.5, -3, 3])
    radii = radii[(abs(radii[:, None] - kinks) > 1e-3).all(1)]
    h = 1e-5
    up, down, at = (radial_functions(radii + s) for s in (h, -h, 0))
    central = (up.v - down.v) / (2 * h)
    size = abs(at.v) + abs(at.d) + 1e-3
    near_root = abs(radii) < 0.1  # where sgn(r) sqrt|r| bends too much for this step
    assert (abs(central - at.d) <= 1e-6 * size)[:, ~near_root].all()


def test_at_zero_the_functions_have_their_limits():
    functions, _ = definitions()
    got = radial_functions(np.zeros(1))
    with mpmath.workdps(120):
        for number, f in enumerate(functions):
            limit = float(f(mpmath.mpf(10) ** -20))
            assert abs(got.v[number, 0] - limit) <= 2e-10, number  # sqrt of the distance to 0


@pytest.mark.parametrize("word", [22, 32])
def test_every_table_entry_is_finite_and_has_the_same_bits_compiled(word):
    codec = Bitfield(word=word, block=1)
    entries = torch.arange(1 << (14 if word == 22 else 16))
    codes = codec._pack(entries, torch.zeros_like(entries), torch.zeros_like(entries), 1)
    codes = codes.view(1, -1, codes.shape[-1])
    for r_max in np.float32([0.5, 0.731, 1, 2, np.pi, 5.5, 7.9999995, 8]).tolist():
        value, slope = radial_table(word, r_max)
        assert np.isfinite(value).all()
        assert np.isfinite(slope).all()
        params = [torch.ones(256, 1), torch.tensor([r_max]), torch.ones(1)]
        got = ops.decode(codes, params, codec.spec, (1, len(entries)))
        want = torch.from_numpy(value.astype(np.float32))
        assert walk.same_bits(got[0], want)
        # dLoss/dr_max of one weight at a time, here of all with the slopes' own signs.
        grads = ops.decode_grad_params(
            torch.from_numpy(np.sign(slope)).float()[None], codes, params, codec.spec, got.shape
        )
        inside = 0.5 < r_max < 8
        assert grads[1].item() == pytest.approx(abs(slope).sum() if inside else 0, rel=1e-5)


def every_word() -> torch.Tensor:
    """Tiles (1024, 1024, 11) that hold all words of 22 bits in order."""
    word = np.arange(1 << 22, dtype=np.uint64).reshape(-1, 4)
    low = word[:, 0] | word[:, 1] << np.uint64(22) | word[:, 2] << np.uint64(44)
    high = word[:, 2] >> np.uint64(20) | word[:, 3] << np.uint64(2)
    tiles = np.concatenate((low[:, None].view(np.uint8), high[:, None].view(np.uint8)[:, :3]), 1)
    return torch.from_numpy(tiles).reshape(1024, 1024, 11)


def test_every_word_of_22_bits_decodes_alike():
    codec = Bitfield(block=1)
    basis = walk.gaussian(256, 1)
    params = {"basis": basis, "r_max": torch.tensor([2.7]), "out_scale": torch.ones(1024)}
    packed = Packed(codec, (1024, 4096), every_word(), params)
    want = reference.decode(*walk.arguments(packed))
    for isa in walk.isas():
        with ops.use_isa(isa):
            assert walk.same_bits(packed.decode(), want), isa
    # The fields, read off the word itself.
    value = radial_table(22, float(np.float32(2.7)))[0].astype(np.float32).reshape(64, 256)
    for word in (0, 1, 255, 256, 1 << 18, 0x3FFFFF, 0x2A5A5A, 0x155AA5):
        cat, sub, d = word >> 20, word >> 18 & 3, word >> 8 & 3
        idx, amp = word >> 10 & 255, word & 255
        f = torch.tensor(value[16 * cat + 4 * sub + d, amp])
        assert want.flatten()[word] == f * basis[idx, 0]


def test_words_of_32_bits_mean_their_fields():
    codec = Bitfield(word=32, block=2)
    basis = walk.gaussian(256, 2)
    words = torch.randint(0, 1 << 32, (64,), generator=torch.Generator().manual_seed(5)).tolist()
    words += [0, 0xFFFFFFFF, 0x80000000, 1 << 11, 1 << 10, 0xFF000000, 0x7FFFFFFF]
    codes = torch.tensor([[w >> s & 255 for s in (0, 8, 16, 24)] for w in words]).to(torch.uint8)
    params = {"basis": basis, "r_max": torch.tensor([3.0]), "out_scale": torch.ones(1)}
    packed = Packed(codec, (1, 2 * len(words)), codes[None], params)
    want = reference.decode(*walk.arguments(packed))
    for isa in walk.isas():
        with ops.use_isa(isa):
            assert walk.same_bits(packed.decode(), want), isa
    for i, w in enumerate(words):
        r = (4 * (w >> 2 & 255) + (w & 3)) * 3.0 / 1023
        f = radial_functions(np.array([-r if w >> 11 & 1 else r])).v
        f = f[16 * (w >> 22 & 3) + 4 * (w >> 20 & 3) + (w >> 10 & 1), 0]
        turn = np.cos(2 * np.pi * (w >> 24) / 256)
        got, by_hand = want[0, 2 * i : 2 * i + 2].double(), basis[w >> 12 & 255].double() * f * turn
        assert (got - by_hand).norm() <= 1e-6 * by_hand.norm() + 1e-9


@pytest.mark.parametrize("word", [22, 32])
def test_any_r_max_counts_as_one_in_range(word):
    codec = Bitfield(word=word, block=2)
    packed = walk.random_layer(codec, (4, 64))
    for odd, held in [(np.nan, 0.5), (-np.inf, 0.5), (-3, 0.5), (1e-40, 0.5), (9, 8), (np.inf, 8)]:
        packed.params["r_max"] = torch.tensor([float(odd)])
        got = packed.decode()
        assert walk.same_bits(reference.decode(*walk.arguments(packed)), got)
        packed.params["r_max"] = torch.tensor([float(held)])
        assert walk.same_bits(packed.decode(), got)


def test_a_code_of_another_function_or_fraction_is_refused():
    codec = Bitfield(functions="poincare_c3s1d0", block=2)
    packed = codec.encode(walk.gaussian(8, 64))
    packed.check()
    used = entry_functions(22)[_entries(packed)]
    assert set(used.flatten().tolist()) <= {*range(16), 52}
    packed.codes[3, 1, 10] = 0xFF  # the fourth code's category is 3, its subcategory too
    with pytest.raises(ValueError, match=r"tile \(3, 1\).*not in the setting functions"):
        packed.check()
    fine = Bitfield(amplitude="float32").encode(walk.gaussian(8, 64))
    fine.check()
    fine.codes[0, 0, 11:15] = torch.tensor([np.nan]).view(torch.uint8)
    with pytest.raises(ValueError, match="a fraction must be from 0 to 1"):
        fine.check()


def _entries(packed) -> np.ndarray:
    code = packed.codec.unpack(packed.codes)
    return ((code >> 8 & 0x3C00) | (code & 0x3FF)).numpy()


GOOD = [
    "all",
    "poincare",
    "klein_special",
    "c0s0d0_c0s0d1",
    "c3s3d1",
    "all_c0s0d0",
    "c1s1d1_c1s1d1",
]
BAD = [
    "",
    "_",
    "all_",
    "Poincare",
    "c0s0d4",
    "c4s0d0",
    "c0s0",
    "c0s0d0x",
    "c0s0d00",
    "euclid",
    "c0d0s0",
]


@pytest.mark.parametrize("word", [22, 32])
def test_both_languages_read_functions_alike(word):
    for text in GOOD:
        codec = Bitfield(word=word, functions=text)
        assert rs.codec(codec.spec) == codec
        assert ops.describe(codec.spec, (4, 64))
    bad = [*BAD, "c0s0d2", "c3s3d3"] if word == 32 else BAD
    for text in bad:
        with pytest.raises(ValueError, match="functions must be all, or some of poincare"):
            Bitfield(word=word, functions=text)
        if text:
            with pytest.raises(ValueError, match="functions must be all, or some of poincare"):
                ops.describe(f"bitfield(word={word}, functions={text})", (4, 64))
    assert parse_functions("all", 32) == [f for f in range(64) if f % 4 < 2]


@pytest.mark.parametrize(
    "wrong", ["word=16", "block=0", "r_max=0.4", "r_max=9", "amplitude=half", "basis=pca"]
)
def test_settings_out_of_range_are_refused_alike(wrong):
    key = wrong.split("=")[0]
    for make in (rs.codec, lambda spec: ops.describe(spec, (4, 64))):
        with pytest.raises(ValueError, match=f"bitfield: {key} must be"):
            make(f"bitfield({wrong})")
        with pytest.raises(ValueError, match="needs word=22"):
            make("bitfield(word=32, amplitude=uint16)")


def test_injective_means_that_no_value_comes_twice():
    assert Bitfield(functions="c0s0d0").is_injective(2)
    assert Bitfield(functions="c1s0d0", word=32).is_injective(1) is False  # +0 and -0 are one value
    assert not Bitfield().is_injective()
    assert Bitfield(functions="c1s3d2").is_injective(1)
    assert not Bitfield(functions="c1s3d2").is_injective(8)  # tanh(r^2) comes to 1
    assert not Bitfield(functions="c0s0d0_c0s1d0").is_injective(2)  # one function twice


def lines(rows: int, cols: int, count: int) -> torch.Tensor:
    """Blocks of eight along `count` directions, of any length and either sign."""
    direction = walk.gaussian(count, 8, seed=1)
    which = torch.arange(rows * cols // 8) * 7919 % count
    return (direction[which] * walk.gaussian(len(which), 1, seed=2)).view(rows, cols)


@pytest.mark.parametrize(
    ("preset", "bound"), [("practical_lossless", 1e-3), ("ultra_high_precision", 1e-6)]
)
def test_lossless_presets_are_within_their_tolerance(preset, bound):
    make = getattr(Bitfield, preset)
    outlier = walk.gaussian(64, 256)
    outlier[7, 9], outlier[8] = 1e4, 0
    for weight in (walk.gaussian(64, 256), 1e-6 * walk.gaussian(5, 37), outlier):
        packed = make().encode(weight)
        packed.check()
        assert walk.relative(packed.decode(), weight) <= bound
    blocks = lines(64, 256, 256)
    packed = make(block=8).encode(blocks)
    assert walk.relative(packed.decode(), blocks) <= bound
    assert make().is_injective() is False
    # A code and its wide amplitude per block of one weight: larger than the weights themselves.
    least = 38 if preset == "practical_lossless" else 54
    assert make().encode(walk.gaussian(512, 512)).bits_per_weight == pytest.approx(least, rel=0.01)


def test_high_compression_is_the_word_itself():
    codec = Bitfield.high_compression()
    assert codec.amplitude == "byte"
    packed = codec.encode(walk.gaussian(128, 256))
    assert packed.params["r_max"].item() == 1
    assert packed.codes.numel() * 8 / 2.75 == 128 * 256


@pytest.mark.parametrize("word", [22, 32])
def test_gaussian_weights_at_blocks_of_eight_are_no_worse_than_the_table_says(word):
    weight = walk.gaussian(512, 1024)
    error = walk.nmse(Bitfield(word=word).encode(weight).decode(), weight)
    assert 0.22 < error < 0.24  # the table: .28 with 16 of the bits


def test_a_fitted_r_max_quantizes_factors_better_than_a_bad_one():
    # tanh alone has 256 factors; along one line nothing but they can err. Beyond r = 4 it is flat.
    inner, line = lines(64, 256, 1), walk.gaussian(1, 8, seed=1)
    line = line / line.norm()
    factors = (inner.view(-1, 8) @ line.t())[:, 0].numpy()

    def error(r_max):
        codec = Bitfield(functions="c0s0d0_c0s0d1", r_max=r_max)
        found, size, signs = fit_range(inner, line, codec._table, r_max, cover=False, byte=True)
        assert signs
        values = np.sort(codec._table(found)[0]) * size
        return (abs(factors[:, None] - values).min(1) ** 2).mean(), found

    (fitted, r_max), (bad, _) = error(0), error(8)
    assert 0.5 <= r_max < 8
    assert fitted < bad


def test_functions_of_one_sign_still_reach_both():
    weight = walk.gaussian(64, 512)
    packed = Bitfield(functions="c3s1d0").encode(weight)
    assert walk.nmse(packed.decode(), weight) < 0.5


@pytest.mark.parametrize("isa", walk.isas())
@pytest.mark.parametrize("setting", ["word=32", "word=22", "word=22, amplitude=uint16"])
@pytest.mark.parametrize("block", [2, 4, 8, 16])
def test_products_of_one_row_and_of_several_are_those_of_the_decoded_weight(block, setting, isa):
    packed = walk.random_layer(rs.codec(f"bitfield({setting}, block={block})"), (37, 200))
    weight = packed.decode().double()
    for batch in (1, 2, 5):
        x = walk.gaussian(batch, 200, seed=batch)
        with ops.use_isa(isa):
            y = torch.ops.reality_stone.linear(x, *walk.arguments(packed))
        assert walk.relative(y, x.double() @ weight.t()) < 2e-6
