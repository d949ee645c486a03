"""Derivatives from the codes: the engine's identities for every code, bit calculus, field
gradients against float64 and against what a move really does."""

import doctest
import itertools
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import walk
from mpmath import cos, mp, nint, pi

import reality_stone as rs
from reality_stone import ops, reference
from reality_stone.codecs import cyclic_tables
from reality_stone.codecs.radial import held_r_max, radial_functions
from reality_stone.derivative import (
    LAYOUTS,
    FieldGradients,
    bit_derivative,
    bit_partial,
    boolean_derivative,
    chain,
    delta,
    euler,
    field_gradient,
    field_gradient_from,
    moves,
    rotate,
)
from reality_stone.nn import RBELinear

mp.dps = 30
ON_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)
# Phases of a turn, whether the codes have 16 bits, and the fields, as the formats draw them.
PERIODS = {"documents": 16, "documents_fine": 64, "cyclic_scalar_16": 256}
COSINES = [name for name in LAYOUTS if name != "cyclic_scalar_8"]


# --- engine ---------------------------------------------------------------------------------------


def word(layout: str, phase, diff, amp):
    """A code of these fields; phase counts in the code's own steps."""
    if layout.startswith("documents"):
        return phase << 24 | diff << 22 | amp
    if layout.startswith("cyclic_32"):
        return phase << 28 | diff << 26 | amp << 8
    if layout.startswith("cyclic_16"):
        return phase << 12 | amp
    if layout.startswith("cyclic_compound"):
        return phase << 12 | diff << 10 | amp << 4
    return phase | diff << 8 | amp << 10  # cyclic_scalar_16


def sizes(layout: str) -> tuple[int, int, int]:
    """How many phases, diffs and amplitudes there are."""
    if layout.startswith("documents"):
        return 256, 4, 256
    if layout.startswith("cyclic_32"):
        return 16, 4, 256
    if layout.startswith("cyclic_16"):
        return 16, 1, 16
    if layout.startswith("cyclic_compound"):
        return 16, 4, 64
    return 256, 4, 64


def every_code(layout: str) -> tuple[torch.Tensor, ...]:
    """(codes int32, phase, diff, amp), each (phases, diffs, amps)."""
    phase, diff, amp = torch.meshgrid(*(torch.arange(n) for n in sizes(layout)), indexing="ij")
    return word(layout, phase, diff, amp).to(torch.int32), phase, diff, amp


def formula(layout: str, phase, diff, amp, order: int) -> torch.Tensor:
    """round(top cos) * amp >> shift, nothing shared with the library."""
    fine = layout.endswith("_fine") or layout == "cyclic_scalar_16"
    period = PERIODS.get(layout, 64 if fine else 16)
    turn = [int(nint((32767 if fine else 127) * cos(2 * pi * k / period))) for k in range(period)]
    column = phase * period // sizes(layout)[0] + period // 4 * (diff + order)
    level = torch.tensor(turn)[column % period]
    if layout == "cyclic_scalar_16":
        return level * (amp + 1) >> 6
    bits = sizes(layout)[2].bit_length() - 1
    return level * amp >> (7 if layout == "documents" else bits if fine else 0)


@pytest.mark.parametrize("layout", COSINES)
def test_every_code_has_the_value_of_the_formula_and_of_the_reference(layout):
    codes, *fields = every_code(layout)
    for order in range(5):
        got = bit_derivative(codes, order, layout)
        assert got.dtype == torch.int16
        assert torch.equal(got.long(), formula(layout, *fields, order))
        assert torch.equal(got, reference.KERNELS["bit_derivative"](codes, order, layout))


@pytest.mark.parametrize("layout", COSINES)
def test_orders_come_back_after_four_and_one_is_a_quarter_period_for_every_code(layout):
    codes, *_ = every_code(layout)
    quarter = sizes(layout)[0] // 4
    for order in range(4):
        value = bit_derivative(codes, order, layout)
        assert torch.equal(bit_derivative(codes, order + 4, layout), value)
        following = bit_derivative(codes, order + 1, layout)
        assert torch.equal(following, value.roll(-quarter, 0))
        if sizes(layout)[1] == 4:  # a diff is an order that the code carries itself
            assert torch.equal(following, value.roll(-1, 1))
        assert not torch.equal(following, value)


