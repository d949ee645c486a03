"""Moves of codes: every codec's fields say where its numbers are, and neighbours stay codes."""

import sys

import pytest
import torch
import walk

import reality_stone as rs
from reality_stone import ops
from reality_stone.codecs.fields import Field
from reality_stone.derivative import moves, neighbours

fields = sys.modules["reality_stone.codecs.fields"]  # rs.codecs is a function
SHAPE = (35, 50)
MOVABLE = [c for c in walk.FEW if c.fields(SHAPE)]
ON_MOVABLE = pytest.mark.parametrize("codec", MOVABLE, ids=walk.spec)
# Their codes are searched for as a whole: rings of states, sorted columns, halves of floats.
WHOLE = {"trellis", "sparse", "hybrid"}


def names(codec) -> list[str]:
    return [move.name for move in moves(codec, SHAPE)]


def test_every_codec_has_fields_but_those_whose_codes_are_found_as_a_whole():
    found = {c.name for c in MOVABLE}
    assert found | WHOLE | {"residual"} == set(walk.NAMES)
    assert not found & WHOLE
    assert names("residual(base=uniform(bits=3))") == names("uniform(bits=3)")
    assert names("residual") == []
    assert names("seed64(block=0)") == []


def test_the_names_say_what_moves():
    assert names("uniform") == ["level+1", "level-1"]
    assert names("palette(layout=pair)") == [f"index^{k}" for k in range(5)]
    assert names("cyclic(word=16)") == [
        *(f"index^{k}" for k in range(8)),
        *("amplitude+1", "amplitude-1", "phase+1", "phase-1"),
    ]
    assert {"diff+1", "diff-1"} <= set(names("cyclic(word=32)"))
    assert {"sign", "phase+1", "amplitude-1", "index^7"} <= set(names("bitfield(word=32, block=4)"))
    assert "cat^1" in names("bitfield")
    assert "cat^0" not in names("bitfield(functions=klein)")
    assert "diff^1" in names("bitfield(functions=klein)")
    assert "diff^0" not in names("bitfield(functions=c0s0d0_c1s0d0)")


@ON_MOVABLE
def test_neighbours_are_valid_codes_and_differ_in_one_field(codec):
    packed = walk.encoded(codec, SHAPE)
    before = {f.name: f.read(packed.codes) for f in codec.fields(SHAPE)}
    found = neighbours(packed.codes, codec, SHAPE)
    changed = 0
    for move, codes in found:
        assert codes.dtype == torch.uint8
        assert codes.shape == packed.codes.shape
        ops.check_codes(codes, walk.values(packed), codec.spec, SHAPE)
        now = move.field.read(codes)
        moved = now != before[move.field.name]
        changed += int(moved.any())
        assert torch.equal(move.field.write(packed.codes, now), codes)
        # Nothing outside of the field: what it was comes back with the field's old value.
        assert torch.equal(move.field.write(codes, before[move.field.name]), packed.codes)
    assert changed >= len(found) - 2  # a sign or an end of a range that no code can leave


@ON_MOVABLE
def test_a_move_changes_the_weights_of_its_own_code_alone(codec):
    packed = walk.random_layer(codec, SHAPE)
    if "masks" in packed.params:  # patterns of four ones, as an encoder makes them
        packed.params["masks"] = walk.encoded(codec, SHAPE).params["masks"]
    w = packed.decode()
    for move in moves(codec, SHAPE):
        grid = move.grid(packed.codes)
        chosen = torch.rand(grid, generator=torch.Generator().manual_seed(1)) < 0.3
        codes = move.apply(packed.codes, chosen)
        every = move.apply(packed.codes)
        new = ops.decode(codes, walk.values(packed), codec.spec, SHAPE)
        all_new = ops.decode(every, walk.values(packed), codec.spec, SHAPE)
        want = torch.where(move.spread(chosen, SHAPE), all_new, w)
        assert walk.same_bits(new, want), move.name


@ON_MOVABLE
def test_amounts_end_at_their_ends_and_cycles_come_back(codec):
    packed = walk.random_layer(codec, SHAPE)
    for field in codec.fields(SHAPE):
        changes = dict(field.neighbours())
        codes, start = packed.codes, field.read(packed.codes)
        if field.kind == "cyclic":
            up, down = changes[field.name + "+1"], changes[field.name + "-1"]
            assert torch.equal(down(up(start)), start)
            step = up(torch.full((1,), 2**field.width - 1, dtype=torch.int32))
            assert step.item() == 0
        elif field.kind == "level":
            top = 2 ** (field.width - field.signed) - 1
            ends = torch.tensor([top, -top if field.signed else 0], dtype=torch.int32)
            if not field.absent:
                assert changes[field.name + "+1"](ends).tolist()[0] == top
            assert changes[field.name + "-1"](ends)[1] == ends[1]
        else:
            for change in changes.values():
                assert torch.equal(change(change(start)), start)
                assert bool((change(start) != start).all())
        assert torch.equal(field.write(codes, start), codes)


def test_a_field_reads_and_writes_any_bits():
    codes = walk.random_bytes(7, 3, 11)
    bits = (codes[..., None] >> torch.arange(8) & 1).flatten(2)
    for offset, width, stride, count in (
        (0, 1, 1, 88),
        (3, 16, 17, 5),
        (2, 10, 22, 4),
        (1, 7, 7, 3),
    ):
        field = Field("some", "level", width, 1, offset=offset, stride=stride, count=count)
        places = [offset + stride * j + torch.arange(width) for j in range(count)]
        want = torch.stack([(bits[..., p] << torch.arange(width)).sum(-1) for p in places], -1)
        assert torch.equal(field.read(codes), want.flatten(1).int())
        values = torch.randint(0, 2**width, (7, 3 * count), dtype=torch.int32)
        written = field.write(codes, values)
        assert torch.equal(field.read(written), values)
        rest = (written ^ codes)[..., None] >> torch.arange(8) & 1
        rest = rest.flatten(2)
        rest[..., torch.cat(places)] = 0
        assert not rest.any()
    assert field.read(codes[:0]).shape == (0, 9)
    assert field.write(codes[:0], values[:0]).shape == (0, 3, 11)


def test_large_layers_are_read_and_written_in_parts(monkeypatch):
    codec = rs.codec("bitfield")
    packed = walk.random_layer(codec, (40, 64))
    field = codec.fields((40, 64))[1]
    want = field.read(packed.codes)
    moved = field.write(packed.codes, 255 - want)
    monkeypatch.setattr(fields, "HELD_BYTES", 4000)
    assert torch.equal(field.read(packed.codes), want)
    assert torch.equal(field.write(packed.codes, 255 - want), moved)


def test_sums_go_over_the_weights_of_a_code():
    for spec in (
        "uniform(group=32)",
        "cyclic(block=8)",
        "seed64(block=16)",
        "palette(layout=pair)",
    ):
        packed = walk.random_layer(rs.codec(spec), SHAPE)
        move = moves(spec, SHAPE)[0]
        values = walk.gaussian(*SHAPE).double()
        got = move.sums(values, packed.codes)
        assert tuple(got.shape) == move.grid(packed.codes)
        number = torch.arange(got.numel()).view(got.shape)
        at = move.spread(number, SHAPE)
        want = torch.zeros(got.numel(), dtype=torch.double).index_add_(
            0, at.flatten(), values.flatten()
        )
        assert torch.allclose(got.flatten(), want)
