"""Wrong input gets a sentence, never a crash: every border of the ops and the text of a codec."""

import dataclasses
import math
import re

import pytest
import torch
import walk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reality_stone as rs
from reality_stone import ops
from reality_stone.codecs import REGISTRY, from_config

EVERY = pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)

SIZES = st.sampled_from([1, 2, 7, 16, 17, 50, 1000])
ANY_CODEC = st.sampled_from(walk.ALL)


# --- weights --------------------------------------------------------------------------------------


@QUICK
@given(codec=st.sampled_from(walk.DEFAULTS), rows=SIZES, cols=SIZES, data=st.data())
def test_a_weight_that_is_not_finite_is_refused_by_its_first_position(codec, rows, cols, data):
    rows, cols = min(rows, 50), min(cols, 50)
    weight = walk.gaussian(rows, cols)
    places = data.draw(st.sets(st.integers(0, rows * cols - 1), min_size=1, max_size=3))
    for place in places:
        weight.view(-1)[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    row, col = divmod(min(places), cols)
    with pytest.raises(ValueError, match=rf"not finite at \({row}, {col}\)"):
        codec.encode(weight)


@DEFAULTS
def test_a_weight_of_another_kind_is_refused(codec):
    for bad in (torch.zeros(4), torch.zeros(2, 3, 4), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="two dimensions"):
            codec.encode(bad)
    for bad in (torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="floating point"):
            codec.encode(bad)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        codec.encode([[1.0]])
    # Finite in float64 and not in float32.
    with pytest.raises(ValueError, match=r"not finite at \(0, 1\)"):
        codec.encode(torch.tensor([[0.0, 1e300]], dtype=torch.float64))


# --- codes and params -----------------------------------------------------------------------------


def run_all(packed, x=None):
    """Every op that reads codes; returns the decoded weight."""
    out, n = packed.shape
    x = torch.ones(2, n) if x is None else x
    grad = torch.ones(*x.shape[:-1], out, dtype=x.dtype)
    ops.linear(x, *walk.arguments(packed))
    ops.linear_grad_input(grad, *walk.arguments(packed))
    ops.linear_grad_params(grad, x, *walk.arguments(packed))
    return packed.decode()


def raises_everywhere(packed, kind, match):
    out, n = packed.shape
    x, grad = torch.ones(2, n), torch.ones(2, out)
    args = walk.arguments(packed)
    for call in (
        lambda: ops.decode(*args),
        lambda: ops.check_codes(*args),
        lambda: ops.linear(x, *args),
        lambda: ops.linear_grad_input(grad, *args),
        lambda: ops.linear_grad_params(grad, x, *args),
        lambda: ops.decode_grad_params(torch.ones(out, n), *args),
    ):
        with pytest.raises(kind, match=match):
            call()


@DEFAULTS
def test_codes_of_another_size_or_dtype_are_refused_by_every_op(codec):
    packed = walk.random_layer(codec, (33, 50))
    name = re.escape(codec.name)
    c = packed.codes
    for bad in (c[1:], c[:, :0], c[..., 1:], c[0], c.flatten(), torch.cat((c, c)), c[None]):
        moved = dataclasses.replace(packed, codes=bad)
        raises_everywhere(moved, ValueError, rf"{name}.*codes must have shape")
    for dtype in (torch.int8, torch.int32, torch.float32, torch.bool):
        moved = dataclasses.replace(packed, codes=c.to(dtype))
        raises_everywhere(moved, TypeError, rf"{name}.*codes must be uint8")


@DEFAULTS
def test_params_of_another_count_size_or_dtype_are_refused_by_every_op(codec):
    packed = walk.random_layer(codec, (33, 50))
    for name, p in packed.params.items():
        without = {n: q for n, q in packed.params.items() if n != name}
        raises_everywhere(
            dataclasses.replace(packed, params=without), ValueError, "expected .* params"
        )
        bad = [p[1:], p[None], p.flatten()[:1].repeat(p.numel() + 1)]
        for q in bad:
            moved = dataclasses.replace(packed, params=packed.params | {name: q})
            raises_everywhere(moved, ValueError, f"{name} must have shape")
        other = torch.float64 if p.is_floating_point() else torch.int16
        moved = dataclasses.replace(packed, params=packed.params | {name: p.to(other)})
        raises_everywhere(moved, TypeError, f"{name} must be")
    more = dataclasses.replace(packed, params=packed.params | {"extra": torch.zeros(1)})
    raises_everywhere(more, ValueError, "expected .* params")


@DEFAULTS
def test_activations_of_another_size_or_dtype_are_refused(codec):
    packed = walk.random_layer(codec, (33, 50))
    args = walk.arguments(packed)
    for bad in (torch.zeros(2, 49), torch.zeros(50, 1), torch.tensor(1.0), torch.zeros(0)):
        with pytest.raises(ValueError, match="x must end in 50 features"):
            ops.linear(bad, *args)
    for dtype in (torch.float64, torch.int32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
            ops.linear(torch.zeros(2, 50, dtype=dtype), *args)
    with pytest.raises(ValueError, match="grad must end in 33 features"):
        ops.linear_grad_input(torch.zeros(2, 50), *args)
    for x, grad in [((2, 50), (3, 33)), ((2, 3, 50), (6, 33)), ((50,), (1, 33))]:
        with pytest.raises(ValueError, match="same batch shape"):
            ops.linear_grad_params(torch.zeros(grad), torch.zeros(x), *args)
    with pytest.raises(ValueError, match="grad must have shape"):
        ops.decode_grad_params(torch.zeros(50, 33), *args)
    with pytest.raises(TypeError, match="grad must be float32"):
        ops.decode_grad_params(torch.zeros(33, 50).half(), *args)


@DEFAULTS
@pytest.mark.parametrize(
    "shape", [[33], [33, 50, 1], [], [-1, 50], [33, -50], [1 << 41, 1], [1, 1 << 62]]
)
def test_a_shape_that_is_no_matrix_is_refused(codec, shape):
    packed = walk.random_layer(codec, (33, 50))
    with pytest.raises(
        ValueError, match=r"shape must be|codes must have shape|in_features must be"
    ):
        ops.decode(packed.codes, walk.values(packed), codec.spec, shape)


@DEFAULTS
def test_params_that_are_not_finite_fail_the_check(codec):
    packed = walk.encoded(codec, (33, 50))
    for name, p in packed.params.items():
        if p.is_floating_point():
            bad = p.clone()
            bad.view(-1)[-1] = math.nan
            with pytest.raises(ValueError, match="not finite"):
                dataclasses.replace(packed, params=packed.params | {name: bad}).check()


def refusal(check) -> str | None:
    try:
        check()
    except ValueError as error:
        found = re.search(r"is no valid code|is not finite", str(error))
        return found.group() if found else str(error)
    return None


@QUICK
@given(
    codec=ANY_CODEC,
    rows=SIZES,
    cols=SIZES,
    seed=st.integers(0, 2**20),
    isa=st.sampled_from(walk.isas()),
)
def test_any_bytes_as_codes_decode_and_multiply_without_a_crash(codec, rows, cols, seed, isa):
    if rows * cols > 100_000:
        rows = 17
    packed = walk.random_layer(codec, (rows, cols), seed)
    with ops.use_isa(isa):
        assert run_all(packed).isfinite().all()
        assert refusal(packed.check) in (None, "is no valid code")


@QUICK
@given(codec=ANY_CODEC, seed=st.integers(0, 2**20), isa=st.sampled_from(walk.isas()))
def test_any_bits_as_params_decode_and_multiply_without_a_crash(codec, seed, isa):
    packed = walk.random_layer(codec, (17, 50), seed)
    wild = {
        n: walk.random_bytes(*p.shape, 4, seed=seed + i).view(torch.float32)[..., 0]
        if p.is_floating_point()
        else p
        for i, (n, p) in enumerate(packed.params.items())
    }
    with ops.use_isa(isa):
        run_all(dataclasses.replace(packed, params=wild))
        x = walk.random_bytes(3, 50, 4, seed=seed).view(torch.float32)[..., 0]
        run_all(packed, x)
        run_all(packed, x.to(torch.bfloat16))


# --- names and settings ---------------------------------------------------------------------------


def test_an_unknown_codec_is_refused_with_the_names_there_are():
    known = ", ".join(rs.codecs())
    for make in (lambda: rs.codec("nosuch"), lambda: rs.codec("nosuch(bits=2)")):
        with pytest.raises(ValueError, match=f"unknown codec 'nosuch'.*{known}"):
            make()
    with pytest.raises(ValueError, match="unknown codec 'nosuch'"):
        ops.decode(torch.zeros(1, 1, 1, dtype=torch.uint8), [], "nosuch(bits=2)", [1, 1])
    with pytest.raises(TypeError, match="a codec is a name or a Codec"):
        rs.codec(3)


@pytest.mark.parametrize("name", walk.NAMES)
def test_unknown_settings_are_refused_in_both_languages(name):
    with pytest.raises(ValueError, match=name):
        rs.codec(name, nosuch=1)
    with pytest.raises(ValueError, match=name):
        rs.codec(f"{name}(nosuch=1)")
    text = REGISTRY[name]().spec[:-1] + ", nosuch=1)"
    with pytest.raises(ValueError, match=f"{name}: unknown setting 'nosuch'"):
        ops.describe(text, (16, 16))
    with pytest.raises(ValueError, match="settings either in the text or as arguments"):
        rs.codec(f"{name}()", bits=2)


@pytest.mark.parametrize("name", walk.NAMES)
@pytest.mark.parametrize(
    "value",
    [None, "x", -1, 0, 1e9, 2.25, math.nan, math.inf, -math.inf, 2j, [2], {}, b"2", 10**400],
)
def test_a_setting_outside_its_range_or_of_another_type_is_refused(name, value):
    for field in dataclasses.fields(REGISTRY[name]):
        try:
            codec = rs.codec(name, **{field.name: value})
        except ValueError:
            continue
        # What Python takes, C++ must take too, and mean the same.
        tile = codec.tile((16, 64))
        assert tuple(ops.describe(codec.spec, (16, 64))[0]["tile"]) == (
            tile.rows,
            tile.cols,
            tile.bytes,
        )
        assert rs.codec(codec.spec) == codec


def test_a_configuration_of_another_version_or_kind_is_refused():
    good = rs.codec("uniform").to_config()
    for bad in ({}, None, [], "uniform", {"name": 3}, {"name": None}, {**good, "nosuch": 1}):
        with pytest.raises(ValueError, match=r"configuration is an object|nosuch"):
            from_config(bad)
    for version in (0, 2, "1", None):
        with pytest.raises(ValueError, match=r"version .* is not known"):
            from_config({**good, "version": version})
    with pytest.raises(ValueError, match="unknown codec"):
        from_config({**good, "name": "nosuch"})


SPECS = [c.spec for c in walk.ALL]
PIECES = st.sampled_from(
    [
        *walk.NAMES,
        *(f.name for k in REGISTRY.values() for f in dataclasses.fields(k)),
        "=",
        "(",
        ")",
        ",",
        " ",
        "2",
        "1e999",
        "-1",
        "0x2",
        "nan",
        "True",
        "False",
        "None",
        "'",
        '"',
        "[",
        "{",
        "*",
        "**",
        ":",
        "\0",
        "é",
        "lambda",
        "9" * 400,
        "1.5",
        "\n",
        "#",
        "\\",
        "base=",
        "rest=",
        "(bits=2)",
        "()",
    ]
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=14).map("".join),
    st.text(max_size=40),
    # A real text with one stretch replaced.
    st.builds(
        lambda text, at, length, piece: text[:at] + piece + text[at + length :],
        st.sampled_from(SPECS),
        st.integers(0, 60),
        st.integers(0, 8),
        PIECES,
    ),
)


def read_by_python(text):
    try:
        return rs.codec(text)
    except ValueError:
        return None


def read_by_cpp(text):
    try:
        return ops.describe(text, (16, 64))
    except ValueError:
        return None
    except UnicodeEncodeError:  # lone surrogates cannot reach C++
        return None


@settings(QUICK, max_examples=1500)
@given(text=TEXTS)
def test_any_text_is_a_codec_or_a_value_error_in_both_languages(text):
    codec, terms = read_by_python(text), read_by_cpp(text)
    if codec is None:
        return
    assert rs.codec(codec.spec) == codec
    # Python is the more lenient about quotes and spaces; its canonical text must mean the same.
    tile = codec.tile((16, 64))
    for found in (terms, ops.describe(codec.spec, (16, 64))):
        if found is not None:
            assert tuple(found[0]["tile"]) == (tile.rows, tile.cols, tile.bytes)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000,
        "uniform(bits=" * 3000,
        "uniform(bits=" + "-" * 9000 + "1)",
        "uniform(bits=[" + "[" * 5000,
        "a" * 100_000,
        "uniform(" + "bits=2, " * 9000,
    ],
)
def test_texts_of_great_depth_or_length_are_refused(text):
    assert read_by_python(text) is None
    assert read_by_cpp(text) is None
    with pytest.raises(ValueError, match=r"is not of the form|unknown codec"):
        rs.codec(text)
