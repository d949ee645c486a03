"""Saving and loading: round trips, damage, foreign files, interrupts."""

import copy
import errno
import json
import os
from pathlib import Path

import pytest
import torch
import walk
from torch import nn

import reality_stone as rs
from reality_stone import checkpoint, tensorfile
from reality_stone.checkpoint import CONFIG, WEIGHTS
from reality_stone.nn import RBELinear

CODECS = [
    "uniform(bits=4, group=16)",
    "uniform(bits=3, group=7, symmetric=True)",
    "residual(base=uniform(bits=2, group=16), rest=sparse(percent=10))",
    "trellis(bits=2, search=fast)",
]


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 33, bias=False), nn.LayerNorm(33),
        nn.Linear(33, 5), nn.BatchNorm1d(5),
    )  # fmt: skip


def packed_model(codec=CODECS[0]) -> nn.Sequential:
    torch.manual_seed(0)
    model = build()
    model[0] = RBELinear.from_linear(model[0], codec)
    model[2] = RBELinear.from_linear(model[2], codec)
    return model.eval()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
        assert value.dtype == right[name].dtype


@pytest.fixture
def saved(tmp_path) -> Path:
    return rs.save(packed_model(), tmp_path / "model")


def edit_config(directory: Path, change) -> None:
    config = json.loads((directory / CONFIG).read_text())
    change(config["quantization_config"])
    (directory / CONFIG).write_text(json.dumps(config))
    # The copy of the plan in the weights would be found to differ first.
    header = tensorfile.read_header(directory / WEIGHTS)
    with (directory / WEIGHTS).open("rb") as file:
        tensors = {n: tensorfile.read_tensor(header, e, file) for n, e in header.entries.items()}
    tensorfile.write(directory / WEIGHTS, tensors, {})


def edit_tensors(directory: Path, change) -> None:
    path = directory / WEIGHTS
    header = tensorfile.read_header(path)
    with path.open("rb") as file:
        tensors = {n: tensorfile.read_tensor(header, e, file) for n, e in header.entries.items()}
    change(tensors)
    kept = {k: v for k, v in header.metadata.items() if k not in ("format", "sha256")}
    tensorfile.write(path, tensors, kept)


def refuses(directory: Path, *words: str, model: nn.Module | None = None) -> str:
    """load raises one sentence with all the words and leaves the model as it was."""
    model = model or build().eval()
    before = copy.deepcopy(model)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        rs.load(model, directory)
    assert_same(before, model)
    assert [type(m) for m in model] == [type(m) for m in before]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("codec", [*CODECS, *(c.spec for c in walk.FEW)])
def test_a_loaded_model_gives_the_same_bits(codec, tmp_path):
    model = packed_model(codec)
    rs.save(model, tmp_path / "m")
    other = rs.load(build().eval(), tmp_path / "m")
    assert_same(model, other)
    x = torch.randn(3, 24)
    assert torch.equal(model(x), other(x))
    assert other[0].codec == model[0].codec


def test_saving_twice_gives_the_same_bytes(tmp_path):
    first = rs.save(packed_model(), tmp_path / "a")
    again = rs.save(rs.load(build().eval(), first), tmp_path / "b")
    for name in (WEIGHTS, CONFIG):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_safetensors_itself_reads_the_file(saved):
    safe_open = pytest.importorskip("safetensors").safe_open
    model = packed_model()
    with safe_open(saved / WEIGHTS, "pt") as file:
        assert torch.equal(file.get_tensor("0.codes"), model[0].codes)
        assert torch.equal(file.get_tensor("3.weight"), model[3].weight)


def test_the_file_is_as_large_as_the_bits_per_weight_say(saved):
    header, model = tensorfile.read_header(saved / WEIGHTS), packed_model()
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        own = [e.bytes for e in header.entries.values() if e.name.startswith(f"{name}.")]
        bias = 0 if layer.bias is None else 4 * layer.bias.numel()
        assert 8 * (sum(own) - bias) == layer.bits_per_weight * layer.weight.numel()


def test_a_half_precision_model_keeps_its_values(tmp_path):
    model = packed_model().bfloat16()
    rs.save(model, tmp_path / "m")
    other = rs.load(build().bfloat16().eval(), tmp_path / "m")
    x = torch.randn(3, 24).bfloat16()
    assert torch.equal(model(x), other(x))