def test_every_code_of_the_8_bit_families_follows_its_own_law():
    codes = torch.arange(256, dtype=torch.int32)
    table = cyclic_tables.cyclic_scalar()
    for order in range(9):
        got = bit_derivative(codes, order, "cyclic_scalar_8").view(4, 4, 16)
        assert torch.equal(got, table.roll(-order, 1).short())
        assert torch.equal(
            got.flatten(), reference.KERNELS["bit_derivative"](codes, order, "cyclic_scalar_8")
        )
        following = bit_derivative(codes, order + 1, "cyclic_scalar_8").view(4, 4, 16)
        assert torch.equal(following[0], got[0].roll(-4, -1))  # cosine: a quarter period
        after = bit_derivative(codes, order + 2, "cyclic_scalar_8").view(4, 4, 16)
        assert torch.equal(after[1], got[1])  # sinh and cosh: two orders
        assert torch.equal(following[2], got[2])  # exp: one
        assert not torch.equal(after[3], got[3])  # tanh: four, by convention
        again = bit_derivative(codes, order + 4, "cyclic_scalar_8").view(4, 4, 16)
        assert torch.equal(again, got)


@ON_LAYOUTS
def test_bits_of_other_fields_are_not_read(layout):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31, (50000,), generator=generator).to(torch.int32)
    row = LAYOUTS[layout]
    read = 0
    for at, mask in (row.phase, row.diff, row.amp, row.family):
        read |= mask << at
    alone = (codes.long() & read).to(torch.int32)
    for order in range(4):
        value = bit_derivative(codes, order, layout)
        assert torch.equal(value, bit_derivative(alone, order, layout))
        assert torch.equal(value, reference.KERNELS["bit_derivative"](codes, order, layout))


def test_order_0_is_what_the_codec_multiplies_its_vectors_with():
    for codec, words, layout in (
        (rs.codec("cyclic", word=16), torch.arange(1 << 16), "cyclic_16"),
        (rs.codec("cyclic", compound=True), torch.arange(1 << 16), "cyclic_compound"),
        (rs.codec("cyclic", word=32), every_code("cyclic_32")[0].flatten().long(), "cyclic_32"),
    ):
        stored = (words[:, None] >> torch.arange(0, codec.word, 8) & 255).to(torch.uint8)
        level, _ = codec._fields(stored[None])
        assert torch.equal(bit_derivative(words.to(torch.int32), 0, layout).long(), level[0])


def test_any_shape_strides_and_number_of_threads():
    codes = walk.random_bytes(70, 3, 1001, 4).view(torch.int32)[..., 0]
    want = bit_derivative(codes, 1)
    assert want.shape == codes.shape
    assert torch.equal(bit_derivative(codes.transpose(0, 2), 1), want.transpose(0, 2))
    assert torch.equal(bit_derivative(walk.spread(codes), 1), want)
    assert torch.equal(bit_derivative(walk.misaligned(codes), 1), want)
    assert bit_derivative(codes[:0], 1).shape == (0, 3, 1001)
    assert bit_derivative(codes[0, 0, 0], 1) == want[0, 0, 0]
    with walk.threads(3):
        assert torch.equal(bit_derivative(codes, 1), want)


def test_every_op_has_a_kernel_everywhere_and_the_reference_replaces_none():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(
        has(f"reality_stone::{name}", key) for name in ops.SCHEMAS for key in ("CPU", "CUDA")
    )
    codes = torch.arange(8, dtype=torch.int32)
    want = bit_derivative(codes, 1)
    ops.register_reference({"bit_derivative": lambda codes, order, layout: None})
    assert torch.equal(bit_derivative(codes, 1), want)


@pytest.mark.parametrize("kernel", [ops.bit_derivative, reference.KERNELS["bit_derivative"]])
def test_bad_arguments_are_named(kernel):
    codes = torch.zeros(3, dtype=torch.int32)
    names = ", ".join(LAYOUTS)  # the compiled layouts, in the same order
    with pytest.raises(ValueError, match=rf"layout must be one of {names}, got 'cyclic'"):
        kernel(codes, 0, "cyclic")
    with pytest.raises(TypeError, match=r"codes must be int32, got (Long|torch\.int64)"):
        kernel(codes.long(), 0, "documents")
    with pytest.raises(ValueError, match="order must be 0 or more, got -1"):
        kernel(codes, -1, "documents")


