"""Checkpoints in several shards: read like one file, and refused where an index lies."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_checkpoint import assert_same, build, packed_model, refuses

import reality_stone as rs
from reality_stone import checkpoint, inspection, shards, tensorfile
from reality_stone.shards import INDEX, WEIGHTS

FIRST, SECOND = (shards.shard_name(k, 2) for k in range(2))


def split(directory: Path) -> None:
    """Cut model.safetensors into two shards: layer 0 in the first, the rest in the second."""
    header = tensorfile.read_header(directory / WEIGHTS)
    tensors = {n: tensorfile.read_tensor(header, e) for n, e in header.entries.items()}
    names = {n: FIRST if n.startswith("0.") else SECOND for n in tensors}
    for file in (FIRST, SECOND):
        own = {n: t for n, t in tensors.items() if names[n] == file}
        part = checkpoint.part_of_plan(header.record(checkpoint.METHOD), own)
        tensorfile.write(directory / file, own, {checkpoint.METHOD: json.dumps(part)})
    (directory / INDEX).write_text(shards.index_text(names, 0))
    (directory / WEIGHTS).unlink()


@pytest.fixture
def saved(tmp_path) -> Path:
    directory = rs.save(packed_model(), tmp_path / "model")
    split(directory)
    return directory


def edit_index(directory: Path, change) -> None:
    value = json.loads((directory / INDEX).read_text())
    change(value["weight_map"])
    (directory / INDEX).write_text(json.dumps(value))


def edit_shard(path: Path, change, **metadata: str) -> None:
    header = tensorfile.read_header(path)
    tensors = {n: tensorfile.read_tensor(header, e) for n, e in header.entries.items()}
    change(tensors)
    kept = {k: v for k, v in header.metadata.items() if k not in ("format", "sha256")}
    tensorfile.write(path, tensors, kept | metadata)


def test_a_model_in_shards_loads_like_one_in_a_file(saved):
    assert_same(packed_model(), rs.load(build().eval(), saved))
    found = inspection.inspect(saved, progress=False)
    assert found.sound
    assert found.checksums
    assert [layer.name for layer in found.layers] == ["0", "2"]
    assert found.size == sum((saved / name).stat().st_size for name in (FIRST, SECOND))


def test_a_shard_can_be_judged_alone(saved):
    found = inspection.inspect(saved / SECOND, progress=False)
    assert found.sound
    assert [layer.name for layer in found.layers] == ["2"]


def test_saving_over_shards_leaves_none(saved):
    rs.save(packed_model(), saved)
    assert not list(saved.glob("model-*"))
    assert not (saved / INDEX).exists()
    assert_same(packed_model(), rs.load(build().eval(), saved))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", "", "model.bin", 7, None,
     ["a.safetensors"], "C:\\x.safetensors", "a\0.safetensors", ".safetensors",
     "..\\x.safetensors", "c:x.safetensors", "a" * 300 + ".safetensors"],
)  # fmt: skip
def test_a_name_in_an_index_that_is_no_file_name_is_refused(saved, name):
    shutil.copy(saved / FIRST, saved.parent / "x.safetensors")
    edit_index(saved, lambda names: names.update({"0.codes": name}))
    refuses(saved, INDEX, "no file name", "'0.codes'")
    assert any("no file name" in p for p in inspection.inspect(saved, progress=False).problems)


def test_a_link_out_of_the_directory_is_refused(saved):
    (saved / FIRST).rename(saved.parent / "elsewhere.safetensors")
    (saved / FIRST).symlink_to(saved.parent / "elsewhere.safetensors")
    refuses(saved, FIRST, "leads out of")


def test_the_links_of_the_cache_of_hugging_face_are_followed(saved):
    home = saved.parent / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    snapshot = home / "snapshots" / "abc"
    saved.rename(snapshot)
    for i, file in enumerate((FIRST, SECOND, INDEX)):
        (snapshot / file).rename(home / "blobs" / str(i))
        (snapshot / file).symlink_to(Path("..", "..", "blobs", str(i)))
    assert_same(packed_model(), rs.load(build().eval(), snapshot))


def test_a_missing_or_damaged_shard_is_named(saved):
    whole = (saved / SECOND).read_bytes()
    (saved / SECOND).write_bytes(whole[:-5])
    refuses(saved, SECOND, "cut off")
    found = inspection.inspect(saved, progress=False)
    assert any("cut off" in p for p in found.problems)
    assert [layer.name for layer in found.layers if not layer.problem] == ["0"]
    (saved / SECOND).unlink()
    refuses(saved, SECOND, "no such file")
    found = inspection.inspect(saved, progress=False)
    assert not found.sound
    assert any(SECOND in p for p in found.problems)


def test_every_bit_flip_in_a_shard_names_the_shard(saved):
    header = tensorfile.read_header(saved / SECOND)
    whole = (saved / SECOND).read_bytes()
    for entry in header.entries.values():
        data = bytearray(whole)
        data[entry.start] ^= 1
        (saved / SECOND).write_bytes(data)
        refuses(saved, SECOND, "sha256", repr(entry.name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: edit_index(d, lambda n: n.update(more=FIRST)), [FIRST, "'more'", "missing"]),
        (lambda d: edit_index(d, lambda n: n.update({"0.codes": SECOND})), ["belongs into"]),
        (lambda d: edit_index(d, lambda n: n.clear()), ["missing"]),
        (lambda d: edit_shard(d / SECOND, lambda t: t.update({"0.bias": torch.zeros(40)})),
         ["'0.bias'", "is also in"]),
        (lambda d: edit_shard(d / FIRST, lambda t: None, reality_stone="{}"), [FIRST, "plan"]),
        (lambda d: edit_shard(d / FIRST, lambda t: t.pop("0.codes")), ["'0.codes'", "missing"]),
        (lambda d: (d / INDEX).write_text("{"), [INDEX, "JSON"]),
        (lambda d: (d / INDEX).write_text("[" * 9999), [INDEX, "JSON"]),
        (lambda d: (d / INDEX).write_text("[]"), [INDEX, "weight_map"]),
        (lambda d: (d / INDEX).write_text('{"weight_map": []}'), [INDEX, "weight_map"]),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b", "a": "b"}}'), ["twice"]),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_shards_is_refused(saved, change, words):
    change(saved)
    refuses(saved, *words)
    assert not inspection.inspect(saved, progress=False).sound
