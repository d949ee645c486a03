"""What the encoders are worth: determinism, error beside the reference and theory."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import ops, reference
from reality_stone.codecs import REGISTRY

EVERY = pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)


def same(a, b) -> bool:
    return torch.equal(a.codes, b.codes) and all(
        torch.equal(p, q) for p, q in zip(walk.values(a), walk.values(b), strict=True)
    )


@EVERY
def test_an_encoder_writes_the_same_bytes_on_any_number_of_threads(codec):
    weight = walk.gaussian(80, 96)
    with walk.threads(1):
        one = codec.encode(weight)
        assert same(codec.encode(weight.clone()), one)
    with walk.threads(2):
        assert same(codec.encode(weight), one)


@DEFAULTS
@pytest.mark.parametrize("isa", walk.isas())
def test_an_encoder_is_deterministic_on_every_instruction_set(codec, isa):
    weight = walk.gaussian(48, 64)
    with ops.use_isa(isa):
        assert same(codec.encode(weight), codec.encode(weight))


@pytest.mark.parametrize("name", ["block_sparse", "hybrid", "seed64", "ultra"])
def test_loops_over_vectors_of_any_width_give_the_same_bits(name):
    """Encoders and small products of decoded rows are one source for all widths."""
    for codec in walk.few(name):
        weight = walk.gaussian(80, 272)
        with ops.use_isa("generic"):
            want = codec.encode(weight)
        for isa in walk.isas():
            with ops.use_isa(isa):
                assert same(codec.encode(weight), want), (codec.spec, isa)
        for batch in (1, 2, 3, 5, 8):
            grad = walk.gaussian(batch, 80, seed=batch)
            results = []
            for isa in walk.isas():
                with ops.use_isa(isa), ops.accuracy("exact"):
                    results.append(
                        torch.ops.reality_stone.linear_grad_input(grad, *walk.arguments(want))
                    )
            assert all(torch.equal(dx, results[0]) for dx in results), (codec.spec, batch)


@DEFAULTS
def test_an_encoder_leaves_the_weight_alone_and_takes_any_strides_and_dtypes(codec):
    weight = walk.gaussian(32, 48).half().float()
    before = weight.clone()
    want = codec.encode(weight)
    assert torch.equal(weight, before)
    for other in (weight.t().contiguous().t(), walk.spread(weight), weight.half(), weight.double()):
        assert same(codec.encode(other), want)
    assert same(codec.encode(torch.nn.Parameter(weight)), want)


def reference_encode(codec, weight, importance=None):
    params = codec.initial_params(weight, 0)
    return reference.encode(weight, importance, list(params.values()), codec.spec)


def compiled_encode(codec, weight, importance=None):
    params = codec.initial_params(weight, 0)
    return ops.encode(weight, importance, list(params.values()), codec.spec)


def weighted_error(codec, encoded, weight, importance=None) -> float:
    codes, params = encoded
    miss = (ops.decode(codes, params, codec.spec, weight.shape) - weight).double() ** 2
    return (miss * (1 if importance is None else importance)).sum().item()


ONE_TERM = pytest.mark.parametrize(
    "codec", [c for c in walk.FEW if walk.one_term(c)], ids=walk.spec
)


@ONE_TERM
def test_the_compiled_encoder_is_as_good_as_the_reference(codec):
    # A search over paths is slow in the reference: few tiles, and only with the default settings.
    tile, searched = codec.tile((16, 64)), codec.tile((16, 64)).rows > 1
    if searched and codec != REGISTRY[codec.name]():
        return
    # Groups find other local optima one by one; on the mean of 128 that evens out. The reference
    # tries every function and every vector of bitfield for every block.
    rows = 32 if codec.name == "bitfield" else 128
    weight = walk.gaussian(16, tile.cols) if searched else walk.gaussian(rows, 64)
    importance = torch.linspace(0.1, 4, weight.shape[1])
    for h in (None,) if searched else (None, importance):
        want = weighted_error(codec, reference_encode(codec, weight, h), weight, h)
        got = weighted_error(codec, compiled_encode(codec, weight, h), weight, h)
        assert got <= 1.01 * want


@ONE_TERM
def test_importance_moves_the_error_to_the_columns_that_matter_less(codec):
    weight = walk.gaussian(32, 128)
    importance = torch.where(torch.arange(128) % 3 == 0, 50.0, 0.1)
    plain = compiled_encode(codec, weight)
    weighed = compiled_encode(codec, weight, importance)
    got = weighted_error(codec, weighed, weight, importance)
    # Equal for a codec that cannot use it.
    assert got <= weighted_error(codec, plain, weight, importance)
    if not torch.equal(weighed[0], plain[0]):
        assert got < 0.999 * weighted_error(codec, plain, weight, importance)


@ONE_TERM
@pytest.mark.parametrize(
    "bad", [torch.zeros(64), -torch.ones(64), torch.ones(63), torch.full((64,), math.nan)]
)
def test_importance_that_is_not_positive_or_of_another_length_is_refused(codec, bad):
    with pytest.raises(ValueError, match="importance must be 64 positive numbers"):
        compiled_encode(codec, torch.zeros(16, 64), bad)


def best_uniform_quantizer(levels: int) -> float:
    """Least mean squared error of equally spaced levels on a unit Gaussian, over all spacings."""
    x = torch.linspace(-7, 7, 14001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    density /= density.sum()
    best = 1.0
    for step in torch.linspace(3, 10, 141, dtype=torch.float64) / levels:
        level = (x / step - 0.5).round().clamp(-levels / 2, levels / 2 - 1) + 0.5
        best = min(best, (density * (x - level * step) ** 2).sum().item())
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_is_no_worse_than_the_best_uniform_quantizer(bits):
    weight = walk.gaussian(128, 256)
    known = best_uniform_quantizer(2**bits)
    # Half a percent is one standard deviation of the mean of 32768 squares.
    assert (
        walk.nmse(rs.codec("uniform", bits=bits).encode(weight).decode(), weight) <= 1.015 * known
    )


@EVERY
def test_more_bits_give_less_error(codec):
    kind = REGISTRY[codec.name]
    weight = walk.gaussian(64, 128)
    few = sorted(kind.rates) or (1.5, 2, 3, 4)
    rates = [c for c in (walk._try(kind.at_bits, b) for b in few) if c is not None]
    errors = [walk.nmse(c.encode(weight).decode(), weight) for c in rates]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1


# --- unusual weights ------------------------------------------------------------------------------


@EVERY
def test_a_zero_matrix_decodes_to_zeros(codec):
    for shape in [(16, 32), (3, 5)]:
        packed = codec.encode(torch.zeros(shape))
        packed.check()
        assert not packed.decode().any()


@EVERY
def test_zero_rows_and_columns_decode_to_something_finite_and_small(codec):
    weight = walk.gaussian(48, 64)
    weight[5], weight[:, 7], weight[32:48] = 0, 0, 0
    packed = codec.encode(weight)
    packed.check()
    decoded = packed.decode()
    assert decoded.isfinite().all()
    assert walk.relative(decoded, weight) <= 1.0  # never worse than writing nothing


@EVERY
@pytest.mark.parametrize("size", [1e30, 1e4, 1e-4, 1e-30])
def test_the_relative_error_does_not_depend_on_the_size_of_the_weight(codec, size):
    weight = walk.gaussian(32, 64)
    at_one = walk.nmse(codec.encode(weight).decode(), weight)
    packed = codec.encode(weight * size)
    packed.check()
    decoded = packed.decode()
    assert decoded.isfinite().all()
    # Scales are float16 values near one and float32 elsewhere: other roundings, other local optima.
    assert walk.nmse(decoded.double() / size, weight) <= 1.03 * at_one + 1e-7


@EVERY
def test_constant_weights_and_constant_groups_decode_well(codec):
    weight = walk.gaussian(32, 64)
    weight[:, :32] = 0.37
    decoded = codec.encode(weight).decode()
    assert decoded.isfinite().all()
    assert walk.relative(decoded, weight) <= 1.0
    constant = codec.encode(torch.full((16, 32), -2.5)).decode()
    assert constant.isfinite().all()
    assert walk.relative(constant, torch.full((16, 32), -2.5)) <= 1.0


@EVERY
def test_one_huge_weight_among_small_ones_stays_finite(codec):
    weight = walk.gaussian(32, 64)
    weight[3, 9] = 1e6
    decoded = codec.encode(weight).decode()
    assert decoded.isfinite().all()
    assert walk.relative(decoded, weight) <= 1.0


@EVERY
def test_weights_of_any_shape_encode_and_decode_to_their_shape(codec):
    for shape in [(1, 1), (1, 17), (17, 1), (33, 50), (5, 1000), *walk.EMPTY_SHAPES]:
        weight = walk.gaussian(*shape)
        packed = codec.encode(weight)
        packed.check()
        decoded = packed.decode()
        assert decoded.shape == shape
        assert decoded.isfinite().all()
        if weight.numel() > 1:
            assert walk.relative(decoded, weight) <= 1.0


# --- progress and interruption --------------------------------------------------------------------


@DEFAULTS
def test_progress_rises_to_the_number_of_tiles(codec):
    seen = []
    with ops.progress(lambda done, total: seen.append((done, total))):
        codec.encode(walk.gaussian(64, 128))
    runs = [[]]
    for done, total in seen:  # one run per term, and per column block with feedback
        runs[-1].append(done)
        if done == total:
            runs.append([])
    assert len(runs) > 1
    assert runs[-1] == []
    for run in runs[:-1]:
        assert run == sorted(set(run))
    seen.clear()
    codec.encode(walk.gaussian(16, 16))
    assert not seen


def test_an_error_in_the_progress_callback_stops_the_encode_and_comes_through():
    def stop(done, total):
        raise LookupError("stop here")

    with pytest.raises(LookupError, match="stop here"), ops.progress(stop):
        rs.codec("uniform").encode(walk.gaussian(64, 64))
    assert rs.codec("uniform").encode(walk.gaussian(64, 64)).decode().isfinite().all()


def test_ctrl_c_ends_a_long_encode_within_about_a_second():
    program = textwrap.dedent("""
        import signal, torch, reality_stone as rs
        from reality_stone import ops
        # A job that a shell started in the background inherits SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        weight = torch.randn(1, 1 << 20).expand(64, -1)  # minutes of work
        def tell(done, total):
            if done:
                print(done, total, flush=True)
        try:
            with ops.progress(tell):
                rs.codec("uniform").encode(weight)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        first = child.stdout.readline().split()
        assert len(first) == 2
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        interrupted = "interrupted\n" in iter(child.stdout.readline, "")
        seconds = time.monotonic() - start
        assert child.wait(30) == 0
    finally:
        child.kill()
    assert interrupted
    assert int(first[0]) < int(first[1])
    assert seconds < 2.5  # chunks of a tenth of a second, on a machine that may be busy
