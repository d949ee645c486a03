"""cyclic: tables and their identities, every code value, the choice of codes, exact integers."""

import itertools
from dataclasses import replace

import pytest
import torch
import walk
from mpmath import cos, mp, nint, pi

import reality_stone as rs
from reality_stone import Packed, ops, reference
from reality_stone.codecs import cyclic_tables

mp.dps = 30
WORDS = [
    rs.codec("cyclic", word=16),
    rs.codec("cyclic", word=32),
    rs.codec("cyclic", compound=True),
]
ON_WORDS = pytest.mark.parametrize("codec", WORDS, ids=walk.spec)
ON_ISAS = pytest.mark.parametrize("isa", walk.isas())


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "top", "n"), [("cyclic", 127, 16), ("cyclic16", 32767, 64), ("cyclic256", 32767, 256)]
)
def test_a_row_of_the_table_is_the_derivative_of_the_row_before(name, top, n):
    table = getattr(cyclic_tables, name)()
    for d, p in itertools.product(range(4), range(n)):
        assert table[d, p] == int(nint(top * cos(2 * pi * p / n + d * pi / 2)))
        assert table[d, p] == table[0, (p + n // 4 * d) % n]
    assert table.flatten().tolist() == ops._C.cyclic_tables()[name]


# --- codes ----------------------------------------------------------------------------------------


def bytes_of(words: torch.Tensor, count: int) -> torch.Tensor:
    """(out, in) integers -> (out, in, bytes) uint8, little-endian."""
    return (words[..., None] >> torch.arange(0, 8 * count, 8) & 255).to(torch.uint8)


def layer_of(codec, words: torch.Tensor, seed: int = 0) -> Packed:
    """The layer of these words with a random basis."""
    block = codec.block or 8
    shape = (words.shape[0], words.shape[1] * block)
    params = walk.random_layer(codec, shape, seed).params
    return Packed(codec, shape, bytes_of(words, codec.word // 8), params)


def every_word(codec) -> torch.Tensor:
    """All words of 16 bits; of 32 bits every phase, diff and amp, with different vectors."""
    if codec.word == 16:
        return torch.arange(1 << 16).view(256, 256)
    fields = torch.arange(1 << 14).view(128, 128)
    return fields >> 8 << 26 | (fields & 255) << 8 | (7 * fields & 255)


@ON_WORDS
def test_every_word_decodes_alike_on_every_instruction_set(codec):
    packed = layer_of(codec, every_word(codec))
    packed.check()
    want = reference.decode(*walk.arguments(packed))
    assert packed.codec.decode_reference(packed.codes, packed.params, packed.shape).equal(want)
    for isa in walk.isas():
        with ops.use_isa(isa):
            assert walk.same_bits(packed.decode(), want), isa


def test_a_weight_is_the_cosine_times_the_amplitude_times_its_vector():
    table = cyclic_tables.cyclic().double()
    phase, diff, amp, index = 3, 2, 11, 9
    for codec, word, factor in (
        (WORDS[0], phase << 12 | index << 4 | amp, table[0, phase] * amp / 2048),
        (WORDS[1], phase << 28 | diff << 26 | amp << 8 | index, table[diff, phase] * amp / 16384),
        (WORDS[2], phase << 12 | diff << 10 | amp << 4 | index, table[diff, phase] * amp / 8192),
    ):
        packed = layer_of(codec, torch.tensor([[word]]))
        packed.params["out_scale"] = torch.ones(1)
        want = factor * packed.params["basis"][index].double()
        assert torch.equal(packed.decode()[0], want.float()), codec.spec


@pytest.mark.parametrize("codec", WORDS[1:], ids=walk.spec)
def test_a_derivative_is_a_quarter_turn_of_the_phase(codec):
    high, low = (28, 26) if codec.word == 32 else (12, 10)
    rest = 0x1203 if codec.word == 32 else 0x0123
    words = [[phase << high | diff << low | rest for phase in range(16)] for diff in range(4)]
    weight = layer_of(codec, torch.tensor(words))
    weight.params["out_scale"] = torch.ones(4)
    blocks = weight.decode().view(4, 16, 8)
    for diff in range(4):
        assert torch.equal(blocks[diff], blocks[0].roll(-4 * diff, 0))


def test_reserved_bits_are_refused_and_the_encoder_writes_none_of_them():
    codec = WORDS[1]
    packed = walk.encoded(codec, (33, 50))
    packed.check()
    words = codec._words(packed.codes)
    assert not (words >> 26 & 3).any()  # diff, too, is always 0
    for bit in range(16, 26):
        bad = packed.codes.clone()
        bad[4, 3, bit // 8] |= 1 << bit % 8
        with pytest.raises(ValueError, match=r"tile \(4, 3\).*reserved bits 16 to 25"):
            replace(packed, codes=bad).check()


# --- encoder --------------------------------------------------------------------------------------


@ON_WORDS
def test_the_encoder_finds_the_best_of_all_codes(codec):
    codec = replace(codec, block=3)
    weight, importance = walk.gaussian(4, 12), torch.linspace(0.2, 3, 12)
    params = codec.initial_params(walk.gaussian(64, 12, seed=1), 0)
    params["out_scale"] = torch.ones(4)
    every = every_word(codec).flatten()
    if codec.word == 32:  # every level with every vector
        every = (every.unique() & ~255)[:, None] + torch.arange(0, 256, 16)
        params["basis"][torch.arange(256) % 16 != 0] = 0
        every = every.flatten().unique()
    level, index = codec._fields(bytes_of(every, codec.word // 8))
    all_blocks = level[:, None] * params["basis"][index] / 2**codec.shift
    for h in (None, importance):
        codes, fitted = ops.encode(weight, h, list(params.values()), codec.spec)
        got = ops.decode(codes, fitted, codec.spec, weight.shape)
        weights = torch.ones(12) if h is None else h
        for row, c in itertools.product(range(4), range(4)):
            at = slice(3 * c, 3 * c + 3)
            errors = ((all_blocks - weight[row, at]) ** 2 * weights[at]).sum(1)
            error = ((got[row, at] - weight[row, at]) ** 2 * weights[at]).sum()
            assert error <= errors.min() * (1 + 1e-4) + 1e-7


def test_the_gaussian_figures():
    # Basis 8 and amplitude 8 bits per 8 weights are to reach 0.28 at 2 bits. On independent weights
    # longer amplitudes buy next to nothing.
    weight = walk.gaussian(1024, 2048)
    found = [walk.nmse(codec.encode(weight).decode(), weight) for codec in WORDS]
    assert found[0] <= 0.28
    assert found[0] == pytest.approx(0.232, rel=0.03)
    assert found[1] == pytest.approx(0.232, rel=0.03)
    assert found[2] == pytest.approx(0.489, rel=0.03)


def test_one_code_per_row_reproduces_rows_that_are_multiples_of_few_vectors():
    weight = walk.gaussian(40, 1) * walk.gaussian(8, 96)[torch.arange(40) % 8]
    codec = rs.codec("cyclic", block=0)
    packed = codec.encode(weight)
    assert packed.codes.shape == (40, 1, 2)
    assert walk.nmse(packed.decode(), weight) < 1e-5
    assert ops.describe(codec.spec, (40, 96))[0]["tile"] == (1, 96, 2)


# --- products -------------------------------------------------------------------------------------


def to_integers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers of at most 127, their unit in float64), a unit for each row."""
    peak = x.abs().amax(-1, keepdim=True)
    small = peak < 1e-30
    top = torch.full_like(peak, 127)
    inverse = torch.where(small, 0, top / peak.where(~small, 1))
    return (x * inverse).round().long(), torch.where(small, 0, peak / top).double()


class Integers:
    """The products of activation="int8" in int64, as csrc/cpu/cyclic_product.h defines them."""

    def __init__(self, packed: Packed):
        codec, (self.out, self.features) = packed.codec, packed.shape
        basis = packed.params["basis"]
        self.block = basis.shape[1]
        self.level, self.index = codec._fields(packed.codes)  # (out, columns)
        flat, self.unit = to_integers(basis.flatten())
        self.basis, self.unit = flat.view(basis.shape), self.unit / 2**codec.shift
        self.scale = packed.params["out_scale"]

    def linear(self, x):
        q, unit = to_integers(x)
        q = torch.nn.functional.pad(q, (0, -self.features % self.block))
        dots = q.view(len(x), -1, self.block) @ self.basis.t()  # (batch, columns, vectors)
        columns = torch.arange(self.level.shape[1])
        sums = (dots[:, columns, self.index] * self.level).sum(-1)
        return (sums.double() * (unit * self.unit)).float() * self.scale

    def linear_grad_input(self, grad):
        q, unit = to_integers(grad * self.scale)
        weight = self.level[..., None] * self.basis[self.index]  # (out, columns, block)
        sums = q @ weight.flatten(1)
        return (sums.double() * (unit * self.unit)).float()[:, : self.features]


def int8_layers():
    """Random layers of every word, and of block sizes whose dot products need more than 16 bits."""
    for codec in WORDS:
        for block, shape in ((8, (70, 264)), (5, (33, 50)), (128, (40, 1000)), (0, (9, 60))):
            yield walk.random_layer(replace(codec, activation="int8", block=block), shape)
    # Every sum as large as can be: 16-bit dot products, then some that need more.
    codec = replace(WORDS[1], activation="int8")
    words = torch.full((300, 40), 0x0000FF05)
    for tall in (1.0, 0.5):
        packed = layer_of(codec, words)
        packed.params["basis"].fill_(tall)
        packed.params["basis"][7, 0] = 1
        yield packed


def test_int8_products_are_those_of_the_integers_on_every_instruction_set():
    for packed in int8_layers():
        judge, (out, features) = Integers(packed), packed.shape
        for batch in (1, 3, 17, 40):
            x, grad = walk.gaussian(batch, features), walk.gaussian(batch, out)
            x[batch // 2, 5:] *= 100
            grad[0, 2] = 0
            if packed.params["basis"].min() > 0:
                x, grad = torch.ones(batch, features), -torch.ones(batch, out)
            want, want_back = judge.linear(x), judge.linear_grad_input(grad)
            assert want.any()
            assert want_back.any()
            for isa in walk.isas():
                with ops.use_isa(isa):
                    assert torch.equal(packed.linear(x), want), (packed.codec.spec, isa)
                    back = ops.linear_grad_input(grad, *walk.arguments(packed))
                    assert torch.equal(back, want_back), (packed.codec.spec, isa)


def test_int8_products_do_not_depend_on_threads_or_on_what_else_is_in_the_batch():
    codec = rs.codec("cyclic", activation="int8")
    packed = walk.random_layer(codec, (1000, 256))
    x, grad = walk.gaussian(40, 256), walk.gaussian(40, 1000)
    x[3], grad[3] = 0, 0
    want, back = packed.linear(x), ops.linear_grad_input(grad, *walk.arguments(packed))
    assert not want[3].any()
    assert not back[3].any()
    with walk.threads(2):
        assert torch.equal(packed.linear(x), want)
        assert torch.equal(ops.linear_grad_input(grad, *walk.arguments(packed)), back)
    assert torch.equal(packed.linear(x[7:8]), want[7:8])
    assert torch.equal(ops.linear_grad_input(grad[7:8], *walk.arguments(packed)), back[7:8])


def test_int8_is_declared_and_exact_accuracy_leaves_it():
    packed = walk.random_layer(rs.codec("cyclic", activation="int8"), (64, 256))
    floats = replace(packed, codec=rs.codec("cyclic"))
    term = ops.describe(packed.codec.spec, packed.shape)[0]
    assert term["linear"].startswith("int8")
    assert walk.same_bits(packed.decode(), floats.decode())
    x, grad = walk.gaussian(3, 256), walk.gaussian(3, 64)
    assert not torch.equal(packed.linear(x), floats.linear(x))
    with ops.accuracy("exact"):
        assert torch.equal(packed.linear(x), floats.linear(x))
        one, two = (ops.linear_grad_input(grad, *walk.arguments(p)) for p in (packed, floats))
        assert torch.equal(one, two)


@ON_WORDS
def test_direct_products_have_the_same_bits_on_every_instruction_set(codec):
    for shape in ((33, 50), (70, 1000), (300, 264)):
        packed = walk.random_layer(codec, shape)
        for batch in (1, 9):
            x = walk.gaussian(batch, shape[1])
            found = []
            for isa in walk.isas():
                with ops.use_isa(isa):
                    found.append(packed.linear(x))
            assert all(torch.equal(y, found[0]) for y in found)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"word": 24}, "word must be 16 or 32"),
        ({"word": 32, "compound": True}, "compound=True needs word=16"),
        ({"block": -1}, "block must be a whole number from 0 to 65536"),
        ({"block": 65537}, "block must be a whole number from 0 to 65536"),
        ({"activation": "half"}, "activation must be float or int8"),
    ],
)
def test_settings_out_of_range_are_refused_in_both_languages(settings, message):
    with pytest.raises(ValueError, match=message):
        rs.codec("cyclic", **settings)
    text = ", ".join(f"{key}={value}" for key, value in settings.items())
    with pytest.raises(ValueError, match=message):
        ops._C.describe(f"cyclic({text})", 16, 32)


def test_int8_refuses_rows_whose_dot_products_would_overflow():
    codec = rs.codec("cyclic", activation="int8", block=0)
    message = "at most 131072 weights, got 131073"
    with pytest.raises(ValueError, match=message):
        codec.tile((1, 131073))
    with pytest.raises(ValueError, match=message):
        ops._C.describe(codec.spec, 1, 131073)
    # The largest sum there can be.
    assert ops.describe(codec.spec, (1, 131072))[0]["tile"] == (1, 131072, 2)
    packed = walk.random_layer(codec, (1, 131072))
    packed.params["basis"].fill_(-1)
    packed.codes[:] = torch.tensor([0x0F, 0x00], dtype=torch.uint8)
    x = torch.ones(1, 131072)
    assert torch.equal(packed.linear(x), Integers(packed).linear(x))
