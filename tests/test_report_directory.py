"""The page of a packed directory: what is measured, what is said to be missing, and the command."""

import json
import math
import shutil
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_report import Page

import reality_stone as rs
from reality_stone import blocks, cli, jobs, metrics, report
from reality_stone.report import dense as dense_files
from reality_stone.report import errors, measuring

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return models.language_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def packed(dense) -> Path:
    target = dense.parent / "packed"
    jobs.compress_directory(dense, target, 2, "uniform(bits=2, group=16)", progress=False)
    return target


@pytest.fixture(scope="module")
def log(dense, packed) -> Path:
    """What finetune --json prints, in a file."""
    done = jobs.finetune_directory(
        packed, dense.parent / "trained", jobs.Calibration(str(dense / "text.txt"), 6, 16), dense,
        judge=jobs.Judge(str(dense / "text.txt"), 200), batch=2, progress=False,
    )  # fmt: skip
    path = dense.parent / "run <1>.json"
    path.write_text(json.dumps(done.to_json()))
    return path


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def full(dense: Path, packed: Path, **more) -> report.Request:
    how = {"reference": dense, "text": dense / "text.txt", "context": 16, "tokens": 160}
    return report.Request(packed, **how | more)


def test_the_page_says_what_was_measured(dense, packed, log, tmp_path):
    found = report.report_directory(
        full(dense, packed, training=[log]), tmp_path / "p.html", "a day", progress=False
    )
    shown = page(tmp_path / "p.html")
    judged = jobs.evaluate_directory(packed, dense / "text.txt", dense, 16, 160, progress=False)
    assert found.quality.packed.kl == judged.evaluation.kl
    alone = jobs.evaluate_directory(dense, dense / "text.txt", None, 16, 160, progress=False)
    for words in (
        f"{judged.evaluation.perplexity:.3f}", f"{judged.evaluation.kl:.5f}", judged.protocol,
        f"{alone.evaluation.perplexity:.3f}", "a day", "LlamaForCausalLM", "run <1>",
        "self_attn.q_proj", "model.embed_tokens.weight", "uniform(bits=2, group=16)",
        f"{found.contents.bits_per_weight:.3f}", "Speed was not asked for",
    ):  # fmt: skip
        assert words in shown.text, words
    layers = len(found.contents.layers)
    assert layers == len(found.errors) == len(found.output_errors) == 14
    assert len(shown.every("td", "cell")) == 3 * layers
    assert any("loss, nats per token against step" in said for said in shown.said)
    for tag, attributes in shown.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")
        assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & set(attributes)


def test_errors_of_weights_are_those_of_the_loaded_models(dense, packed):
    before, after = rs.from_pretrained(dense), rs.from_pretrained(packed)
    found = errors.weight_errors(packed, dense_files.DenseFiles(dense))
    for name, error in found.items():
        own, other = after.get_submodule(name).weight, before.get_submodule(name).weight
        assert error == pytest.approx(metrics.nmse(own, other), rel=1e-6)


def test_errors_of_outputs_are_the_errors_in_the_metric_of_the_input(dense, packed):
    before, after = rs.from_pretrained(dense), rs.from_pretrained(packed)
    tokens = torch.randint(1, 16, (6, 16), generator=torch.Generator().manual_seed(1))
    with rs.accuracy("exact"):
        found = errors.output_errors(after, before, tokens)
    stage = blocks.Stage("", before, [blocks.Call((tokens,))])
    assert len(found) == 14
    for name, error in found.items():
        layer = before.get_submodule(name)
        hessian = blocks.input_hessian(stage, layer)
        w, q = layer.weight.detach().double(), after.get_submodule(name).weight.double()
        # Sums of float32 products in another order.
        assert error == pytest.approx(metrics.hessian_nmse(q, w, hessian), rel=1e-4)


def test_sizes_add_up_to_the_files(dense, packed):
    found = report.measure(report.Request(packed, dense), progress=False)
    tensors = load_file(packed / "model.safetensors")
    assert sum(s.after for s in found.sizes) == sum(t.nbytes for t in tensors.values())
    tensors = load_file(dense / "model.safetensors")
    assert sum(s.before for s in found.sizes) == sum(t.nbytes for t in tensors.values())
    # Everything is float16, so that the estimate without the dense files is the truth.
    assert report.measure(report.Request(packed), progress=False).sizes == found.sizes
    assert [s.group for s in found.sizes] == ["MLP", "attention", "embeddings", "norms"]


def test_without_dense_model_and_text_the_page_says_so(packed, tmp_path):
    found = report.report_directory(report.Request(packed), tmp_path / "p.html", progress=False)
    shown = page(tmp_path / "p.html")
    assert not found.errors
    assert found.quality is None
    for words in ("--reference", "--text", "--bench", "--training", "the same tensors in float16"):
        assert words in shown.text, words
    assert len(shown.every("td", "cell")) == 14  # the bits


def test_the_same_directory_gives_the_same_bytes(dense, packed, log, tmp_path):
    for name in ("a.html", "b.html"):
        report.report_directory(
            full(dense, packed, training=[log]), tmp_path / name, progress=False
        )
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "Date" not in page(tmp_path / "a.html").text


