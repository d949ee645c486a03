"""The programs that time whole models, on a model of a few thousand weights. Nothing is timed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs reality-stone[hf]")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ["--size", "tiny"]


@pytest.fixture(scope="module")
def programs():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {n: importlib.import_module(n) for n in ("llama", "generate", "training_step")}
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_generate_says_sizes_speed_and_share_of_bandwidth_that_agree(programs, tmp_path, capsys):
    cases = ["float32", "bfloat16", "trellis(bits=2)", "uniform(bits=4)"]
    file, plot = tmp_path / "g.json", tmp_path / "g.png"
    programs["generate"].main([
        *TINY, "--tokens", "2", "--turns", "2", "--prompt", "3", "--copy-mb", "1", "--cases",
        *cases, "--profile", "uniform(bits=4)", "--json", str(file), "--plot", str(plot),
    ])  # fmt: skip
    found = json.loads(file.read_text())
    rows = {row["case"]: row for row in found["cases"]}
    assert list(rows) == cases
    size = programs["llama"].SIZES["tiny"]
    block = size.hidden * (2 * size.hidden + 2 * size.hidden // 2 + 3 * size.intermediate)
    weights = size.layers * block + size.vocabulary * size.hidden
    for row in rows.values():
        assert row["weights"] == weights
        assert row["tokens_per_second"] * row["token_seconds"] == pytest.approx(1)
        share = row["token_bytes"] * row["tokens_per_second"] / found["copy_bytes_per_second"]
        assert row["bandwidth_share"] == pytest.approx(share)
        assert row["token_bytes"] < row["tensor_bytes"]  # norms and rotary tables are not counted
        assert row["prompt_seconds"] > 0
    assert rows["float32"]["token_bytes"] == 4 * weights
    assert rows["bfloat16"]["token_bytes"] == 2 * weights
    assert rows["float32"]["bits_per_block_weight"] == 32
    packed = rows["uniform(bits=4)"]
    # 4 bits, and one float32 scale for 32 weights.
    assert packed["bits_per_block_weight"] == 5
    assert packed["token_bytes"] == weights * 5 / 8
    parts = found["profiles"]["uniform(bits=4)"]
    inside = {k: v for k, v in parts.items() if k not in ("token", "linear ops")}
    assert sum(inside.values()) == pytest.approx(parts["token"])
    assert 0 < parts["linear ops"] <= parts["linear layers"]
    assert plot.stat().st_size > 1000
    printed = capsys.readouterr().out
    assert all(case in printed for case in cases)


def test_a_writer_writes_what_the_model_gives_without_a_cache(programs):
    llama, generate = programs["llama"], programs["generate"]
    torch.manual_seed(0)
    args = ("uniform(bits=4)", "uniform(bits=4)")
    model = llama.build(llama.SIZES["tiny"], torch.float32, torch.device("cpu"), *args)
    prompt = torch.tensor([[5, 9, 200, 31]])
    writer = generate.Writer(model, prompt, 4)
    for _ in range(2):  # a second turn starts from the prompt again
        writer.start()
        got = [writer.token.item()]
        for _ in range(3):
            writer.step()
            got.append(writer.token.item())
        written = prompt
        with torch.no_grad():
            for _ in range(4):
                logits = model(written, use_cache=False).logits[:, -1]
                written = torch.cat((written, logits.argmax(-1, keepdim=True)), 1)
        assert got == written[0, 4:].tolist()


def test_a_training_step_trains_what_its_case_says_and_no_more(programs):
    step, device = programs["training_step"], torch.device("cpu")
    args = step.parser().parse_args([*TINY, "--layers", "1", "--rank", "2"])
    trained = {}
    for case in ("bfloat16", "trellis(bits=2) tables", "trellis(bits=2) lora"):
        model = step.build(case, args, device)
        trained[case] = [n for n, p in model.named_parameters() if p.requires_grad]
        assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
    assert "model.embed_tokens.weight" in trained["bfloat16"]
    assert all("_proj." in n for case in list(trained)[1:] for n in trained[case])
    assert any(n.endswith("out_scale") for n in trained["trellis(bits=2) tables"])
    assert {n.rpartition(".")[2] for n in trained["trellis(bits=2) lora"]} == {"a", "b"}
    with pytest.raises(SystemExit, match="lora or tables"):
        step.build("uniform(bits=4) nothing", args, device)


def test_training_step_prints_what_it_measured_and_what_it_could_not(
    programs, tmp_path, capsys, monkeypatch
):
    step, file, plot = programs["training_step"], tmp_path / "t.json", tmp_path / "t.png"
    good, bad = "trellis(bits=2) tables", "nf4 lora"
    failed = "Traceback\nModuleNotFoundError: No bits"

    def run(command, **_):
        """What a process of its own would do, without the seconds that one takes to start."""
        if command[-1] == bad:
            return subprocess.CompletedProcess(command, 1, "", failed)
        capsys.readouterr()
        step.main(command[2:])
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(step.subprocess, "run", run)
    step.main([
        *TINY, "--layers", "1", "--batch", "1", "--context", "8", "--steps", "2", "--cases",
        good, bad, "--json", str(file), "--plot", str(plot),
    ])  # fmt: skip
    found, missing = json.loads(file.read_text())["cases"]
    assert missing == {"case": bad, "error": "ModuleNotFoundError: No bits"}
    assert found["error"] is None
    assert found["tokens_per_second"] * found["seconds"] == pytest.approx(8)
    assert found["peak_bytes"] >= 0  # this process may have held more before
    assert found["model_bytes"] > 2 * 256 * 64  # the bfloat16 table alone
    assert len(found["losses"]) == 3
    assert all(torch.tensor(found["losses"]).isfinite())
    assert "nf4 lora                 not measured: ModuleNotFoundError" in capsys.readouterr().out
    assert plot.stat().st_size > 1000
    killed = subprocess.CompletedProcess([], -9, "", "")
    assert step.row_of(good, killed)["error"] == "ended by signal 9"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["generate", "training_step"])
def test_without_a_gpu_the_programs_say_so_in_one_sentence(programs, name):
    with pytest.raises(SystemExit, match=r"sees no CUDA GPU$"):
        programs[name].main(["--device", "cuda"])