# --- chain, euler, rotate -------------------------------------------------------------------------


def test_the_chain_rule_multiplies_in_32_bits_and_is_held_to_16():
    codes = walk.random_bytes(4096, 2, 4).view(torch.int32)[..., 0]
    grad = torch.randint(-32768, 32768, (4096,), dtype=torch.int16)
    for layout in ("documents", "documents_fine", "cyclic_32"):
        got = chain(codes[:, 0], codes[:, 1], grad, layout)
        for i in range(2):
            slope = bit_derivative(codes[:, i], 1, layout).tolist()
            want = [(g * s) >> 15 for g, s in zip(grad.tolist(), slope, strict=True)]
            want = [min(max(v, -32768), 32767) for v in want]
            assert got[i].tolist() == want
    # The one product beyond int16: -32768 * -32768 >> 15; no table reaches it, a grad of it does.
    lowest = torch.tensor([-32768], dtype=torch.int16)
    sine = torch.tensor([16 << 26 | 255], dtype=torch.int32)  # the derivative is -32767 * 255 >> 8
    assert chain(sine, sine, lowest, "documents_fine")[0].item() == 32640
    with pytest.raises(TypeError, match=r"grad must be int16, got torch\.int32"):
        chain(codes[:, 0], codes[:, 1], grad.int())


def test_euler_is_cosine_and_sine_for_every_phase_of_any_sign():
    phase = torch.arange(-40, 40)
    angle = phase.double() * (2 * math.pi / 16)
    want = (127 * torch.stack((angle.cos(), angle.sin()), -1)).round()
    assert torch.equal(euler(phase).double(), want)
    assert euler(phase.to(torch.int8).view(8, 10)).shape == (8, 10, 2)
    with pytest.raises(TypeError, match="phase must be integers"):
        euler(angle)


def test_rotate_is_the_shifted_and_held_product_for_every_number_and_turn():
    part = torch.arange(-128, 128)
    a, b = torch.meshgrid(part, part, indexing="ij")
    z = torch.stack((a, b), -1).to(torch.int8)
    for turn in range(16):
        c, d = euler(torch.tensor(turn)).tolist()
        want = torch.stack((a * c - b * d, a * d + b * c), -1) >> 7
        got = rotate(z, torch.tensor(turn))
        assert got.dtype == torch.int8
        assert torch.equal(got.long(), want.clamp(-128, 127))
        # Off the true rotation: a level of the table (half of 1/127 in each of two products), the
        # shift by 128 instead of 127, and rounding down; but for what had to be held.
        angle = turn * 2 * math.pi / 16
        true = torch.stack(
            (
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            ),
            -1,
        )
        held = (true.abs() > 126).any(-1)
        bound = 2 * 128 * 0.5 / 127 + 128 * math.sqrt(2) / 128 + 1
        assert (got - true)[~held].abs().max() <= bound
        assert held.any()
    with pytest.raises(TypeError, match="z must be int8"):
        rotate(z.int(), torch.tensor(1))


# --- bits -----------------------------------------------------------------------------------------

CODES = torch.arange(256)


