"""The examples' data, their length, and the quickest of them; CI runs the others in full."""

import hashlib
import json
import runpy
import struct
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
# sha256 of the ids as little-endian uint16.
VALIDATION = "13a9a1870b708f71d52b6f78c1b4078d3685da413bc25155f28e28d18fff6d70"


@pytest.fixture
def novels(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return __import__("novels")


def test_the_validation_text_gives_the_tokens_of_the_protocol(novels):
    ids = novels.validation().tolist()
    assert len(ids) == 65_536
    assert hashlib.sha256(struct.pack("<65536H", *ids)).hexdigest() == VALIDATION


def test_calibration_and_training_windows_are_enough_and_the_same_every_time(novels):
    calibration = novels.calibration()
    assert calibration.shape == (128, 256)
    assert (calibration == novels.calibration()).all()
    training = novels.training(1400)  # 358,400 tokens
    assert training.shape == (1400, 256)
    assert (training == novels.training(1400)).all()


def test_the_tokenizer_and_the_model_agree_on_the_vocabulary(novels):
    config = json.loads((novels.MODEL / "config.json").read_text())
    assert len(novels.tokenizer()) == config["vocab_size"] == 4096


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short(path):
    # The demo may be a little longer: it is the whole job.
    assert len(path.read_text().splitlines()) <= (100 if path.name == "demo.py" else 80)


def test_swapping_a_layer_and_training_its_tables_lowers_the_loss(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swap_linear.py", "--steps", "200"])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLES / "swap_linear.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    swapped, trained = (float(line.split("loss ")[1].split(",")[0]) for line in lines[1:3])
    assert trained < swapped


def test_training_from_scratch_at_four_and_sixteen_levels_comes_within_a_point_of_float(
    monkeypatch, capsys
):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["qat_digits.py", "--epochs", "20", "--seeds", "3"])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(EXAMPLES / "qat_digits.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    means = {" ".join(row[:-7]): float(row[-6]) for row in rows}
    assert len(means) == 5
    assert means["float"] > 96
    for name, right in means.items():
        assert right >= means["float"] - 1, (name, means)
