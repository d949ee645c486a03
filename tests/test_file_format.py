"""docs/file-format.md is enough to read a checkpoint: a reader written from it gives our bits."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import reader
import torch
import walk
from test_golden import FILES, golden
from torch import nn

import reality_stone as rs

ROOT = Path(__file__).parent.parent
# Their tables of functions are whole files; the page names them.
BY_REFERENCE = {"bitfield", "hybrid", "seed64"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_reader_written_from_the_page_decodes_golden_codes_to_the_same_bits(path):
    packed, _ = golden.load(path)
    if {packed.codec.name, *names_inside(packed.codec.to_config())} & BY_REFERENCE:
        pytest.skip("read by the tables of its header")
    params = {name: p.numpy() for name, p in packed.params.items()}
    ours = packed.decode().numpy()
    theirs = reader.decode(packed.codec.to_config(), packed.codes.numpy(), params, packed.shape)
    assert theirs.dtype == np.float32
    # Bits: zeros of either sign are told apart by nothing that reads a weight.
    assert np.array_equal(ours, theirs)


def names_inside(config: dict) -> set[str]:
    inner = [v for v in config.values() if isinstance(v, dict)]
    return {v["name"] for v in inner}.union(*(names_inside(v) for v in inner))


def test_the_reader_reads_every_codec_but_those_named():
    assert set(walk.NAMES) - BY_REFERENCE - {"residual"} <= set(vars(reader))


@pytest.mark.parametrize("codec", ["trellis(bits=2)", "residual", "ultra(codebook=model)"])
def test_the_reader_reads_a_checkpoint_directory(codec, tmp_path):
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 96), nn.Linear(96, 10))
    rs.compress(model, codec=codec, progress=False)
    rs.save(model, tmp_path / "packed")
    weights = reader.read_checkpoint(tmp_path / "packed")
    assert weights.keys() == {"0", "1"}
    for name, weight in weights.items():
        assert torch.equal(torch.from_numpy(weight), model.get_submodule(name).weight)


@pytest.mark.parametrize("name", walk.NAMES)
def test_the_page_has_each_layout_as_its_header_draws_it(name):
    header = (ROOT / f"csrc/codecs/{name}.h").read_text().split("#pragma once")[0]
    drawing = [re.sub(r"^// ?", "", line).rstrip() for line in header.strip().split("\n")]
    page = (ROOT / "docs/file-format.md").read_text()
    assert "\n".join(drawing) in page, f"csrc/codecs/{name}.h has changed: copy its comment"


def test_the_page_says_what_a_configuration_of_every_codec_holds():
    page = (ROOT / "docs/file-format.md").read_text()
    for name in walk.NAMES:
        assert json.dumps(rs.codec(name).to_config()) in page, name