def functions(seed: int, bits: int, count: int = 2) -> list:
    """Random functions of 8-bit codes with values of `bits` bits."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randint(0, 2**bits, (count, 256), generator=generator)
    return [lambda code, t=t: t[code] for t in tables]


def test_delta_is_one_where_all_bits_agree():
    i, j = torch.meshgrid(CODES, CODES, indexing="ij")
    assert torch.equal(delta(i, j), torch.eye(256, dtype=torch.long))
    bits = torch.stack([1 - (((i ^ j) >> k) & 1) for k in range(8)]).prod(
        0
    )  # the documents' product
    assert torch.equal(delta(i, j), bits)
    assert delta(i.to(torch.uint8), j.to(torch.uint8)).dtype == torch.int32
    assert (delta(5, 5), delta(5, 4)) == (1, 0)
    for k, target in itertools.product(range(8), (0, 77, 255)):
        got = bit_partial(lambda c, t=target: delta(c, torch.tensor(t)), CODES, k)
        want = delta(CODES ^ 1 << k, torch.tensor(target)) - delta(CODES, torch.tensor(target))
        assert torch.equal(got, want)


@pytest.mark.parametrize("k", range(8))
@pytest.mark.parametrize("seed", range(4))
def test_sums_products_and_chains_of_boolean_derivatives(seed, k):
    f, g = functions(seed, 8)
    (bit,) = functions(seed + 100, 1, 1)

    def d(h):
        return boolean_derivative(h, CODES, k)

    df, dg = d(f), d(g)
    assert torch.equal(d(lambda c: f(c) ^ g(c)), df ^ dg)
    product = (df & g(CODES)) ^ (f(CODES) & dg) ^ (df & dg)
    assert torch.equal(d(lambda c: f(c) & g(c)), product)
    either = (df & ~g(CODES)) ^ (~f(CODES) & dg) ^ (df & dg)
    assert torch.equal(d(lambda c: f(c) | g(c)), either)
    assert torch.equal(d(lambda c: f(g(c))), f(g(CODES) ^ dg) ^ f(g(CODES)))
    follows = -d(bit)  # all bits where the inner bit follows
    assert torch.equal(d(lambda c: f(bit(c))), boolean_derivative(f, bit(CODES), 0) & follows)
    # The documents' product rule lacks a term.
    assert not torch.equal(product, (df & g(CODES)) ^ (f(CODES) & dg))


def test_boolean_derivatives_commute_and_vanish_the_second_time():
    (f,) = functions(3, 8, 1)
    for j, k in itertools.product(range(8), range(8)):
        twice = boolean_derivative(lambda c: boolean_derivative(f, c, k), CODES, j)  # noqa: B023
        other = boolean_derivative(lambda c: boolean_derivative(f, c, j), CODES, k)  # noqa: B023
        assert torch.equal(twice, other)
        assert (j != k) or not twice.any()


def test_bit_partials_are_differences_of_any_values():
    value = walk.gaussian(256)
    ones = sum(CODES >> i & 1 for i in range(8))
    for k in range(8):
        got = bit_partial(lambda c: value[c], CODES, k)
        assert torch.equal(got, value[CODES ^ 1 << k] - value)
        sign = 1 - 2 * (CODES >> k & 1)
        assert torch.equal(bit_partial(lambda c: c, CODES, k), sign << k)
        # The documents' example, the number of ones: -1 and 1 alone.
        assert torch.equal(bit_partial(lambda c: ones[c], CODES, k), sign)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_every_bit_of_every_type_of_code_can_be_turned(dtype):
    bits = torch.iinfo(dtype).bits
    code = torch.tensor([0, 1, 77], dtype=dtype)
    turned = [boolean_derivative(lambda c: c, code, k) for k in range(bits)]
    assert all((t == t[0]).all() for t in turned)
    assert len({t[0].item() for t in turned}) == bits
    for k in (-1, bits):
        with pytest.raises(ValueError, match=f"bit must be from 0 to {bits - 1}"):
            boolean_derivative(lambda c: c, code, k)
    with pytest.raises(TypeError, match=r"a code must be integers, got torch\.float32"):
        bit_partial(lambda c: c, code.float(), 0)


# --- fields ---------------------------------------------------------------------------------------

SHAPE = (9, 40)
WITH_SLOPES = [
    rs.codec(text)
    for text in (
        "cyclic(word=16)",
        "cyclic(word=32, block=5)",
        "cyclic(compound=True)",
        "cyclic(word=16, block=0, activation=int8)",
        "cyclic_scalar(bits=8, group=7)",
        "cyclic_scalar(bits=16, group=16)",
        "bitfield(word=22)",
        "bitfield(word=32, block=4)",
        "bitfield(word=22, functions=klein, r_max=2, block=3)",
        "bitfield(word=22, amplitude=uint16, block=1)",
        "bitfield(word=22, amplitude=float32, block=2)",
        "residual(base=cyclic(word=32), rest=uniform(bits=3))",
    )
]
ON_SLOPES = pytest.mark.parametrize("codec", WITH_SLOPES, ids=walk.spec)


def any_layer(codec, seed: int = 0):
    """Random codes that are valid, and params of which none is zero."""
    packed = walk.random_layer(codec, SHAPE, seed)
    for name, p in packed.params.items():
        if p.is_floating_point():
            packed.params[name] = p.sign().where(p != 0, 1) * (p.abs() + 0.1)
    if "r_max" in packed.params:
        packed.params["r_max"] = torch.tensor([1.7])
    return packed


def in_float64(packed):
    params = {n: p.double() if p.is_floating_point() else p for n, p in packed.params.items()}
    return rs.Packed(packed.codec, packed.shape, packed.codes, params)


def loss_changes(packed, grad, move) -> tuple[torch.Tensor, torch.Tensor]:
    """<grad, change of W> per code when every code makes the move, and the field's change."""
    packed = in_float64(packed)
    codes = move.apply(packed.codes)
    change = reference.decode(codes, *walk.arguments(packed)[1:]) - reference.decode(
        *walk.arguments(packed)
    )
    step = move.field.read(codes) - move.field.read(packed.codes)
    return move.sums(grad * change, codes), step


