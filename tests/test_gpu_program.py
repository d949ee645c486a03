"""benchmarks/gpu.py: how it goes through its steps, and what it says without a GPU."""

import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAMS))
    sys.modules.pop("gpu", None)
    import gpu

    yield gpu
    sys.modules.pop("gpu", None)


@pytest.fixture
def run(gpu, monkeypatch, tmp_path, capsys):
    """Go through fake steps as if there were a GPU: (outcomes, the log, what was printed)."""
    monkeypatch.setattr(gpu, "no_gpu", lambda: "")

    def call(limit: float, **programs: str):
        steps = [gpu.Step(name, (sys.executable, "-c", p), 2) for name, p in programs.items()]
        found = gpu.take_all(steps, limit, tmp_path)
        return found, (tmp_path / "log.txt").read_text(), capsys.readouterr().out

    return call


def test_a_step_that_fails_or_hangs_is_reported_and_the_rest_run(run):
    slow = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    found, log, out = run(
        100,
        good="print('fine')",
        bad="print('oh'); raise SystemExit(3)",
        slow=slow,
        last="print(7)",
    )
    assert time.monotonic() - began < 30
    problems = ["", "failed with exit code 3", "stopped after 2 s", ""]
    assert [o.problem for o in found] == problems
    for text in (log, out):
        for said in ("fine", "oh", "begun", "7", "good: done", "bad: failed with exit code 3"):
            assert said in text.splitlines() or f"{said} (" in text
    assert log.index("begun") < log.index("stopped after 2 s") < log.index("last: done")


def test_no_step_starts_once_the_time_is_over(run):
    found, _, out = run(1, first="print(1)")
    assert found[0].problem == "not run: 1 s are over"
    assert "first: not run" in out


def test_a_step_without_its_tool_says_so(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "no_gpu", lambda: "")
    step = gpu.Step("check", ("no-such-tool",), 5, needs="no-such-tool")
    assert gpu.take_all([step], 50, tmp_path)[0].problem == "not run: there is no no-such-tool"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_step_says_so(gpu, tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in lines] == [s.name for s in gpu.steps(tmp_path)]
    assert all("not run: there is no GPU that torch" in text for text in lines)


def test_steps_are_chosen_by_name(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["nothing"])
    assert stop.value.code == 2
    assert "no step is called nothing; they are build, doctor, tests" in capsys.readouterr().err
    if not torch.cuda.is_available():
        gpu.main(["tests", "linear", "--out", str(tmp_path)])
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_the_steps_name_is_there(gpu, tmp_path):
    for test in (*gpu.TESTS, *gpu.CHECKED):
        file, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / file).read_text()
    found = {step.name: step for step in gpu.steps(tmp_path)}
    assert len(found) == len(gpu.steps(tmp_path))
    for name in ("linear", "gradients", "encoding", "generate", "training_step"):
        assert Path(found[name].command[1]).exists()
        assert str(tmp_path / f"{name}.json") in found[name].command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["linear", "gradients", "encoding", "generate", "training_step"])
def test_benchmarks_take_the_options_that_they_are_given(gpu, name, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    (command,) = (step.command for step in gpu.steps(tmp_path) if step.name == name)
    monkeypatch.setattr(sys, "argv", list(command[1:]))
    before = set(sys.modules)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(command[1])["main"]()
    for module in ("common", "llama"):
        if module not in before:
            sys.modules.pop(module, None)
    said = f"{stop.value.code} {capsys.readouterr().err}"  # options that make no sense end with 2
    assert "there is no GPU that torch" in said or "sees no CUDA GPU" in said