def test_dense_tensors_are_narrowed_only_where_nothing_is_lost(tmp_path):
    model = packed_model()
    with torch.no_grad():
        model[4].weight.copy_(model[4].weight.half())
        model[4].bias.fill_(1 / 3)
    rs.save(model, tmp_path / "m", dense_dtype=torch.float16)
    entries = tensorfile.read_header(tmp_path / "m" / WEIGHTS).entries
    assert entries["4.weight"].dtype == torch.float16
    assert entries["4.bias"].dtype == torch.float32
    assert_same(model, rs.load(build().eval(), tmp_path / "m"))


def test_a_checkpoint_loads_into_a_model_without_data(saved):
    with torch.device("meta"):
        model = build().eval()
    assert_same(packed_model(), rs.load(model, saved))


def test_a_checkpoint_loads_into_a_compressed_model(saved):
    model = packed_model("uniform(bits=8)")
    assert_same(packed_model(), rs.load(model, saved))
    with torch.no_grad():
        model[0].scale.zero_()
    before = model[0]
    assert_same(packed_model(), rs.load(model, saved))
    assert model[0] is before


class Tied(nn.Module):
    def __init__(self, tie: bool = True):
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.body = nn.Linear(24, 24)
        self.twice = nn.ModuleList([self.body, self.body])
        self.head = nn.Linear(24, 50, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    model = Tied()
    rs.compress(model, codec="uniform(bits=4)", plan=[("body", "uniform(bits=4)")])
    model.twice = nn.ModuleList([model.body, model.body])
    rs.save(model, tmp_path / "m")
    names = set(tensorfile.read_header(tmp_path / "m" / WEIGHTS).entries)
    assert names == {"embed.weight", "body.bias", "body.codes", "body.scale", "body.zero"}
    other = rs.load(Tied(), tmp_path / "m")
    assert_same(model, other)
    assert other.head.weight is other.embed.weight
    assert other.twice[0] is other.twice[1] is other.body
    assert_same(model, rs.load(Tied(tie=False), tmp_path / "m"))


def test_values_that_differ_are_not_loaded_into_tied_places(tmp_path):
    model = Tied(tie=False)
    rs.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="differ, but are one in the model"):
        rs.load(Tied(), tmp_path / "m")


def test_replace_makes_layers_without_data_and_dequantize_goes_back():
    model = packed_model()
    plan = [e.to_config() for e in checkpoint.plan_of(model)]
    empty = rs.replace(build(), plan)
    assert empty[0].codes.is_meta
    assert empty[0].codec == model[0].codec
    x = torch.randn(3, 24)
    wanted = model(x)
    assert type(rs.dequantize(model)[0]) is nn.Linear
    assert torch.allclose(model(x), wanted, atol=1e-5)  # another order of float32 sums


def test_every_truncation_is_refused(saved):
    path = saved / WEIGHTS
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for size in [0, 1, 7, 8, 9, *range(10, begin, 97), *range(begin, len(whole), 211), -1]:
        path.write_bytes(whole[:size])
        refuses(saved, WEIGHTS)
    path.write_bytes(whole + b"x")
    refuses(saved, "follow the last tensor")


def flips(size: int, count: int):
    generator = torch.Generator().manual_seed(1)
    at = torch.randint(0, size, (count,), generator=generator).tolist()
    return zip(at, torch.randint(0, 8, (count,), generator=generator).tolist(), strict=True)


def load_or_refuse(directory: Path, wanted: nn.Module) -> bool:
    model = build().eval()
    try:
        rs.load(model, directory)
    except (ValueError, FileNotFoundError):
        return False
    assert_same(wanted, model)
    return True


def test_every_bit_flip_in_the_data_is_found(saved):
    path = saved / WEIGHTS
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at, bit in flips(len(whole) - begin, 150):
        data = bytearray(whole)
        data[begin + at] ^= 1 << bit
        path.write_bytes(data)
        refuses(saved, "sha256", "tensor")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_bit_flip_in_a_header_is_found_or_does_no_harm(saved, name):
    path, wanted = saved / name, packed_model()
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little") if name == WEIGHTS else len(whole)
    found = 0
    for at, bit in flips(size, 250):
        data = bytearray(whole)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        found += not load_or_refuse(saved, wanted)
    assert found > 100