@ON_SLOPES
def test_gradients_of_indices_and_amplitudes_are_what_moves_change(codec):
    packed, grad = any_layer(codec), walk.gaussian(*SHAPE).double()
    found = field_gradient(grad, *walk.arguments(in_float64(packed)))
    # Functions of the radius are no lines, but between the entries of a table.
    linear = codec.name != "bitfield"
    seen = set()
    for move in moves(codec, SHAPE):
        change, step = loss_changes(packed, grad, move)
        field = move.field.name
        if field == "index":
            got = found["index"][..., int(move.name[-1])]
        elif field == "amplitude" and linear and "amplitude" in found:
            got = found["amplitude"] * step
        elif field == "fraction":
            got = found["amplitude"] * step / 256
        else:
            continue
        seen.add(field)
        # Float64 throughout, from tables that are exact or the same float32 values on both sides.
        assert torch.allclose(got, change, rtol=1e-9, atol=1e-9), move.name
    assert seen or codec.name == "cyclic_scalar"


# name -> (steps of a turn, error of the table's values relative to its largest).
PHASES = {"cyclic": (16, 0.5 / 127), "bitfield": (256, 2.0**-24), "cyclic_scalar": (256, 2.0**-24)}


@ON_SLOPES
def test_gradients_of_phases_are_half_the_difference_of_both_neighbours(codec):
    # cos(p + h) - cos(p - h) = -2 sin(p) sin(h), whatever h is.
    packed, grad = any_layer(codec), walk.gaussian(*SHAPE).double()
    found = field_gradient(grad, *walk.arguments(in_float64(packed)))
    if "phase" not in found or codec.spec.startswith("cyclic_scalar(bits=8"):
        return
    both = {move.name: move for move in moves(codec, SHAPE) if move.field.name == "phase"}
    up, _ = loss_changes(packed, grad, both["phase+1"])
    down, _ = loss_changes(packed, grad, both["phase-1"])
    turn, error = PHASES[getattr(codec, "base", codec).name]
    want = (up - down) / (2 * math.sin(2 * math.pi / turn))
    # Three rounded values, the outer two magnified by the division.
    bound = error * (1 + 1 / math.sin(2 * math.pi / turn))
    size = full_scale(packed, grad)
    assert ((found["phase"] - want).abs() <= bound * size).all()
    assert (found["phase"].abs() > 0.01 * size).any()


def full_scale(packed, grad, name: str = "phase") -> torch.Tensor:
    """Sum of |grad| |w| under each code when its cosine is one, or of the part that one step of the
    amplitude adds: what errors of a table's values are relative to."""
    packed = in_float64(packed)
    codec = getattr(packed.codec, "base", packed.codec)
    own = {k: p for k, p in packed.params.items() if "rest" not in k}
    slopes = codec.slopes(packed.codes, own, SHAPE)
    length = (slopes.factor**2 + slopes.by["phase"] ** 2).sqrt() * 1.01
    if name == "amplitude":
        length = torch.full_like(length, 127 * 2.0**-codec.shift)
    move = moves(codec, SHAPE)[0]
    size = move.spread(length, (SHAPE[0], length.shape[1] * move.cols)).clone()
    if slopes.vectors is not None:
        size *= slopes.vectors[slopes.index].flatten(1).abs()
    size = size[:, : SHAPE[1]]
    if "out_scale" in packed.params:
        size = size * packed.params["out_scale"].abs()[:, None]
    return move.sums(size * grad.abs(), packed.codes)


