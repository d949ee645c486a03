"""The programs in benchmarks/ that ask how fast and how exact: what they print and write."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from reality_stone import bench
from reality_stone.bench import contenders, roofline, timing

PROGRAMS = Path(__file__).parent.parent / "benchmarks"
CODECS = "uniform(bits=4, group=16),palette(bits=2)"


@pytest.fixture
def program(monkeypatch, capsys, tmp_path):
    """Run a program on small matrices: (its text, its JSON, what its SVG says)."""
    monkeypatch.syspath_prepend(str(PROGRAMS))
    monkeypatch.setattr(contenders, "cache_bytes", lambda *_: 1 << 10)
    monkeypatch.setitem(roofline.MATMUL, "cpu", (8, 16, 8))
    monkeypatch.setattr(bench, "PEERS", ())
    few = {"turns": 2, "turn_seconds": 1e-9}
    turns = timing.interleaved
    for module in (bench.measure, timing):
        monkeypatch.setattr(module, "interleaved", lambda cases, **how: turns(cases, **how | few))
    pytest.importorskip("matplotlib")

    def call(name: str, *argv, codecs: str = CODECS, **constants):
        files = {"json": tmp_path / f"{name}.json", "plot": tmp_path / f"{name}.svg"}
        options = [f"--{key}={path}" for key, path in files.items()]
        main = runpy.run_path(str(PROGRAMS / f"{name}.py"))["main"]
        main.__globals__.update(constants)
        monkeypatch.setattr(
            sys, "argv", [name, "--codecs", codecs, *options, *map(str, argv)]
        )  # fmt: skip
        main()
        said = re.findall(r"<!-- (.*?) -->", files["plot"].read_text())
        return capsys.readouterr().out, json.loads(files["json"].read_text()), said

    threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(threads)
    sys.modules.pop("common", None)


def test_linear_times_forward_and_backward_and_writes_the_machine(program):
    out, found, said = program("linear", "--shapes", "32x64", "--batches", 2, "--turns", 2)
    assert found["question"] == "How fast is a product beside torch and other libraries?"
    assert found["machine"]["Processor"]
    assert found["device"] == "cpu"
    assert [row["backward"] for row in found["results"]] == ["none"] * 4 + ["input"] * 4
    assert set(found["results"][0]) == set(bench.Result.__dataclass_fields__)
    assert "forward and backward to the input" in out
    assert "of limit" in out
    assert {"32 x 64, batch 2", "32 x 64, batch 2, with dX", "uniform(bits=4, group=16)"} <= {*said}


def test_gradients_are_in_ratio_to_the_layers_own_forward(program):
    argv = ("gradients", "--shape", "32x64", "--batches", "1,3")
    out, found, said = program(*argv)
    rows = found["results"]
    assert len(rows) == 4 * 2
    for row in rows:
        assert row["input_ratio"] == pytest.approx(row["input"] / row["forward"])
        assert row["params_ratio"] == pytest.approx(row["params"] / row["forward"])
    assert "uniform(bits=4, group=16), params" in said
    out, found, _ = program(*argv, WANTED=0)
    assert out.count(" over\n") == len(found["results"])
    assert " over\n" not in program(*argv, WANTED=1e9)[0]


def test_encoding_searches_a_trellis_both_ways_and_says_what_is_too_slow(program):
    codecs = "trellis(bits=2),uniform(bits=4),hybrid(block=64)"
    out, found, said = program("encoding", "--shape", "48x64", "--turns", 2, codecs=codecs)
    rows = {row["what"].split(", rotate")[0] + row["what"][-6:]: row for row in found["results"]}
    assert len(rows) == 4
    exact, fast = (row for name, row in rows.items() if name.startswith("trellis"))
    assert (exact["wanted"], fast["wanted"]) == (0.25, 1.5)
    assert f"{100 * (fast['nmse'] / exact['nmse'] - 1):+.2f} % error of the exact search" in out
    assert all(len(row["seconds"]) == 2 for row in rows.values())
    assert "trellis(bits=2, search=fast)" in said
    assert " below\n" in program("encoding", "--shape", "48x64", wanted=lambda _: 1e9)[0]
    assert " below\n" not in program("encoding", "--shape", "48x64", wanted=lambda _: 0.0)[0]


def test_accuracy_compares_all_modes_with_float64(program):
    argv = ("accuracy", "--shape", "64x256", "--batches", "1,20")
    _, found, said = program(*argv)
    assert len(found["results"]) == 2 * 2
    for row in found["results"]:
        for what in ("forward", "input"):
            # float32 sums of 256 products; bfloat16 has 8 bits.
            assert row[f"{what}_exact"] < 1e-6
            assert row[f"{what}_exact"] <= row[f"{what}_auto"] * 1.01 < 1e-2
        # 8-bit activations, or the same product where there is no kernel for them.
        assert row["forward_auto"] <= row["forward_int8"] * 1.01 < 3e-2
    assert "batch 20, input auto" in said
    assert " over\n" not in program(*argv, WANTED=1.0)[0]
    assert program(*argv, WANTED=0.0)[0].count(" over\n") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["linear", "gradients", "accuracy"])
def test_a_program_without_its_gpu_says_so(program, capsys, name):
    with pytest.raises(SystemExit) as stop:
        program(name, "--device", "cuda")
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("there is no GPU that torch")