def test_speed_is_measured_on_the_models_own_shapes(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring.bench.contenders, "cache_bytes", lambda *_: 1 << 16)
    found = report.report_directory(
        report.Request(packed, bench=True), tmp_path / "p.html", progress=False
    )
    assert {r.shape for r in found.speed} == {(64, 64), (96, 64), (64, 96)}
    assert len(found.speed) == 3 * 2 * 3  # shapes, batches, two of torch and the codec
    assert "times as fast as torch float32" in page(tmp_path / "p.html").text


def test_a_dense_model_in_shards_or_turned_is_read_all_the_same(dense, packed, tmp_path):
    whole = errors.weight_errors(packed, dense_files.DenseFiles(dense))
    tensors = load_file(dense / "model.safetensors")
    names, places = sorted(tensors), {}
    for i, part in enumerate((names[:7], names[7:])):
        own = {}
        for name in part:
            # As a base model's file of GPT-2: without the first part, and (in, out).
            turned = tensors[name].t().contiguous() if "mlp" in name else tensors[name]
            own[name.removeprefix("model.")] = turned
        save_file(own, tmp_path / f"part-{i}.safetensors")
        places |= dict.fromkeys(own, f"part-{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert errors.weight_errors(packed, dense_files.DenseFiles(tmp_path)) == whole
    for wrong in ("../outside.safetensors", "..", "", 3):
        index.write_text(json.dumps({"weight_map": {"a": wrong}}))
        with pytest.raises(ValueError, match="no file name"):
            dense_files.DenseFiles(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        dense_files.DenseFiles(tmp_path)


def test_layers_that_the_dense_model_does_not_have_are_named(dense, packed, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    tensors = load_file(dense / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file({**tensors, "else": gone}, other / "model.safetensors")
    found = report.report_directory(
        report.Request(packed, other), tmp_path / "p.html", progress=False
    )
    assert len(found.errors) == 13
    text = page(tmp_path / "p.html").text
    assert "no weight by these names: model.layers.1.mlp.up_proj." in text


def test_a_damaged_file_is_reported_not_raised(dense, packed, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(packed, broken)
    file = broken / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    argv = ["report", broken, "--reference", dense, "--text", dense / "text.txt"]
    code = cli.main([str(a) for a in [*argv, "--out", tmp_path / "p.html"]])
    assert code == 1
    text = page(tmp_path / "p.html").text
    assert "damaged" in text
    assert "its sha256 is not the recorded one" in text
    assert "The file is damaged" in capsys.readouterr().out


def test_the_command_prints_what_it_found(dense, packed, log, tmp_path, capsys):
    argv = [
        "report", packed, "--reference", dense, "--text", dense / "text.txt", "--context", "16",
        "--tokens", "160", "--training", log, log, "--out", tmp_path / "new" / "p.html", "--json",
    ]  # fmt: skip
    assert cli.main([str(a) for a in argv]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["errors"]) == 14
    assert found["quality"]["packed"]["perplexity"] > 1
    assert len(found["logs"][1]["training"]["losses"]) == 3
    assert page(tmp_path / "new" / "p.html").text
    assert cli.main([str(a) for a in [*argv[:2], "--out", tmp_path / "q.html"]]) == 0
    assert f"saved       {tmp_path / 'q.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d, p, t: ["report", t / "gone"], "there is no such directory"),
        (lambda d, p, t: ["report", d], "this model is dense"),
        (lambda d, p, t: ["report", p, "--reference", p], "must be a dense model"),
        (lambda d, p, t: ["report", p, "--reference", t / "gone"], "no such"),
        (lambda d, p, t: ["report", p, "--out", t], "this is a directory"),
        (lambda d, p, t: ["report", p, "--text", t / "gone.txt"], "there is no such file"),
        (lambda d, p, t: ["report", p, "--training", t / "gone.json"], "there is no such file"),
    ],
)
def test_what_cannot_be_is_one_sentence(change, words, dense, packed, tmp_path, capsys):
    argv = [str(a) for a in change(dense, packed, tmp_path)]
    argv += [] if "--out" in argv else ["--out", str(tmp_path / "p.html")]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "3", '{"losses": 3}', '{"losses": ["a"]}', '{"training": null}',
        '{"losses": [], "blocks": [{}]}', '{"losses": [], "seconds": "x"}',
        '{"losses": [1], "before": 3}', '{"losses": [1], "after": {"perplexity": "x"}}',
    ],
)  # fmt: skip
def test_a_log_that_is_none_is_refused_in_one_sentence(text, tmp_path):
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"log\.json: "):
        report.Log.read(path)


def test_a_log_may_be_a_bare_report_and_hold_null_for_infinity(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('{"losses": [1.5, null, 0.5], "tokens": 9}')
    log = report.Log.read(path)
    assert log.training.losses[::2] == [1.5, 0.5]
    assert log.training.tokens == 9
    assert log.before is None
    assert math.isnan(log.training.losses[1])