def test_without_checksums_flipped_codes_are_valid_codes_or_refused(tmp_path):
    """A file of another writer has no checksums: the codec's own rules are what is left."""
    model = packed_model(CODECS[2])
    rs.save(model, tmp_path / "m")
    path = tmp_path / "m" / WEIGHTS
    header = tensorfile.read_header(path)
    whole = path.read_bytes().replace(b'"sha256"', b'"sha255"', 1)
    refused = 0
    for name in ("0.codes", "0.rest_codes", "0.scale"):
        entry = header.entries[name]
        for at, bit in flips(entry.bytes, 40):
            data = bytearray(whole)
            data[entry.start + at] ^= 1 << bit
            path.write_bytes(data)
            try:
                loaded = rs.load(build().eval(), tmp_path / "m")
            except ValueError:
                refused += 1
            else:
                assert loaded(torch.randn(2, 24)).shape == (2, 5)
    assert refused > 10


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + b"\0" * 100, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]",
     (10**9).to_bytes(8, "little") + b"{}", b"\x80\x03" + b"\0" * 6 + b"[" * 896],
)  # fmt: skip
def test_a_foreign_weights_file_is_refused(saved, content):
    (saved / WEIGHTS).write_bytes(content)
    refuses(saved, WEIGHTS)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}, "needs"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}, "shape"),
        ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "offsets"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [10**30, 10**30 + 4]}, "offsets"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [400, 404]}, "starts at byte"),
        ({"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}, "cut off"),
        ("text", "described by an object"),
        (None, "described by an object"),
    ],
)
def test_a_lying_header_is_refused_before_memory_is_taken(saved, entry, words):
    raw = json.dumps({"a": entry}).encode()
    (saved / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 8)
    with pytest.raises(ValueError, match=words):
        tensorfile.read_header(saved / WEIGHTS)
    refuses(saved, WEIGHTS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(quant_method="gptq"), ["quant_method", "'gptq'"]),
        (lambda q: q.update(version=2), ["version 2", "reads version 1", "0.1.0"]),
        (lambda q: q.update(version="1"), ["version '1'"]),
        (lambda q: q.update(plan={}), ["plan must be a list"]),
        (lambda q: q["plan"].append(q["plan"][0]), ["'0'", "twice"]),
        (lambda q: q["plan"].append(7), ["object with a name"]),
        (lambda q: q["plan"][0].update(name="9"), ["'9.codes'", "missing"]),
        (lambda q: q["plan"][0].update(shape=[40, 49]), ["'0.codes'", "needs"]),
        (lambda q: q["plan"][0].update(shape=[2**47, 2**47]), ["'0.codes'", "needs"]),
        (lambda q: q["plan"][0].update(shape=[40, "x"]), ["shape"]),
        (lambda q: q["plan"][0].update(bias=False), ["'0'", "without bias"]),
        (lambda q: q["plan"][0].update(codec="uniform"), ["'0'", "name"]),
        (lambda q: q["plan"][0]["codec"].update(name="magic"), ["unknown codec 'magic'"]),
        (lambda q: q["plan"][0]["codec"].update(version=9), ["version 9"]),
        (lambda q: q["plan"][0]["codec"].update(bits=5), ["'0.codes'", "U8"]),
        (lambda q: q["plan"][0]["codec"].update(bits=1e400), ["'0'"]),
        (lambda q: q["plan"][0]["codec"].update(bits=None), ["'0'"]),
        (lambda q: q["plan"][0]["codec"].update(bits=[4]), ["'0'"]),
        (lambda q: q["plan"][0]["codec"].update(group=0), ["'0'", "group"]),
        (lambda q: q["plan"][0]["codec"].update(colour=1), ["'0'", "colour"]),
        (lambda q: q["plan"][0]["codec"].update(symmetric=True), ["'0.zero'"]),
    ],
)
def test_a_wrong_plan_is_refused_in_one_sentence(saved, change, words):
    edit_config(saved, change)
    refuses(saved, *words)


def test_a_plan_that_differs_from_the_one_in_the_weights_is_refused(saved):
    path = saved / CONFIG
    path.write_text(path.read_text().replace('"group": 16', '"group": 17', 1))
    refuses(saved, "not the one in config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": 1}', "[" * 5000, "9" * 5000])