def continuous(codec, packed):
    """(leaves, W) in float64: the decode with continuous phases, radii or amplitudes, written from
    the formulas of the formats; index and params as they are. Only for codecs of one term."""
    p = in_float64(packed).params
    if codec.name == "cyclic":
        width = {16: 6 if codec.compound else 4, 32: 8}[codec.word]
        words = codec._words(packed.codes)
        fields = {f.name: f.read(packed.codes) for f in codec.fields(SHAPE)}
        turn = (words >> (28 if codec.word == 32 else 12)) & 15
        phase = (turn + 4 * fields.get("diff", 0)) * (2 * math.pi / 16)
        leaves = {"phase": phase.double(), "amplitude": fields["amplitude"].double()}
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        level = 127 * leaves["phase"].cos() * leaves["amplitude"]
        factor = level / {4: 2048, 6: 8192, 8: 16384}[width]
        blocks = factor[..., None] * p["basis"][fields["index"].long()]
        return leaves, blocks.flatten(1)[:, : SHAPE[1]] * p["out_scale"][:, None]
    if codec.name == "cyclic_scalar":
        fields = {f.name: f.read(packed.codes)[:, : SHAPE[1]] for f in codec.fields(SHAPE)}
        scale = p["scale"].repeat_interleave(codec.group, 1)[:, : SHAPE[1]]
        steps = 16 if codec.bits == 8 else 256
        phase = (fields["phase"].double() * (2 * math.pi / steps)).requires_grad_()
        leaves, diff = {"phase": phase}, fields["diff"]
        cosine = (phase + diff * (math.pi / 2)).cos()
        if codec.bits == 16:
            leaves["amplitude"] = fields["amplitude"].double().requires_grad_()
            return leaves, cosine * (leaves["amplitude"] + 1) / 64 * scale
        x = (phase * (16 / (2 * math.pi)) - 7.5) / 7.5
        grid = (torch.arange(16, dtype=torch.double) - 7.5) / 7.5
        tanh = [tanh_derivative(d, x) / tanh_derivative(d, grid).abs().max() for d in range(4)]
        sinh, cosh = x.sinh() / math.sinh(1), x.cosh() / math.cosh(1)
        w = torch.where(diff % 2 == 1, cosh, sinh)
        w = torch.where(fields["family"] == 0, cosine, w)
        w = torch.where(fields["family"] == 2, (x - 1).exp(), w)
        for d in range(4):
            w = torch.where((fields["family"] == 3) & (diff == d), tanh[d], w)
        return leaves, w * scale
    return continuous_bitfield(codec, packed, p)


