"""Golden bytes: what was once written decodes to the same bits for ever."""

import importlib.util
from pathlib import Path

import pytest
import walk

from reality_stone import ops, reference

FOLDER = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_make", FOLDER / "make.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

FILES = sorted(FOLDER.glob("*/*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_codes_decode_to_their_bits_everywhere(path):
    packed, expected = golden.load(path)
    assert packed.codec.name == path.parent.name
    decoders = {"reference": lambda: reference.decode(*walk.arguments(packed))}
    for isa in walk.isas():

        def run(isa=isa):
            with ops.use_isa(isa):
                return packed.decode()

        decoders[isa] = run
    for name, decode in decoders.items():
        decoded = decode()
        first = [value.hex() for value in decoded.flatten()[:4].tolist()]
        assert first == expected["decode_first"], name
        assert golden.digest(decoded) == expected["decode_sha256"], name
    if path.stem.startswith("encoded"):
        packed.check()


@pytest.mark.parametrize("name", walk.NAMES)
def test_every_codec_has_golden_bytes(name):
    wanted = {path for path, _ in golden.examples() if path.parent.name == name}
    missing = sorted(p.name for p in wanted if not p.exists())
    assert not missing, "run python tests/golden/make.py and commit what it writes"


def test_the_golden_weight_is_the_one_it_always_was():
    weight = golden.weight(20, 40)
    assert weight.flatten()[:3].tolist() == [
        -0.04618358612060547,
        -0.07409000396728516,
        0.04419708251953125,
    ]
    assert (
        golden.digest(weight) == "e4388ab812e8ac75be73ffe5f1a11265931ca5fe1730bc4d65b8b84048a17c13"
    )
    assert abs(weight.mean().item()) < 0.005
    assert 0.02 < weight.std().item() < 0.1