def test_a_config_that_is_none_is_refused(saved, text):
    (saved / CONFIG).write_text(text)
    refuses(saved, CONFIG)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("0.codes"), ["'0.codes'", "missing"]),
        (lambda t: t.pop("3.weight"), ["'3.weight'", "missing"]),
        (lambda t: t.update(extra=torch.zeros(3)), ["'extra'", "no place"]),
        (lambda t: t.update({"0.codes": t["0.codes"].int()}), ["'0.codes'", "I32", "U8"]),
        (lambda t: t.update({"0.scale": t["0.scale"].double()}), ["'0.scale'", "F64", "F16"]),
        (lambda t: t.update({"0.scale": t["0.scale"][:-1]}), ["'0.scale'"]),
        (lambda t: t.update({"3.bias": t["3.bias"][:-1]}), ["'3.bias'", "[33]"]),
        (lambda t: t.update({"3.bias": t["3.bias"].int()}), ["'3.bias'", "I32"]),
        (lambda t: t["0.scale"].view(-1)[:1].fill_(float("nan")), ["'0.scale'", "not finite"]),
    ],
)
def test_wrong_tensors_are_refused_in_one_sentence(saved, change, words):
    edit_tensors(saved, change)
    refuses(saved, *words)


def test_codes_no_encoder_writes_are_refused(tmp_path):
    rs.save(packed_model(CODECS[2]), tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda t: t["0.rest_codes"].fill_(255))
    refuses(tmp_path / "m", "layer '0'", "tile (0, 0)")


def test_a_model_of_another_form_is_refused(saved):
    other = build().eval()
    other[0] = nn.Linear(24, 41)
    refuses(saved, "'0' is 40 x 24 with bias", "41 x 24", model=other)
    other[0] = nn.Identity()
    refuses(saved, "'0' must be nn.Linear", "Identity", model=other)
    refuses(saved, "'2'", "does not have", model=build()[:2])


def test_missing_files_are_named(tmp_path, saved):
    refuses(tmp_path / "nothing", "nothing")
    (saved / WEIGHTS).unlink()
    refuses(saved, WEIGHTS)
    (saved / CONFIG).unlink()
    refuses(saved, CONFIG)


def test_a_model_with_values_that_are_not_finite_is_not_saved(tmp_path):
    model = packed_model()
    with torch.no_grad():
        model[0].scale[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"'0' cannot be saved.*not finite"):
        rs.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_directory_of_others_is_not_overwritten(tmp_path, saved):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        rs.save(packed_model(), tmp_path / "mine")
    with pytest.raises(ValueError, match="this is a file"):
        rs.save(packed_model(), tmp_path / "mine" / "thesis.txt")
    with pytest.raises(ValueError, match="nothing can be written"):
        rs.save(packed_model(), tmp_path / "mine" / "thesis.txt" / "below")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (saved / "notes.txt").write_text("kept")
    rs.save(packed_model(), saved)
    assert (saved / "notes.txt").read_text() == "kept"


def stop_halfway(error):
    def write(path, tensors, metadata):
        path.write_bytes(b"half of it")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (PermissionError(errno.EROFS, "Read-only file system"), OSError),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, error, raised, existing):
    target = tmp_path / "m"
    if existing:
        rs.save(packed_model(), target)
    monkeypatch.setattr(tensorfile, "write", stop_halfway(error))
    with pytest.raises(raised) as caught:
        rs.save(packed_model("uniform(bits=8)"), target)
    if raised is OSError:
        assert str(target) in str(caught.value)
        assert error.strerror in str(caught.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["m"] if existing else [])
    if existing:
        assert_same(packed_model(), rs.load(build().eval(), target))


def test_an_interrupt_between_the_two_renames_brings_the_old_one_back(saved, monkeypatch):
    rename = Path.rename

    def interrupted(self, target):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rs.save(packed_model("uniform(bits=8)"), saved)
    monkeypatch.undo()
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert_same(packed_model(), rs.load(build().eval(), saved))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory_is_refused_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="nothing can be written"):
        rs.save(packed_model(), tmp_path / "m")


def test_the_note_says_how_to_load(saved):
    text = (saved / "README.md").read_text()
    assert "import reality_stone" in text
    assert "random" in text
