"""What every codec promises: one layout in Python and C++, the same decoded bits everywhere."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import ops, reference
from reality_stone.codecs import REGISTRY, from_config

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_python_and_cpp_agree_on_tile_params_and_frame(codec):
    for shape in walk.SHAPES + walk.EMPTY_SHAPES:
        terms = ops.describe(codec.spec, shape)
        tile = codec.tile(shape)
        assert tuple(terms[0]["tile"]) == (tile.rows, tile.cols, tile.bytes), shape
        compiled = [tuple(p) for term in terms for p in term["params"]]
        own = [(p.name, p.axis, list(p.sizes)) for p in codec.params(shape)]
        own = [p for p in own if p[0] != "rest_codes"]  # codes of a term, not a param of one
        assert [(name, axis, list(sizes)) for name, axis, sizes in compiled] == own, shape
        if len(terms) == 1:
            assert tuple(terms[0]["hadamard"]) == codec.blocks(shape), shape


def test_both_languages_list_the_same_codecs():
    assert sorted(ops.build_info()["codecs"]) == rs.codecs()


def test_a_codec_is_registered_under_its_name():
    for name, kind in REGISTRY.items():
        assert kind.name == name


def test_the_python_schemas_are_the_compiled_ones():
    text = re.sub(r'"\s+"', "", (ROOT / "csrc/library.cpp").read_text())  # strings over two lines
    compiled = dict(re.findall(r'm\.def\(\s*"(\w+)(\(.*?\) -> .*?)"\);', text))
    assert compiled == ops.SCHEMAS
    for name, schema in ops.SCHEMAS.items():
        loaded = str(getattr(torch.ops.reality_stone, name).default._schema)
        assert loaded == f"reality_stone::{name}{schema}"


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_a_configuration_survives_json(codec):
    assert from_config(json.loads(json.dumps(codec.to_config()))) == codec


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_the_text_of_a_codec_reads_back_as_the_codec(codec):
    assert rs.codec(codec.spec) == codec
    assert hash(rs.codec(codec.spec)) == hash(codec)
    assert rs.codec(codec.spec).spec == codec.spec


def assert_decodes_alike(packed):
    """Reference, and every instruction set, to the bit."""
    want = reference.decode(*walk.arguments(packed))
    assert want.dtype == torch.float32
    for isa in walk.isas():
        with ops.use_isa(isa):
            got = packed.decode()
        assert walk.same_bits(got, want), (packed.codec.spec, packed.shape, isa)


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_any_bytes_with_any_params_decode_to_the_bits_of_the_reference(codec):
    for seed, shape in enumerate(walk.SHAPES + walk.EMPTY_SHAPES):
        assert_decodes_alike(walk.random_layer(codec, shape, seed))


@pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
def test_encoded_weights_decode_to_the_bits_of_the_reference(codec):
    for shape in [(1, 17), (33, 50), (64, 128)]:
        packed = walk.encoded(codec, shape)
        assert_decodes_alike(packed)
        assert_decodes_alike(walk.trained(packed))


@pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
def test_scales_of_zero_and_extreme_params_decode_alike(codec):
    packed = walk.random_layer(codec, (33, 50))
    for factor in (0.0, -1.0, 1e-38, 1e10):
        params = {n: p * factor if p.is_floating_point() else p for n, p in packed.params.items()}
        # Denormal products are the point of 1e-38: no path may flush them to zero.
        assert_decodes_alike(replace(packed, params=params))


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_misaligned_and_gapped_codes_and_params_decode_alike(codec):
    packed = walk.random_layer(codec, (33, 50))
    want = packed.decode()
    for move in (walk.misaligned, walk.spread):
        params = {name: move(p) for name, p in packed.params.items()}
        moved = replace(packed, codes=move(packed.codes), params=params)
        assert walk.same_bits(moved.decode(), want)
        x = walk.gaussian(3, 50)
        assert walk.same_bits(moved.linear(x), packed.linear(x))


def cut(packed, rows, cols):
    """The layer of these rows and columns, or None where the codec's tiles do not allow it."""
    size = rows.stop - rows.start, cols.stop - cols.start
    whole, part = packed.codec.tile(packed.shape), packed.codec.tile(size)
    if whole != part:
        return None
    axes = {"out": (rows,), "in": (cols,), "both": (rows, cols), "shared": ()}
    cuts = {"codes": ("both", packed.codes, (*part.grid(size), part.bytes))}
    for p in packed.codec.params(size):
        cuts[p.name] = (p.axis, packed.params[p.name], p.sizes)
    full = {id(rows): packed.shape[0], id(cols): packed.shape[1]}
    for name, (axis, tensor, sizes) in cuts.items():
        for dim, piece in enumerate(axes[axis]):
            start = piece.start * tensor.shape[dim] / full[id(piece)]
            length = (piece.stop - piece.start) * tensor.shape[dim] / full[id(piece)]
            if start != int(start) or length != int(length):
                return None
            tensor = tensor.narrow(dim, int(start), int(length))
        if tuple(tensor.shape) != tuple(sizes):
            return None
        cuts[name] = tensor
    codes = cuts.pop("codes")
    return replace(packed, shape=size, codes=codes, params=cuts)


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_a_slice_of_the_codes_is_the_slice_of_the_weight(codec):
    # Cuts at multiples of 128 close every Hadamard block.
    packed = walk.random_layer(codec, (384, 384))
    want = packed.decode()
    every = slice(0, 384)
    for rows, cols in [
        (slice(128, 384), every),
        (every, slice(128, 256)),
        (slice(0, 128), slice(256, 384)),
    ]:
        part = cut(packed, rows, cols)
        if part is None:
            tile = codec.tile(packed.shape)
            uneven = 128 % tile.rows or 128 % tile.cols
            assert uneven or cols != every, "rows of whole tiles must always be a layer"
            continue
        part.check() if _all_bytes_are_codes(packed) else None
        assert walk.same_bits(part.decode(), want[rows, cols])


def _all_bytes_are_codes(packed) -> bool:
    try:
        packed.check()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
def test_what_an_encoder_writes_passes_the_check(codec):
    for shape in [(1, 17), (33, 50), (64, 128)]:
        walk.encoded(codec, shape).check()


@pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
def test_bits_per_weight_count_every_stored_byte(codec):
    packed = walk.encoded(codec, (64, 128))
    # Params are held to float16 values by every encoder or stored in 32 bits.
    least = 8 * packed.codes.numel() + sum(
        8 * p.numel() if p.dtype == torch.uint8 else 16 * p.numel() for p in walk.values(packed)
    )
    assert least <= packed.bits <= least + 16 * sum(p.numel() for p in walk.values(packed))
    assert packed.bits_per_weight == packed.bits / (64 * 128)


@pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
def test_decode_has_the_same_bits_on_one_thread_and_two(codec):
    packed = walk.random_layer(codec, (1000, 48))
    with walk.threads(1):
        one = packed.decode()
    with walk.threads(2):
        assert walk.same_bits(packed.decode(), one)
