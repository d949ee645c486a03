"""The command: exit codes, one-line errors, JSON, and nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

import reality_stone as rs
from reality_stone import cli, compare, jobs, tensorfile
from reality_stone.codecs import REGISTRY, codec
from reality_stone.streaming import journal


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    return models.language_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def packed(dense) -> Path:
    target = dense.parent / "packed"
    jobs.compress_directory(dense, target, 4, "uniform(bits=4, group=16)", progress=False)
    return target


@pytest.fixture
def run(capsys):
    """Run a command: (exit code, stdout, stderr)."""

    def call(*argv) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def one_sentence(err: str) -> str:
    lines = [line for line in err.splitlines() if "warning:" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("reality-stone: error: ")
    return lines[0]


def test_a_plan_is_printed_written_drawn_and_compressed_by(dense, run, tmp_path):
    pytest.importorskip("matplotlib")
    words = ("--calibration", dense / "text.txt", "--samples", 8, "--context", 16)
    out, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    kind = ("--codec", "uniform", "--skip", "*.down_proj")
    code, text, _ = run(
        "plan", dense, "--bits", 2.6, *kind, *words, "--out", out, "--plot", plot
    )  # fmt: skip
    assert code == 0
    assert "predicted loss" in text
    assert "left dense: model.layers.0.mlp.down_proj" in text
    assert plot.stat().st_size > 1000
    code, text, _ = run("plan", dense, "--bits", 2.6, *kind, *words, "--json")
    assert json.loads(text) == json.loads(out.read_text())
    code, text, _ = run("compress", dense, tmp_path / "packed", "--plan", out, *words, "--json")
    report, planned = json.loads(text), rs.Plan.load(out)
    assert code == 0
    assert report["bits_per_weight"] == pytest.approx(planned.bits_per_weight)
    codecs = {layer["name"]: layer["codec"] for layer in report["layers"]}
    assert codecs == {c.name: planned.codec_of(c.name).spec for c in planned.curves}
    assert len(set(codecs.values())) > 1


def test_compress_plans_by_itself_and_says_what_a_plan_cannot_be(dense, run, tmp_path):
    code, text, _ = run(
        "compress", dense, tmp_path / "a", "--bits", 2.6, "--codec", "uniform", "--json"
    )
    assert code == 0
    assert len({layer["codec"] for layer in json.loads(text)["layers"]}) > 1
    (tmp_path / "plan.json").write_text("{}")
    both = ("--plan", tmp_path / "plan.json", "--bits", 3)
    assert run("compress", dense, tmp_path / "b", *both)[0] == 2
    code, _, err = run("compress", dense, tmp_path / "b", *both[:2])
    assert code == 1
    assert "this is not a plan: a plan must have entries" in one_sentence(err)
    code, _, err = run("plan", dense, "--bits", 1)
    assert code == 1
    assert "bits must be between 1.5 and 16" in one_sentence(err)
    assert not (tmp_path / "b").exists()


def test_a_model_that_predicts_no_tokens_is_not_judged_or_trained_by_them(dense, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    text = ("--text", dense / "text.txt", "--context", 16)
    for kind in (transformers.BertModel, transformers.BertForMaskedLM):
        source, packed = tmp_path / kind.__name__, tmp_path / f"packed_{kind.__name__}"
        kind(config).save_pretrained(source)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).write_bytes((dense / name).read_bytes())
        words = ("--codec", "uniform", "--calibration", dense / "text.txt", "--context", 16)
        assert run("compress", source, packed, *words, "--bits", 4)[0] == 0
        for verb in (("eval", packed), ("finetune", packed, tmp_path / "out")):
            code, _, err = run(*verb, *text)
            assert code == 1
            assert f"{kind.__name__} is none" in one_sentence(err)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_sentence_transformers_needs_goes_along_and_nothing_from_outside(
    dense, run, tmp_path, calibrated
):
    source = tmp_path / "dense"
    shutil.copytree(dense, source)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (source / "1_Pooling" / "pytorch_model.bin").write_bytes(b"pickled")
    paths = ["", "1_Pooling", "2_Normalize", "../outside", str(tmp_path / "outside"), ".."]
    modules = json.dumps([{"idx": i, "path": path} for i, path in enumerate(paths)])
    (source / "modules.json").write_text(modules)
    words = ("--calibration", dense / "text.txt", "--context", 16) if calibrated else ()
    assert (
        run("compress", source, tmp_path / "m", "--codec", "uniform", "--bits", 4, *words)[0] == 0
    )
    assert run("decompress", tmp_path / "m", tmp_path / "again")[0] == 0
    for made in (tmp_path / "m", tmp_path / "again"):
        assert (made / "modules.json").read_text() == modules
        pooling = made / "1_Pooling" / "config.json"
        assert pooling.read_bytes() == (source / "1_Pooling" / "config.json").read_bytes()
        assert [p.name for p in made.rglob("*") if p.is_dir()] == ["1_Pooling"]
        assert not list(made.rglob("*.bin"))


def test_doctor_finds_everything_in_order(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "everything works" in out
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sound"]
    assert {check["codec"].split("(")[0] for check in found["checks"]} == set(REGISTRY)


def test_doctor_names_a_wrong_instruction_set(run, monkeypatch):
    monkeypatch.setenv("REALITY_STONE_ISA", "avx1024")
    _, out, _ = run("doctor")
    assert "REALITY_STONE_ISA is 'avx1024'" in out


def test_doctor_works_without_the_compiled_library(tmp_path):
    program = (
        "import sys; sys.modules['reality_stone._C'] = None\n"
        "from reality_stone.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    value = json.loads(found.stdout)
    assert value["isa"] == "reference"
    assert any("compiled library is not there" in note for note in value["notes"])


def test_a_codec_that_computes_wrong_fails_doctor(run, monkeypatch):
    kind = REGISTRY["uniform"]
    right = kind.decode_reference
    monkeypatch.setattr(kind, "decode_reference", lambda *a: right(*a) + 1)
    code, out, _ = run("doctor")
    assert code == 1
    assert "uniform" in out.split("problem:")[1]


def test_compress_eval_and_inspect_work_together(run, dense, tmp_path):
    target = tmp_path / "out"
    code, out, err = run(
        "compress", dense, target, "--codec", "uniform(bits=4, group=16)", "--calibration",
        dense / "text.txt", "--samples", "4", "--context", "32", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert len(json.loads(out)["layers"]) == 14
    code, out, err = run(
        "eval", target, "--text", dense / "text.txt", "--reference", dense, "--context", "32",
        "--tokens", "1000", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"] == 31 * 31
    assert 0 < found["kl"] < 0.1
    assert "text.txt" in found["protocol"]
    assert "992 tokens" in found["protocol"]
    code, out, _ = run("inspect", target, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sound"]
    assert found["bits_per_weight"] == pytest.approx(6, abs=0.01)
    assert len(found["layers"]) == 14


def test_compress_measures_the_curvature_where_it_is_asked_to(run, dense, tmp_path):
    words = ("--calibration", dense / "text.txt", "--samples", "8", "--context", "32")
    kl = {}
    for name, more in (("plain", ()), ("curved", ("--curvature",))):
        code, _, err = run("compress", dense, tmp_path / name, "--bits", "2", *words, *more)
        assert code == 0, err
        _, out, _ = run(
            "eval", tmp_path / name, "--text", dense / "text.txt", "--reference", dense,
            "--context", "32", "--tokens", "1000", "--json",
        )  # fmt: skip
        kl[name] = json.loads(out)["kl"]
    assert kl["curved"] != kl["plain"]
    code, _, err = run("compress", dense, tmp_path / "refused", "--curvature")
    assert code == 1
    assert "calibration data" in one_sentence(err)
    assert not (tmp_path / "refused").exists()


def finetune(run, dense, packed, target, *more):
    return run(
        "finetune", packed, target, "--text", dense / "text.txt", "--steps", "6", "--batch", "2",
        "--context", "16", "--teacher", dense, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rough(dense) -> Path:
    target = dense.parent / "rough"
    jobs.compress_directory(dense, target, 2, "uniform(bits=2, group=16)", progress=False)
    return target


@pytest.mark.parametrize("mode", ["tables", "codes", "lora"])
def test_finetune_brings_a_model_closer_to_its_teacher_and_leaves_no_state(
    run, dense, rough, tmp_path, mode
):
    judge = ("--judge", dense / "text.txt", "--judge-tokens", "400")
    # A model of random weights is flat: large steps, or nothing is to be seen.
    lr = "0.002" if mode == "lora" else "0.02"
    more = ("--mode", mode, "--lr", lr, "--rank", "4", *judge)
    code, out, err = finetune(run, dense, rough, tmp_path / "o", *more, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["training"]["losses"]) == 6
    assert found["after"]["kl"] < found["before"]["kl"]
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    assert (tmp_path / "o" / jobs.ADAPTER).is_file() == (mode == "lora")
    code, out, _ = run(
        "eval", tmp_path / "o", "--text", dense / "text.txt", "--reference", dense,
        "--context", "16", "--tokens", "400", "--json",
    )  # fmt: skip
    assert code == 0
    # Not exactly: parameters are stored as float16 only where that loses nothing of note.
    assert json.loads(out)["kl"] == pytest.approx(found["after"]["kl"], rel=1e-3)


def test_an_interrupted_finetune_says_how_to_go_on_and_ends_in_the_same_bytes(
    run, dense, rough, tmp_path, monkeypatch
):
    from reality_stone.training import loop

    code, out, err = finetune(run, dense, rough, tmp_path / "whole")
    assert code == 0, err
    assert "loss" in out
    assert "6 steps" in out
    calls, right = [], loop._loss

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_loss", interrupted)
        code, out, err = finetune(run, dense, rough, tmp_path / "o")
    assert code == 130
    assert "o.state; the same call again goes on" in err
    assert not (tmp_path / "o").exists()
    code, _, err = finetune(run, dense, rough, tmp_path / "o", "--lr", "0.5")
    assert code == 1
    assert "another lr" in one_sentence(err)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_loss", lambda *args: calls.append(1) or right(*args))
        code, _, err = finetune(run, dense, rough, tmp_path / "o")
    assert code == 0, err
    assert len(calls) == 4 + 3
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "o")]
    assert weights[0] == weights[1]


def test_a_saved_language_model_gives_the_same_bits(dense, packed):
    from reality_stone import hf

    model = hf.from_pretrained(dense)
    rs.compress(model, codec="uniform(bits=4, group=16)", progress=False)
    other = rs.from_pretrained(packed)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, other(tokens).logits)
    assert other.lm_head.weight is other.get_input_embeddings().weight
    assert other.generation_config.to_dict() == model.generation_config.to_dict()
    # The dense part keeps the dtype of its source, in the file.
    entries = tensorfile.read_header(packed / "model.safetensors").entries
    assert entries["model.embed_tokens.weight"].dtype == torch.float16
    assert "lm_head.weight" not in entries


def test_text_output_is_for_people(run, dense, packed):
    _, out, _ = run("inspect", packed)
    assert "14 layers at" in out
    assert "all checksums are right" in out
    _, out, _ = run("eval", packed, "--text", dense / "text.txt", "--context", "16")
    assert "perplexity" in out
    assert "protocol" in out


def test_inspect_says_where_a_file_is_damaged(run, packed, tmp_path):
    whole = (packed / "model.safetensors").read_bytes()
    path = tmp_path / "m.safetensors"
    name = "model.layers.1.mlp.up_proj"
    entry = tensorfile.read_header(packed / "model.safetensors").entries[f"{name}.codes"]
    path.write_bytes(whole[: entry.start] + b"\xaa" * 8 + whole[entry.start + 8 :])
    code, out, _ = run("inspect", path, "--json")
    found = json.loads(out)
    assert code == 1
    assert [layer["name"] for layer in found["layers"] if layer["problem"]] == [name]
    path.write_bytes(whole[: entry.start + 5])
    code, out, _ = run("inspect", path)
    assert code == 1
    assert f"cut off at byte {entry.start + 5}" in out
    for size in (0, 5, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        code, out, _ = run("inspect", path, "--json")
        assert code == 1
        assert json.loads(out)["problems"]


@pytest.mark.parametrize(
    "argv",
    [
        [], ["paint"], ["compress", "a"], ["compress", "a", "b", "--bits", "many"],
        ["compress", "a", "b", "--bits", "0"], ["compress", "a", "b", "--codec", "magic"],
        ["compress", "a", "b", "--codec", "uniform(bits=77)"], ["eval", "a"],
        ["compress", "a", "b", "--samples", "0"], ["bench", "--shapes", "12"],
        ["finetune", "a", "b"], ["finetune", "a", "b", "--text", "t", "--lr", "0"],
        ["finetune", "a", "b", "--text", "t", "--mode", "all"],
        ["finetune", "a", "b", "--text", "t", "--steps", "1", "--windows", "1"],
        ["bench", "--batches", "1,,2"], ["compare", "a", "--codecs", "uniform,("],
    ],
)  # fmt: skip
def test_bad_usage_gives_two(run, argv):
    code, out, err = run(*argv)
    assert code == 2
    assert not out
    assert "Traceback" not in err


def test_failures_give_one_and_one_sentence(run, dense, packed, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "short").write_text("it was")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    text = ("--text", dense / "text.txt", "--context", "16")
    cases = {
        ("inspect", tmp_path / "nothing"): "nothing",
        ("compress", tmp_path / "nothing", tmp_path / "o"): "nothing",
        ("compress", dense, tmp_path / "full"): "not empty",
        ("compress", dense, dense): "not empty",
        ("compress", dense, tmp_path / "file" / "o"): "nothing can be written",
        ("compress", packed, tmp_path / "o"): "already compressed",
        ("compress", dense, tmp_path / "o", "--calibration", tmp_path / "none"): "none",
        ("compress", dense, tmp_path / "o", "--calibration", tmp_path / "short"): "too few",
        ("eval", packed, "--text", tmp_path / "latin"): "not readable text",
        ("eval", packed, "--text", tmp_path / "short"): "less than one window",
        ("eval", tmp_path / "full", "--text", tmp_path / "short"): "config.json",
        ("finetune", dense, tmp_path / "o", *text): "compress it first",
        ("finetune", packed, tmp_path / "full", *text): "not empty",
        ("finetune", packed, tmp_path / "o", *text, "--mode", "codes"): "needs teacher=",
        ("finetune", packed, tmp_path / "o", *text, "--teacher", packed): "must be a dense model",
        ("finetune", packed, tmp_path / "o", "--text", tmp_path / "short"): "too few",
        ("compare", tmp_path / "file"): "safetensors",
        ("compare", tmp_path / "file", "--bits", "9", "--codecs", "uniform"): "no settings",
    }
    for argv, word in cases.items():
        code, out, err = run(*argv)
        assert code == 1, argv
        assert not out
        assert word in one_sentence(err)
    assert not (tmp_path / "o").exists()
    with pytest.raises(FileNotFoundError):
        run("inspect", tmp_path / "nothing", "--debug")


def test_a_damaged_checkpoint_fails_eval_in_one_sentence(run, dense, packed, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    whole = (packed / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-9])
    code, _, err = run("eval", tmp_path, "--text", dense / "text.txt")
    assert code == 1
    assert "cut off" in one_sentence(err)


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupt_gives_130_and_leaves_nothing(run, dense, tmp_path, monkeypatch):
    # A rate that is planned first, so that all is done in memory.
    argv = ("compress", dense, tmp_path / "o", "--codec", "uniform", "--bits", "3.5")
    text = ("--calibration", dense / "text.txt", "--samples", "4", "--context", "32")
    for module, name in ((jobs, "compress"), (tensorfile, "write")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            code, out, err = run(*argv, *text)
        assert code == 130
        assert not out
        assert err.strip() == "reality-stone: interrupted"
        assert not list(tmp_path.iterdir())


def test_an_interrupted_run_with_calibration_goes_on(run, dense, tmp_path, monkeypatch):
    argv = ("compress", dense, tmp_path / "o", "--codec", "uniform(bits=4, group=16)")
    text = ("--calibration", dense / "text.txt", "--samples", "4", "--context", "32")
    with monkeypatch.context() as patch:
        patch.setattr(journal, "keep_hidden", interrupted)
        code, out, err = run(*argv, *text)
    assert code == 130
    assert not out
    assert "o.partial; the same call with --resume goes on" in err
    assert run(*argv)[0] == 1
    assert run(*argv, "--resume")[0] == 1  # that was another run
    code, _, err = run(*argv, *text, "--resume")
    assert code == 0, err
    code, _, err = run("compress", dense, tmp_path / "whole", *argv[3:], *text)
    assert code == 0, err
    found = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    assert found == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}


def test_a_missing_package_gives_the_line_to_type(run, dense, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run("eval", dense, "--text", dense / "text.txt")
    assert code == 1
    assert "pip install reality-stone[hf]" in one_sentence(err)


def test_unexpected_errors_are_one_sentence_too(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("reality_stone.inspection.inspect", broken)
    code, _, err = run("inspect", "x")
    assert code == 1
    assert "RuntimeError: two lines" in one_sentence(err)


@pytest.fixture(scope="module")
def matrices(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("matrices") / "w.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(64, 96, generator=generator),
        "b": torch.randn(33, 50, generator=generator).half(),
        "bias": torch.zeros(9),
        "zero": torch.zeros(8, 8),
    }
    tensorfile.write(path, tensors, {})
    return path


def test_compare_measures_every_codec_on_every_matrix(run, matrices, tmp_path):
    codecs = "uniform, sparse(percent=5), residual(base=uniform(bits=2), rest=sparse(percent=1))"
    csv, plot = tmp_path / "x.csv", tmp_path / "x.svg"
    code, out, err = run(
        "compare", matrices, "--codecs", codecs, "--bits", "2.5,3,8", "--csv", csv, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert len(found["rows"]) == 2 * 4
    assert len(found["summary"]) == 4
    assert {one["tensor"] for one in found["skipped"]} == {"zero"}
    assert len(csv.read_text().splitlines()) == 9
    code, out, _ = run("compare", matrices, "--codecs", "uniform", "--limit", "1")
    assert code == 0
    assert "dB from bound" in out
    pytest.importorskip("matplotlib")
    assert run("compare", matrices, "--codecs", "uniform", "--limit", "1", "--plot", plot)[0] == 0
    assert "svg" in plot.read_text()[:300]


def test_the_distance_from_the_bound_is_right():
    assert compare.decibels(2**-4, 2) == pytest.approx(0, abs=1e-9)
    assert compare.decibels(2**-3, 2) == pytest.approx(3.0103, abs=1e-4)


def test_an_uniform_8_bit_code_of_noise_is_where_theory_says(matrices):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    row = compare.measure("w", weight, codec("uniform(bits=8, group=256)"))
    assert row.bits_per_weight == pytest.approx(8 + 32 / 256)
    # A step of range / 255 with a range of about 5.6 standard deviations over 256 draws.
    assert row.nmse == pytest.approx((5.6 / 255) ** 2 / 12, rel=0.25)


def test_codec_lists_are_cut_at_outer_commas():
    assert cli.split("a, b(c=1, d=e(f=2)),g") == ["a", "b(c=1, d=e(f=2))", "g"]


def test_json_has_no_infinity():
    assert cli._finite({"a": [float("inf"), float("nan"), 1.0]}) == {"a": [None, None, 1.0]}


def test_the_module_runs_as_a_program():
    found = subprocess.run(
        [sys.executable, "-m", "reality_stone", "--version"], capture_output=True, text=True
    )
    assert found.returncode == 0
    assert found.stdout.startswith("reality-stone ")