def tanh_derivative(order: int, x: torch.Tensor) -> torch.Tensor:
    """The order-th derivative of tanh(2 x), by autograd."""
    y = leaf = x.detach().requires_grad_() if order and not x.requires_grad else x
    y = torch.tanh(2 * leaf)
    for _ in range(order):
        (y,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    return y


class Radial(torch.autograd.Function):
    """f(r) of numbered functions; the derivative by central differences."""

    @staticmethod
    def forward(ctx, r, number):
        def f(x):
            all_values = torch.from_numpy(radial_functions(x.detach().flatten().numpy()).v)
            return all_values.gather(0, number.flatten()[None])[0].view(x.shape)

        h = 1e-5
        ctx.save_for_backward((f(r + h) - f(r - h)) / (2 * h))
        return f(r)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def continuous_bitfield(codec, packed, p):
    words = codec.unpack(packed.codes)
    r_max = held_r_max(p["r_max"].item())
    if codec.word == 22:
        cat, sub, idx, d = words >> 20 & 3, words >> 18 & 3, words >> 10 & 255, words >> 8 & 3
        leaves = {"radius": ((words & 255) * (r_max / 255)).double().requires_grad_()}
        factor = Radial.apply(leaves["radius"], 16 * cat + 4 * sub + d)
    else:
        cat, sub, idx, d = words >> 22 & 3, words >> 20 & 3, words >> 12 & 255, words >> 10 & 1
        r = (words & 1023) * (r_max / 1023) * (1 - 2 * (words >> 11 & 1))
        phase = (words >> 24) * (2 * math.pi / 256)
        leaves = {"radius": r.double().requires_grad_(), "phase": phase.double().requires_grad_()}
        factor = Radial.apply(leaves["radius"], 16 * cat + 4 * sub + d) * leaves["phase"].cos()
    blocks = factor[..., None] * p["basis"][idx]
    return leaves, blocks.flatten(1)[:, : SHAPE[1]] * p["out_scale"][:, None]


@pytest.mark.parametrize(
    "codec",
    [c for c in WITH_SLOPES if c.name != "residual" and getattr(c, "amplitude", "byte") == "byte"],
    ids=walk.spec,
)
def test_gradients_are_those_of_a_continuous_decode_in_float64(codec):
    packed, grad = any_layer(codec, seed=5), walk.gaussian(*SHAPE, seed=6).double()
    found = field_gradient(grad, *walk.arguments(in_float64(packed)))
    leaves, w = continuous(codec, packed)
    wanted = dict(zip(leaves, torch.autograd.grad((w * grad).sum(), leaves.values()), strict=True))
    # The table of int8 is off by half a level; others by roundings to float32, and a function of
    # the radius by its numeric derivative. Functions with a pole in their slope are left out.
    error = 0.5 / 126 if codec.name == "cyclic" else 1e-6
    for name, want in wanted.items():
        got = found[name][:, : want.shape[1]]
        usual = (want.abs() < 1e3 * want.abs().median()) & (want.abs() > 0)
        largest = want[usual].abs().max()
        assert usual.float().mean() > 0.4
        if codec.name == "cyclic":
            assert ((got - want).abs() <= error * full_scale(packed, grad, name)).all(), name
        else:
            assert ((got - want)[usual].abs() <= error * largest).all(), name
    if "radius" in wanted:  # a step of the amplitude is one of the radius, turned by the sign
        top = 255 if codec.word == 22 else 1023
        sign = 1 if codec.word == 22 else 1 - 2 * (codec.unpack(packed.codes) >> 11 & 1)
        step = found["radius"] * sign * (held_r_max(1.7) / top)
        assert torch.allclose(found["amplitude"], step, rtol=1e-6)


@ON_SLOPES
def test_gradients_from_inputs_are_those_of_their_product(codec):
    packed = any_layer(codec)
    x, grad_y = walk.gaussian(2, 3, SHAPE[1]), walk.gaussian(2, 3, SHAPE[0], seed=1)
    want = field_gradient(
        (grad_y.flatten(0, 1).t() @ x.flatten(0, 1)).double(), *walk.arguments(packed)
    )
    got = field_gradient_from(grad_y, x, *walk.arguments(packed))
    assert list(got) == list(want)
    # Sums of up to 40 float32 products of 6 float32 products; differences of neighbouring entries
    # of a table of 256 lose eight bits.
    wide = getattr(codec, "amplitude", "byte") != "byte"
    for name in want:
        assert got[name].dtype == torch.float32
        assert walk.relative(got[name], want[name]) < (2e-5 if wide else 1e-6)
    again = field_gradient_from(grad_y, x, *walk.arguments(packed), into=got)
    assert again is got
    assert walk.relative(got[name], 2 * want[name]) < 1e-6
    half = field_gradient_from(grad_y.bfloat16(), x.bfloat16(), *walk.arguments(packed))
    rounded = field_gradient_from(
        grad_y.bfloat16().float(), x.bfloat16().float(), *walk.arguments(packed)
    )
    assert torch.equal(half[name], rounded[name])
    empty = field_gradient_from(grad_y[:0], x[:0], *walk.arguments(packed))
    assert all(not g.any() and g.shape == want[n].shape for n, g in empty.items())


@ON_SLOPES
def test_blocks_of_rows_change_nothing(codec, monkeypatch):
    packed, grad = any_layer(codec), walk.gaussian(*SHAPE)
    want = field_gradient(grad, *walk.arguments(packed))
    monkeypatch.setattr("reality_stone.derivative.gradients.BLOCK_WEIGHTS", 2 * SHAPE[1])
    got = field_gradient(grad, *walk.arguments(packed))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_gradients_from_inputs_take_less_than_64_mb_beside_their_result():
    # In one block the second layer would take about 200 MB.
    program = """
        import sys
        import torch
        import walk
        import reality_stone as rs
        from reality_stone.derivative import field_gradient_from

        def kilobytes(name):
            return int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

        torch.set_num_threads(1)
        for spec in sys.argv[1:]:
            small = walk.random_layer(rs.codec(spec), (8, 4096))  # what a first call keeps
            x, grad = torch.ones(600, 4096).bfloat16(), torch.ones(600, 512).bfloat16()
            field_gradient_from(grad[:1, :8], x[:1], *walk.arguments(small))
            packed = walk.random_layer(rs.codec(spec), (512, 4096))
            before = kilobytes("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")
            found = field_gradient_from(grad, x, *walk.arguments(packed))
            held = sum(g.nbytes for g in found.values()) / 1024
            print(spec, round(kilobytes("VmHWM") - before - held))
    """
    specs = ["cyclic", "bitfield(amplitude=float32, block=1)"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *specs],
        capture_output=True,
        text=True,
        timeout=120,
        # Freed memory goes back at once.
        env=os.environ
        | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    taken = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(taken) == len(specs)
    assert max(taken) < 64 * 1024, done.stdout


def test_a_layers_backward_gives_its_field_gradients():
    for codec in ("bitfield", "cyclic", "cyclic_scalar"):
        layer = RBELinear.from_packed(any_layer(rs.codec(codec)), torch.zeros(SHAPE[0]))
        x = walk.gaussian(5, 3, SHAPE[1])
        want = field_gradient(
            torch.ones(SHAPE[0], 1) * x.sum((0, 1)), *walk.arguments(layer.packed)
        )
        fields = FieldGradients(layer)
        assert fields.gradients == {}
        with fields:
            layer(x).sum().backward()
            first = {name: g.clone() for name, g in fields.gradients.items()}
            with pytest.raises(ValueError, match="has an observer already"):
                FieldGradients(layer).attach()
            layer(x).sum().backward()
        layer(x).sum().backward()  # no more looked at
        assert layer.observer is None
        assert layer.bias.grad is not None
        for name in want:
            assert walk.relative(first[name], want[name]) < 1e-6  # as above
            assert torch.equal(fields.gradients[name], 2 * first[name])
        fields.clear()
        assert fields.gradients == {}


def test_gradients_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="trellis: its codes have no fields with derivatives"):
        FieldGradients(RBELinear(16, 16, codec="trellis"))
    packed = any_layer(rs.codec("cyclic"))
    with pytest.raises(ValueError, match=r"grad_weight must have shape \[9, 40\], got \[40, 9\]"):
        field_gradient(torch.zeros(40, 9), *walk.arguments(packed))
    with pytest.raises(ValueError, match="expected 2 params, got 1"):
        field_gradient(torch.zeros(9, 40), packed.codes, [packed.params["basis"]], "cyclic", SHAPE)
    with pytest.raises(ValueError, match=r"grad_y must be \(..., 9\) and x \(..., 40\)"):
        field_gradient_from(torch.zeros(3, 9), torch.zeros(2, 40), *walk.arguments(packed))


def test_empty_layers_have_empty_gradients():
    for shape in walk.EMPTY_SHAPES:
        packed = walk.random_layer(rs.codec("cyclic"), shape)
        found = field_gradient(torch.zeros(shape), *walk.arguments(packed))
        assert found["phase"].shape == packed.codes.shape[:2]
        assert not found["index"].any()


@pytest.mark.parametrize("module", ["engine", "gradients", "moves"])
def test_the_examples_in_the_docstrings_run(module):
    failed, tried = doctest.testmod(sys.modules[f"reality_stone.derivative.{module}"])
    assert tried
    assert not failed
