"""Angles as bits: the documented largest error, wrapping, fields, bad input."""

import math

import pytest
import torch

from reality_stone import phase
from reality_stone.phase import ENCODINGS, TURN

EVERY = pytest.mark.parametrize(
    "encoding", ENCODINGS, ids=lambda e: f"{e.name}{int(e.bits)}" if e.name else None
)


def sweep() -> torch.Tensor:
    """A turn densely, its neighbourhood of every quarter, many turns either way, huge angles."""
    dense = torch.linspace(0, TURN, 90001, dtype=torch.float64)
    corners = torch.arange(-8, 9, dtype=torch.float64)[:, None] * (math.pi / 4)
    near = torch.tensor([0, 1e-300, 1e-16, 1e-9, 1e-5, 1e-3], dtype=torch.float64)
    far = torch.logspace(1, 300, 3001, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    many = torch.empty(60000, dtype=torch.float64).uniform_(-1000, 1000, generator=generator)
    found = torch.cat((dense, -dense, (corners + near).flatten(), (corners - near).flatten(), many))
    return torch.cat((found, far, -far))


@EVERY
def test_the_error_is_at_most_the_documented_one_and_the_bound_is_tight(encoding):
    angle = sweep()
    exact = torch.tensor([math.fmod(a, TURN) for a in angle.tolist()], dtype=torch.float64)
    n = len(angle) // 9 * 9
    decoded = encoding.decode(encoding.encode(angle[:n].view(-1, 9))).flatten()
    error = phase.distance(exact[:n], decoded)
    assert error.max() <= encoding.max_error * (1 + 1e-9) + 1e-14
    assert error.max() > 0.9 * encoding.max_error
    assert decoded.min() >= 0
    assert decoded.max() < TURN


@EVERY
def test_what_is_decoded_encodes_to_itself(encoding):
    angle = sweep()[:9000].view(-1, 9)
    once = encoding.decode(encoding.encode(angle))
    again = encoding.decode(encoding.encode(once))
    # What greedy rotations leave may round over one; a complex point is not on its circle.
    slack = encoding.max_error if encoding.name in ("cordic", "complex") else 1e-12
    assert phase.distance(once, again).max() <= slack * (1 + 1e-9)


@EVERY
def test_codes_take_the_bits_they_say(encoding):
    codes = encoding.encode(sweep()[:9000].view(-1, 9))
    parts = codes if isinstance(codes, tuple) else (codes,)
    stored = sum(c.numel() * c.element_size() * 8 for c in parts) / 9000
    if encoding.name == "cordic":  # 18 bits held in 32
        assert int(codes.max()) < 1 << encoding.bits
        assert int(codes.min()) >= 0
    else:
        assert stored == pytest.approx(encoding.bits)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_other_dtypes_empty_tensors_and_odd_shapes_are_taken(encoding, dtype):
    angle = torch.arange(54).to(dtype)
    same = encoding.decode(encoding.encode(angle.view(2, 3, 9)))
    want = encoding.decode(encoding.encode(angle.double().view(2, 3, 9)))
    assert same.shape == (2, 3, 9)
    assert torch.equal(same, want)
    assert encoding.decode(encoding.encode(angle.view(-1, 9)[:0])).shape == (0, 9)


@EVERY
def test_bad_angles_and_codes_are_refused_in_a_sentence(encoding):
    for bad in (math.nan, math.inf, -math.inf):
        angle = torch.zeros(2, 9)
        angle[1, 3] = bad
        with pytest.raises(ValueError, match=r"angle at \(1, 3\) is not finite"):
            encoding.encode(angle)
    for bad in (torch.zeros(9, dtype=torch.complex64), torch.zeros(9, dtype=torch.bool), [0.0]):
        with pytest.raises(TypeError, match="tensor of real numbers"):
            encoding.encode(bad)
    wrong = torch.zeros(9, 2)
    with pytest.raises(TypeError, match="codes must be"):
        encoding.decode((wrong[:, 0], torch.zeros(9, 8)) if encoding.name == "delta" else wrong)


def test_settings_shapes_and_ranges_are_checked():
    for kind in (phase.Fixed, phase.Signed):
        with pytest.raises(ValueError, match="has 8 or 16 bits, got 12"):
            kind(12)
    with pytest.raises(ValueError, match=r"angles \(..., 9\), got \(2, 8\)"):
        phase.Delta().encode(torch.zeros(2, 8))
    base = torch.zeros(2, dtype=torch.uint16)
    with pytest.raises(ValueError, match=r"differences \(..., 8\)"):
        phase.Delta().decode((base, torch.zeros(3, 8, dtype=torch.int8)))
    with pytest.raises(ValueError, match="must end in 2"):
        phase.Complex().decode(torch.zeros(3, dtype=torch.int8))
    for encoding in (phase.Complex(), phase.Polar()):
        with pytest.raises(ValueError, match="between 0 and 1"):
            encoding.encode(torch.zeros(3), 1.5)
    with pytest.raises(ValueError, match="from 0 to 15"):
        phase.Extended().encode(torch.zeros(3), 16)


def test_fixed_codes_add_like_angles_with_wrap():
    a, b = torch.tensor([1.0, 6.0, 3.0]), torch.tensor([2.0, 5.0, 3.5])
    for encoding in (phase.Fixed(8), phase.Fixed(16)):
        mask = 2**encoding.bits - 1
        total = (encoding.encode(a).long() + encoding.encode(b).long()) & mask
        got = encoding.decode(total.to(encoding.encode(a).dtype))
        assert phase.distance(got, a.double() + b.double()).max() <= 2 * encoding.max_error


def test_signed_codes_are_the_fixed_bits_as_twos_complement():
    angle = sweep()[::7]
    for bits, view in ((8, torch.int8), (16, torch.int16)):
        assert torch.equal(
            phase.Fixed(bits).encode(angle).view(view), phase.Signed(bits).encode(angle)
        )


def test_complex_and_polar_keep_the_magnitude():
    angle, magnitude = torch.linspace(0, 7, 50)[:, None], torch.linspace(0, 1, 41)
    both = torch.broadcast_to(angle, (50, 41))
    m = torch.broadcast_to(magnitude, (50, 41)).double()
    z = phase.Complex().encode(both, m)
    assert (phase.Complex().magnitude(z) - m).abs().max() <= 1 / (127 * math.sqrt(2)) + 1e-12
    assert (phase.Polar().magnitude(phase.Polar().encode(both, m)) - m).abs().max() <= 1 / 30 + 1e-9


def test_fields_are_where_the_layout_says():
    angle = torch.tensor([0.0, math.pi / 2, math.pi, 3 * math.pi / 2 + 0.1])
    assert (phase.Polar().encode(angle).long() >> 4).tolist()[:3] == [0, 1024, 2048]
    extended = phase.Extended()
    codes = extended.encode(angle, torch.tensor([1, 2, 3, 15]))
    assert ((codes.long() >> 10) & 3).tolist() == [0, 1, 2, 3]
    assert extended.flags(codes).tolist() == [1, 2, 3, 15]
    assert phase.distance(extended.decode(codes), angle).max() <= extended.max_error
    kronecker = phase.Kronecker().encode(torch.tensor([TURN * 10.5 / 256])).long()
    assert (kronecker >> 8, kronecker & 255) == (10, 128)
    coarse = phase.Hierarchical()
    alone = phase.distance(coarse.coarse(coarse.encode(sweep()[:90000])), sweep()[:90000])
    assert alone.max() < math.pi / 16 + 1e-4
    assert phase.Cordic().encode(torch.tensor([math.pi / 4])).tolist() == [1 << 15]


def test_delta_errors_do_not_add_up():
    angle = torch.linspace(0, 40, 9 * 500, dtype=torch.float64).view(-1, 9)
    error = phase.distance(phase.Delta().decode(phase.Delta().encode(angle)), angle)
    # A difference of its own from the true predecessor would wander by sqrt(8) roundings.
    assert error[:, 8].max() <= math.pi / 256 * (1 + 1e-9)
    assert error[:, 0].max() <= math.pi / 65536 * (1 + 1e-9)


def test_delta_coefficients_are_an_interpolated_one_hot_vector():
    angle = sweep()[:5000]
    for n in (3, 16, 256):
        c = phase.delta_coefficients(angle, n)
        assert ((c > 0).sum(-1) <= 2).all()
        assert (c.sum(-1) - 1).abs().max() < 1e-12
        # The mean angle of the two deltas, taken around the circle from the first.
        first = phase.wrap(angle) * n / TURN
        rebuilt = (c * ((torch.arange(n) - first[:, None] + n / 2) % n - n / 2)).sum(-1)
        assert rebuilt.abs().max() < 1e-9
    with pytest.raises(ValueError, match="at least 3"):
        phase.delta_coefficients(angle, 2)


def test_delta_coefficients_differentiate():
    angle = torch.tensor([0.3, -2.0, 11.0, 6.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: phase.delta_coefficients(a, 16), angle)
    table = torch.arange(16, dtype=torch.float64).sin()
    (phase.delta_coefficients(angle, 16) @ table).sum().backward()
    low = (angle.detach() * 16 / TURN).floor().long() % 16
    assert torch.allclose(angle.grad, (table[(low + 1) % 16] - table[low]) * 16 / TURN)


@pytest.mark.parametrize("levels", [(4,), (4, 4, 4), (2, 3, 5, 7), (256, 256)])
def test_multi_resolution_refines_level_by_level(levels):
    angle = sweep()[::7]
    indices, total = phase.multi_resolution(angle, levels)
    assert indices.shape == (len(angle), len(levels))
    for i, n in enumerate(levels):
        assert indices[:, i].min() >= 0
        assert indices[:, i].max() == n - 1
    left = phase.wrap(angle) - total
    assert left.min() > -1e-12
    assert left.max() <= TURN / math.prod(levels) * (1 + 1e-9)
    with pytest.raises(ValueError, match="whole numbers from 2"):
        phase.multi_resolution(angle, (4, 1))
