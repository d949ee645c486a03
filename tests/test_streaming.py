"""Compressing tensor by tensor: the bytes of the way in memory, kills, full disks, and back."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import kills
import pytest
import torch

import reality_stone as rs
from reality_stone import checkpoint, cli, inspection, shards, tensorfile
from reality_stone.codecs import REGISTRY
from reality_stone.shards import INDEX, WEIGHTS
from reality_stone.streaming import compress_checkpoint, decompress_checkpoint, encoding, journal
from reality_stone.streaming.layout import plan_layout
from reality_stone.streaming.team import Team

CODEC = "uniform(bits=4, group=16)"
TOKENS = torch.arange(20)[None]


def llama(**settings):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{
        "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    } | settings)  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).half()


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "dense"
    llama().save_pretrained(directory)
    (directory / "vocab.txt").write_text("words")
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "sharded"
    llama().save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) == 2
    return directory


@pytest.fixture(scope="module")
def matrices(tmp_path_factory) -> Path:
    """Tensors with names that transformers knows nothing of, in two shards."""
    directory = tmp_path_factory.mktemp("models") / "matrices"
    directory.mkdir()
    torch.manual_seed(0)
    names = {}
    for k in range(2):
        own = {f"layers.{i}.{n}.weight": torch.randn(64, 80).half() for i in (2 * k, 2 * k + 1)
               for n in "abc"}  # fmt: skip
        own |= {f"layers.{2 * k}.a.bias": torch.randn(64), f"layers.{k}.norm": torch.ones(64)}
        own |= {"embed.weight": torch.randn(100, 64).bfloat16()} if k else {}
        file = shards.shard_name(k, 2)
        tensorfile.write(directory / file, own, {})
        names |= dict.fromkeys(own, file)
    (directory / INDEX).write_text(shards.index_text(names, 0))
    (directory / "config.json").write_text("{}")
    return directory


def compress(source, target, codec=CODEC, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*config.json has no model_type")
        return compress_checkpoint(source, target, codec=codec, progress=False, **settings)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    header = shards.read(directory)
    return {name: tensorfile.read_tensor(header, e) for name, e in header.entries.items()}


def in_memory(source: Path, target: Path, codec: str, **settings) -> torch.nn.Module:
    """The same by rs.compress and rs.save."""
    from reality_stone import hf

    model = hf.from_pretrained(source)
    rs.compress(model, codec=codec, progress=False, **settings)
    rs.save(model, target, dense_dtype=hf.source_dtype(source))
    return model


@pytest.mark.parametrize("codec", [CODEC, "trellis(bits=2, search=fast)", "sparse(percent=5)"])
def test_the_weights_are_those_of_a_model_compressed_in_memory(codec, dense, sharded, tmp_path):
    in_memory(dense, tmp_path / "wanted", codec)
    report = compress(dense, tmp_path / "one", codec)
    assert len(report.layers) == 14
    assert set(report.skipped) == {"lm_head"}
    wanted = (tmp_path / "wanted" / WEIGHTS).read_bytes()
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == wanted
    compress(sharded, tmp_path / "two", codec)
    ours, theirs = tensors(tmp_path / "two"), tensors(tmp_path / "wanted")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    loaded = [rs.from_pretrained(tmp_path / name) for name in ("one", "two")]
    with torch.no_grad():
        assert torch.equal(*(model(TOKENS).logits for model in loaded))


def test_a_table_that_layers_share_is_stored_once_and_counted_once(tmp_path):
    from reality_stone import hf

    codec, source = "ultra(codebook=model)", tmp_path / "dense"
    llama(num_hidden_layers=1).save_pretrained(source, max_shard_size="30KB")
    plan = [("*.[qk]_proj", codec), ("*", None)]
    ours = compress(source, tmp_path / "o", plan=plan)
    model = hf.from_pretrained(source)
    theirs = rs.compress(model, plan=plan, progress=False)
    rs.save(model, tmp_path / "wanted", dense_dtype=torch.float16)
    found, wanted = tensors(tmp_path / "o"), tensors(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    assert sum(name.endswith("codebook") for name in found) == 1
    assert all(torch.equal(found[n], wanted[n]) for n in found)
    loaded = rs.from_pretrained(tmp_path / "o").model.layers[0].self_attn
    assert loaded.q_proj.codebook is loaded.k_proj.codebook
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert (a.name, a.shape, a.codec) == (b.name, b.shape, b.codec)
        # Sums of the same sizes in another order.
        assert a.bits_per_weight == pytest.approx(b.bits_per_weight, rel=1e-12)
        assert a.error == pytest.approx(b.error, rel=1e-6)  # float32 differences, float64 sums
    back = decompress_checkpoint(tmp_path / "o", tmp_path / "back", progress=False)
    assert back.layers == 2
    decoded = rs.dequantize(rs.from_pretrained(tmp_path / "o"), torch.float16).state_dict()
    assert all(torch.equal(t, decoded[n].half()) for n, t in tensors(tmp_path / "back").items())


def test_seed_plan_and_skip_are_those_of_compress(dense, tmp_path):
    settings = {
        "seed": 3, "skip": ["*.0.mlp.*"],
        "plan": [("*.q_proj", "palette"), ("*.o_proj", None), ("lm_head", CODEC)],
    }  # fmt: skip
    in_memory(dense, tmp_path / "wanted", CODEC, **settings)
    report = compress(dense, tmp_path / "o", **settings)
    assert "lm_head" in {layer.name for layer in report.layers}
    wanted = (tmp_path / "wanted" / WEIGHTS).read_bytes()
    assert (tmp_path / "o" / WEIGHTS).read_bytes() == wanted


def test_rows_of_some_codecs_are_encoded_alone():
    alone = {name for name, kind in REGISTRY.items() if encoding.rows_are_alone(kind(), (64, 64))}
    assert {"uniform", "sparse", "adaptive_precision"} <= alone
    assert not alone & {"trellis", "palette", "ultra", "hybrid"}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_rows_encoded_alone_are_those_of_the_whole_matrix(name, tmp_path, monkeypatch):
    codec, shape = REGISTRY[name](), (150, 200)
    if not encoding.rows_are_alone(codec, shape):
        pytest.skip("rows are encoded together")
    tensorfile.write(tmp_path / WEIGHTS, {"a.weight": torch.randn(shape).bfloat16()}, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="no model_type"):
        (target,) = plan_layout(tmp_path, 2, codec).targets
    monkeypatch.setattr(encoding, "SLAB", 200 * 37)
    packed, error = encoding.encode(target, 0, {})
    whole = codec.encode(target.weight.read().float())
    assert torch.equal(packed.codes, whole.codes)
    assert all(torch.equal(packed.params[n], whole.params[n]) for n in whole.params)
    wanted = rs.metrics.nmse(whole.decode(), target.weight.read().float())
    assert error == pytest.approx(wanted, rel=1e-6)  # float32 differences, float64 sums


def test_what_stays_dense_keeps_its_bits_and_dtype(matrices, tmp_path):
    with pytest.warns(UserWarning, match="no model_type; every matrix of at least 4096"):
        report = compress_checkpoint(matrices, tmp_path / "o", codec=CODEC, progress=False)
    assert [layer.name for layer in report.layers] == [
        f"layers.{i}.{n}" for i in range(4) for n in "abc"
    ]
    assert set(report.skipped) == {"embed"}
    ours, theirs = tensors(tmp_path / "o"), tensors(matrices)
    for name in ("embed.weight", "layers.0.a.bias", "layers.1.norm"):
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])
    for name in ("embed.weight", "layers.0.a.codes", "layers.1.c.scale"):
        header = shards.read(tmp_path / "o")
        number = 1 if name.startswith("embed") else 0
        assert header.entries[name].path.name == shards.shard_name(number, 2)


def test_without_transformers_names_decide(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.warns(UserWarning, match=r"pip install reality-stone\[hf\]"):
        report = compress_checkpoint(dense, tmp_path / "o", codec=CODEC, progress=False)
    monkeypatch.undo()
    assert {layer.name for layer in report.layers} == {
        layer.name for layer in compress(dense, tmp_path / "p").layers
    }
    rs.from_pretrained(tmp_path / "o")


def test_the_directory_is_complete(sharded, tmp_path):
    (sharded / "vocab.txt").write_text("words")
    compress(sharded, tmp_path / "o")
    found = content(tmp_path / "o")
    assert {"vocab.txt", "generation_config.json", "README.md", INDEX} < set(found)
    config = json.loads(found["config.json"])
    quantization = config.pop("quantization_config")
    assert config == json.loads((sharded / "config.json").read_text())
    assert len(quantization["plan"]) == 14
    manifest = json.loads(found["manifest.json"])
    assert sorted(manifest["files"]) == sorted(n for n in found if n.endswith(".safetensors"))
    for name, digest in manifest["files"].items():
        assert hashlib.sha256(found[name]).hexdigest() == digest
    header = shards.read(tmp_path / "o")
    assert header.digests == {n: t["sha256"] for n, t in manifest["tensors"].items()}
    codes = manifest["tensors"]["model.layers.0.mlp.up_proj.codes"]
    assert codes["sources"] == ["model.layers.0.mlp.up_proj.weight"]
    assert codes["codec"] == checkpoint.read_plan(Path(), quantization)[0].codec.spec
    assert inspection.inspect(tmp_path / "o", progress=False).sound
    assert not [p for p in tmp_path.iterdir() if p.name != "o"]
    # A later save replaces all of it, the manifest too.
    rs.save(rs.from_pretrained(tmp_path / "o"), tmp_path / "o")
    assert not (tmp_path / "o" / "manifest.json").exists()


def test_names_without_the_prefix_of_the_model_find_their_place(dense, tmp_path):
    stripped = tmp_path / "stripped"
    stripped.mkdir()
    (stripped / "config.json").write_bytes((dense / "config.json").read_bytes())
    found = {n.removeprefix("model."): t for n, t in tensors(dense).items()}
    tensorfile.write(stripped / WEIGHTS, found | {"rotary.inv_freq": torch.ones(3)}, {})
    compress(stripped, tmp_path / "a")
    compress(dense, tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["left_out"] == ["rotary.inv_freq"]


def test_experts_in_files_one_by_one_are_read_and_encoded_one_by_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    torch.manual_seed(0)
    source = tmp_path / "dense"
    transformers.MixtralForCausalLM(config).half().save_pretrained(source, max_shard_size="40KB")
    assert any("experts.1.w2" in name for name in tensors(source))
    settings = {"skip": ["*.up_proj.0", "*down_proj.1"]}
    report = compress(source, tmp_path / "o", **settings)
    assert sum(".experts." in layer.name for layer in report.layers) == 5
    in_memory(source, tmp_path / "wanted", CODEC, **settings)
    ours, theirs = tensors(tmp_path / "o"), tensors(tmp_path / "wanted")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    name = next(n for n in manifest["tensors"] if n.endswith("experts.gate_up_proj.2.codes"))
    assert [n.split(".")[-3:] for n in manifest["tensors"][name]["sources"]] == [
        ["2", "w1", "weight"], ["2", "w3", "weight"],
    ]  # fmt: skip
    packed = rs.from_pretrained(tmp_path / "o")
    back = decompress_checkpoint(tmp_path / "o", tmp_path / "back", progress=False)
    assert back.layers == len(report.layers)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="float32")
    state = rs.dequantize(packed, torch.float32).state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n].half().float()) for n, t in model.state_dict().items())


def test_experts_that_are_stored_transposed_come_back_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=80, num_hidden_layers=1, head_dim=32,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    source = tmp_path / "dense"
    transformers.GptOssForCausalLM(config).half().save_pretrained(source)
    settings = {"skip": ["*_proj.1"]}
    report = compress(source, tmp_path / "o", **settings)
    assert sum(".experts." in layer.name for layer in report.layers) == 4
    in_memory(source, tmp_path / "wanted", CODEC, **settings)
    wanted = (tmp_path / "wanted" / WEIGHTS).read_bytes()
    assert (tmp_path / "o" / WEIGHTS).read_bytes() == wanted
    packed = rs.from_pretrained(tmp_path / "o")
    decompress_checkpoint(tmp_path / "o", tmp_path / "back", torch.float32, progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="float32")
    state = rs.dequantize(packed, torch.float32).state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_the_transposed_layers_of_gpt2_are_encoded_and_come_back_transposed(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    source = tmp_path / "dense"
    transformers.GPT2LMHeadModel(config).half().save_pretrained(source)
    report = compress(source, tmp_path / "o")
    assert len(report.layers) == 4
    in_memory(source, tmp_path / "wanted", CODEC)
    wanted = (tmp_path / "wanted" / WEIGHTS).read_bytes()
    assert (tmp_path / "o" / WEIGHTS).read_bytes() == wanted
    packed = rs.from_pretrained(tmp_path / "o")
    decompress_checkpoint(tmp_path / "o", tmp_path / "back", torch.float32, progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="float32")
    state = rs.dequantize(packed, torch.float32).state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_an_encoder_is_built_as_its_config_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "o")
    rs.compress(model, codec=CODEC, progress=False)
    other = rs.load(transformers.BertModel(config).eval(), tmp_path / "o")
    with torch.no_grad():
        wanted, got = (m(TOKENS).last_hidden_state for m in (model, other))
    assert torch.equal(wanted, got)


def refused(source: Path, target: Path, *words: str, **settings) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        compress(source, target, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not target.exists() or not any(target.iterdir())


def test_sources_that_cannot_be_compressed_are_refused_in_one_sentence(dense, tmp_path):
    refused(tmp_path / "nothing", tmp_path / "o", "nothing", "no such directory")
    compress(dense, tmp_path / "packed")
    refused(tmp_path / "packed", tmp_path / "o", "already compressed")
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((dense / "config.json").read_text())
    found = tensors(dense)
    name = "model.layers.1.mlp.up_proj.weight"

    def give(change=lambda: None, **settings):
        (broken / "config.json").write_text(json.dumps(config | settings))
        changed = dict(found)
        change(changed)
        tensorfile.write(broken / WEIGHTS, changed, {})

    give(lambda t: None, quantization_config={"quant_method": "gptq"})
    refused(broken, tmp_path / "o", "already compressed", "'gptq'")
    give(lambda t: t.pop(name))
    refused(broken, tmp_path / "o", name, "missing")
    give(lambda t: t.update({name: t[name][1:]}))
    refused(broken, tmp_path / "o", name, "[95, 64]", "[96, 64]")
    give(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refused(broken, tmp_path / "o", "differ", "tie_word_embeddings")
    bad = found[name].clone()
    bad[70, 3] = float("nan")
    give(lambda t: t.update({name: bad}))
    refused(broken, tmp_path / "o", "layers.1.mlp.up_proj", "not finite at (70, 3)")
    give(lambda t: t.update({name: t[name].to(torch.int8)}))
    refused(broken, tmp_path / "o", name, "int8")
    # What was done before the NaN is kept.
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == ["o.partial"]


# --- going on ---


def test_runs_killed_at_any_moment_go_on_to_the_same_bytes(matrices):
    found = kills.run(matrices, "--times", "20", "--steps", "12", "--codec", CODEC)
    assert len(found) == 32
    for run in found:
        assert run["killed"], run
        assert not run["differ"], run
        assert not run["left"], run
    assert len({run["kept"] for run in found}) > 4


def interrupt_after(monkeypatch, count: int, error=KeyboardInterrupt) -> None:
    """Stop the run when it is about to keep one layer more than `count`."""
    real, left = journal.Journal.add, [count]

    def add(*args, **more):
        if left[0] == 0:
            raise error
        left[0] -= 1
        return real(*args, **more)

    monkeypatch.setattr(journal.Journal, "add", add)


def test_a_run_goes_on_with_what_is_kept_only_where_nothing_has_changed(
    matrices, tmp_path, monkeypatch
):
    target, place = tmp_path / "o", tmp_path / "o.partial"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt, match=r"o\.partial; the same call with --resume"):
            compress(matrices, target)
    before = content(place)
    refused(matrices, target, "unfinished run is kept here", "--resume")
    refused(matrices, target, "other settings", resume=True, codec="uniform(bits=3)")
    refused(matrices, target, "other settings", resume=True, seed=1)
    shard = matrices / shards.shard_name(0, 2)
    was = shard.stat()
    os.utime(shard, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    refused(matrices, target, "source was another", resume=True)
    os.utime(shard, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert content(place) == before
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12 - 5)  # no more than what was left
        compress(matrices, target, resume=True)
    assert not place.exists()
    compress(matrices, tmp_path / "whole")
    assert content(target) == content(tmp_path / "whole")


def test_kept_layers_that_the_disk_has_changed_are_encoded_again(matrices, tmp_path, monkeypatch):
    compress(matrices, tmp_path / "whole")
    for name, at in (("00000-00000.bin", 3000), ("00000.jsonl", 900), ("00000.jsonl", -9)):
        target, place = tmp_path / "o", tmp_path / "o.partial"
        with monkeypatch.context() as patch:
            interrupt_after(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                compress(matrices, target)
        data = bytearray((place / name).read_bytes())
        data[at] ^= 1
        (place / name).write_bytes(data + b"\0half a record")
        compress(matrices, target, resume=True)
        assert content(target) == content(tmp_path / "whole")
        checkpoint.shutil.rmtree(target)


def test_resume_without_a_run_is_a_run(matrices, tmp_path):
    compress(matrices, tmp_path / "o", resume=True)
    compress(matrices, tmp_path / "o", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial" / "thesis.txt").write_text("years of work")
    refused(matrices, tmp_path / "p", "not an unfinished run", resume=True)
    assert (tmp_path / "p.partial" / "thesis.txt").exists()


def test_two_processes_do_not_work_on_one_run(matrices, tmp_path, monkeypatch):
    messages = []

    def add(*args, **more):
        with pytest.raises(ValueError, match="another process is at work") as caught:
            compress(matrices, tmp_path / "o", resume=True)
        messages.append(str(caught.value))
        raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "add", add)
    with pytest.raises(KeyboardInterrupt):
        compress(matrices, tmp_path / "o")
    assert messages


def test_an_interrupt_gives_130_and_a_full_disk_1_and_both_go_on(
    dense, tmp_path, monkeypatch, capsys
):
    argv = ["compress", str(dense), str(tmp_path / "o"), "--codec", CODEC]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert cli.main(argv) == 130
    assert "o.partial; the same call with --resume goes on" in capsys.readouterr().err
    for error in (OSError(28, "No space left on device"), PermissionError(30, "Read-only")):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2, error)
            assert cli.main([*argv, "--resume"]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert error.strerror in err
        assert "--resume goes on" in err
    assert cli.main([*argv, "--resume"]) == 0
    compress(dense, tmp_path / "whole")
    assert content(tmp_path / "o") == content(tmp_path / "whole")


def test_a_disk_that_is_really_full_gives_one_sentence_and_the_run_goes_on(matrices, tmp_path):
    """A limit on the size of files is met while layers are kept, and later by a shard."""
    whole = tmp_path / "whole"
    compress(matrices, whole)
    limits = (3000, 10_000, max(p.stat().st_size for p in whole.iterdir()) - 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for i, limit in enumerate(limits):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            refused(matrices, tmp_path / "o", "could not be written: File too large", resume=i > 0)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    compress(matrices, tmp_path / "o", resume=True)
    assert content(tmp_path / "o") == content(whole)


# --- several processes ---


def test_work_is_divided_by_size():
    sizes = [5, 9, 1, 1, 8, 3, 4, 4]
    shares = [Team(rank, 3).share(sizes) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert [sum(sizes[i] for i in share) for share in shares] == [12, 12, 11]
    assert Team().share(sizes) == list(range(8))


def test_two_processes_of_torchrun_write_the_same_bytes(matrices, tmp_path):
    compress(matrices, tmp_path / "one")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
           str(20_000 + os.getpid() % 10_000), "-m", "reality_stone", "compress"]  # fmt: skip
    done = subprocess.run(
        [*run, matrices, tmp_path / "two", "--codec", CODEC, "--json"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 12
    assert done.stderr.count("warning: ") == 1
    assert content(tmp_path / "one") == content(tmp_path / "two")


# --- and back ---


def test_a_decompressed_model_is_loaded_by_transformers_alone(sharded, tmp_path):
    transformers = pytest.importorskip("transformers")
    compress(sharded, tmp_path / "o")
    found = decompress_checkpoint(tmp_path / "o", tmp_path / "back", progress=False)
    assert (found.layers, found.dtype, len(found.files)) == (14, "F16", 2)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    packed, dense, back = (rs.dequantize(rs.from_pretrained(tmp_path / "o")), tensors(sharded),
                           tensors(tmp_path / "back"))  # fmt: skip
    assert {n: (t.shape, t.dtype) for n, t in back.items()} == {
        n: (t.shape, t.dtype) for n, t in dense.items()
    }
    state = packed.state_dict()
    assert all(torch.equal(t, state[n].half()) for n, t in back.items())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.dtype == torch.float16
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_dtype_of_decoded_weights_can_be_chosen(dense, tmp_path):
    compress(dense, tmp_path / "o")
    target = tmp_path / "back"
    argv = ["decompress", str(tmp_path / "o"), str(target), "--dtype", "float32", "--json"]
    assert cli.main(argv) == 0
    state = rs.dequantize(rs.from_pretrained(tmp_path / "o"), torch.float32).state_dict()
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(tensors(target)[name], state[name])
    assert tensors(target)["model.norm.weight"].dtype == torch.float16
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"


def test_decompress_refuses_in_one_sentence_and_leaves_nothing(dense, tmp_path, capsys):
    compress(dense, tmp_path / "o")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    whole = (tmp_path / "o" / WEIGHTS).read_bytes()
    for target, words in (("full", "not empty"), ("o", "not empty")):
        assert cli.main(["decompress", str(tmp_path / "o"), str(tmp_path / target)]) == 1
        assert words in capsys.readouterr().err
    assert cli.main(["decompress", str(dense), str(tmp_path / "n")]) == 1
    assert "without quantization_config" in capsys.readouterr().err
    (tmp_path / "o" / WEIGHTS).write_bytes(whole[:-1] + b"\xff")
    assert cli.main(["decompress", str(tmp_path / "o"), str(tmp_path / "n")]) == 1
    assert "damaged" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"o", "full"}
