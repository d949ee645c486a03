"""Calibrated compression block by block: the bytes of the way in memory, kills, and its memory."""

import contextlib
import gc
from pathlib import Path
from types import SimpleNamespace

import kills
import pytest
import torch
from test_streaming import CODEC, content, interrupt_after, tensors
from torch import nn

import reality_stone as rs
from reality_stone import hf, jobs
from reality_stone.blocks import Call
from reality_stone.shards import WEIGHTS
from reality_stone.streaming import (
    NeedsWholeModel,
    calibrated,
    compress_checkpoint,
    journal,
)
from reality_stone.streaming import compress as streaming_compress
from reality_stone.streaming.team import Team

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(10 * 12).view(10, 12) * 7 % 61  # the last batch of 4 is smaller
SIZES = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def saved(kind: str, directory: Path, dtype=torch.float16, shard="1GB", **settings) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return saved("Llama", tmp_path_factory.mktemp("models") / "dense", num_hidden_layers=3)


def compress(source, target, codec=CODEC, **settings):
    settings = {"calibration": TOKENS, "batch": 4} | settings
    return compress_checkpoint(source, target, codec=codec, progress=False, **settings)


def in_memory(source: Path, target: Path, codec: str = CODEC, **settings) -> rs.Report:
    model = hf.from_pretrained(source)
    report = rs.compress(
        model, calibration=TOKENS, codec=codec, batch=4, progress=False, **settings
    )
    rs.save(model, target, dense_dtype=hf.source_dtype(source))
    return report


def agree(source: Path, directory: Path, codec: str = CODEC, **settings) -> rs.Report:
    ours = compress(source, directory / "ours", codec, **settings)
    theirs = in_memory(source, directory / "theirs", codec, **settings)
    got, wanted = (directory / name / WEIGHTS for name in ("ours", "theirs"))
    assert got.read_bytes() == wanted.read_bytes()
    assert {r.name: r.hessian_error for r in ours.layers} == {
        r.name: r.hessian_error for r in theirs.layers
    }
    assert ours.skipped == theirs.skipped
    return ours


@pytest.mark.parametrize("codec", [CODEC, "trellis(bits=2, search=fast)"])
def test_the_weights_are_those_of_a_model_calibrated_in_memory(codec, dense, tmp_path):
    report = agree(dense, tmp_path, codec, seed=5)
    assert len(report.layers) == 21
    assert all(layer.hessian_error is not None for layer in report.layers)
    compress(dense, tmp_path / "other", codec, seed=5, calibration=TOKENS[:, :5])
    other = (tmp_path / "other" / WEIGHTS).read_bytes()
    assert other != (tmp_path / "ours" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        ("Qwen3", torch.float32, {"head_dim": 16, "tie_word_embeddings": True}),
        ("Mixtral", torch.bfloat16, {"num_local_experts": 4}),
        ("GptOss", torch.float16, {"num_local_experts": 4, "head_dim": 32}),  # transposed experts
        ("GPT2", torch.float16, {}),  # transposed layers
    ],
)
def test_so_are_those_of_other_models(kind, dtype, settings, tmp_path):
    agree(saved(kind, tmp_path / "dense", dtype, **settings), tmp_path)


def test_plans_embeddings_and_shared_tables_are_those_of_compress(dense, tmp_path):
    plan = [
        ("model.embed_tokens", "uniform(bits=8)"), ("*.q_proj", "palette"),
        ("*.[kv]_proj", "ultra(codebook=model)"), ("*.1.mlp.*", None),
    ]  # fmt: skip
    report = agree(dense, tmp_path, plan=plan, skip=["*.o_proj"])
    assert len(report.layers) == 1 + 9 + 6
    ends = ("k_proj.codebook", "v_proj.codebook")
    shared = [name for name in tensors(tmp_path / "ours") if name.endswith(ends)]
    assert len(shared) == 1


def test_blocks_may_lie_in_several_shards(dense, tmp_path):
    source = saved("Llama", tmp_path / "sharded", shard="100KB", num_hidden_layers=3)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    compress(source, tmp_path / "o")
    in_memory(dense, tmp_path / "wanted")
    got, wanted = tensors(tmp_path / "o"), tensors(tmp_path / "wanted")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in got)


def live() -> int:
    """Bytes of all tensors that hold any."""
    found = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, nn.Parameter) and not one.is_meta:
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_one_dense_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    layers, hidden = 8, TOKENS.numel() * 64 * 4
    source = saved("Llama", tmp_path / "dense", num_hidden_layers=layers)
    block = 4 * (4 * 64 * 64 + 3 * 64 * 96)
    before, most = live(), []
    real = journal.Journal.add

    def add(self, packed, layer, *args):
        if layer.endswith("q_proj"):  # the first of its block
            most.append(live() - before)
        return real(self, packed, layer, *args)

    monkeypatch.setattr(journal.Journal, "add", add)
    compress(source, tmp_path / "o")
    # Its codes are there too; second moments are float64. The rest is masks, positions and buffers.
    bound = block + block // 4 + hidden + 3 * 8 * 96 * 96 + 50_000
    assert len(most) == layers
    assert block < max(most) < bound < layers * block / 2


# --- going on ---


def test_runs_killed_at_any_moment_go_on_to_the_same_bytes(dense):
    found = kills.run(dense, "--times", "2", "--steps", "3", "--codec", CODEC, "--windows", "8")
    assert len(found) == 5
    for run in found:
        assert run["killed"], run
        assert not run["differ"], run
        assert not run["left"], run
    assert len({run["kept"] for run in found}) > 2


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("whole") / "o"
    compress(dense, target)
    return content(target)


def interrupted_after(count: int, source: Path, target: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
            compress(source, target)
    return target.with_name(f"{target.name}.partial")


def test_no_layer_is_encoded_and_no_finished_block_is_run_again(
    dense, whole, tmp_path, monkeypatch
):
    place = interrupted_after(16, dense, tmp_path / "o")
    assert journal.kept_hidden(place)[0] == 2
    loaded = []
    real = calibrated.Weights.block

    def block(self, name):
        loaded.append(name)
        return real(self, name)

    monkeypatch.setattr(calibrated.Weights, "block", block)
    interrupt_after(monkeypatch, 5)  # no more than what was left
    report = compress(dense, tmp_path / "o", resume=True)
    assert len(report.layers) == 21
    assert loaded == ["model.layers.0", "model.layers.2"]  # the first to see how blocks return
    assert content(tmp_path / "o") == whole


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda place: (place / journal.HIDDEN).unlink(),
        lambda place: damage(place / journal.HIDDEN, -5),
        lambda place: (place / journal.HIDDEN).write_bytes(b"half a file"),
        lambda place: damage(place / "00000-00000.bin", 3000),  # a layer of a finished block
    ],
)
def test_what_the_disk_has_changed_is_computed_again(harm, dense, whole, tmp_path):
    harm(interrupted_after(16, dense, tmp_path / "o"))
    compress(dense, tmp_path / "o", resume=True)
    assert content(tmp_path / "o") == whole


def test_layers_of_a_shard_that_is_complete_are_encoded_again_if_others_need_them(tmp_path):
    source = saved("Llama", tmp_path / "dense", shard="100KB", num_hidden_layers=3)
    compress(source, tmp_path / "whole")
    target, place = tmp_path / "o", tmp_path / "o.partial"
    with pytest.MonkeyPatch.context() as patch:
        real = journal.append_line

        def append(path, value):
            real(path, value)
            if path.name == journal.SHARDS:
                raise KeyboardInterrupt

        patch.setattr(journal, "append_line", append)
        with pytest.raises(KeyboardInterrupt):
            compress(source, target)
    parts = sorted(place.glob("*.bin"))
    assert len(parts) > 1
    parts[0].unlink()  # as the next step would
    (place / journal.HIDDEN).unlink()
    damage(parts[-1], 10)
    compress(source, target, resume=True)
    assert content(target) == content(tmp_path / "whole")


def test_a_run_goes_on_only_with_the_same_calibration(dense, whole, tmp_path):
    interrupted_after(16, dense, tmp_path / "o")
    for settings in ({"calibration": TOKENS + 1}, {"calibration": None}, {"batch": 5}):
        with pytest.raises(ValueError, match="other settings"):
            compress(dense, tmp_path / "o", resume=True, **settings)
    compress(dense, tmp_path / "o", resume=True)
    assert content(tmp_path / "o") == whole


# --- models that cannot ---


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, hidden, *others):
        return hidden + self.linear(hidden)


class Net(nn.Module):
    """Blocks get what `extra` makes of what comes before them."""

    def __init__(self, extra=lambda hidden, state: None, count=3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.extra = extra

    def forward(self, x):
        state = {}
        for layer in self.layers:
            x = layer(x, self.extra(x, state))
        return x


def tried(net: nn.Module) -> None:
    names = [f"layers.{i}.linear" for i in range(len(net.layers))]
    targets = [SimpleNamespace(entry=SimpleNamespace(name=name)) for name in names]
    layout = SimpleNamespace(targets=targets, recipes={}, directory="here")
    calibrated._try(layout, net, Call((torch.randn(2, 64),)))


def test_blocks_that_depend_on_more_than_hidden_states_need_the_whole_model():
    tried(Net())
    tried(Net(lambda hidden, state: (True, torch.ones(3))))
    shared, pair = Net(), Net()
    shared.layers[1].norm = shared.layers[0].norm = nn.Identity()
    pair.layers[0].forward = lambda hidden, other: (hidden, hidden)
    between = Net()
    between.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    cases = {
        "depend on the blocks before": Net(lambda hidden, state: hidden.mean()),
        "used in more than one block": shared, "return more": pair, "pass on more": between,
        "no blocks": Net(count=1),
    }  # fmt: skip
    for words, net in cases.items():
        with pytest.raises(NeedsWholeModel, match=f"here: .*{words}"):
            tried(net)
    with pytest.raises(NeedsWholeModel, match="depend on"):  # what blocks may write to
        tried(Net(lambda hidden, state: state))


def test_such_models_are_compressed_in_memory_and_the_user_is_told(tmp_path, monkeypatch):
    source = saved("Bloom", tmp_path / "dense", n_head=4, n_layer=2)
    monkeypatch.setattr(jobs, "_windows", lambda *_: TOKENS)
    run = jobs.Calibration("text", seed=0)
    with pytest.raises(ValueError, match="no run to go on with"):
        jobs.compress_directory(source, tmp_path / "o", 4, CODEC, run, resume=True, progress=False)
    with pytest.warns(UserWarning, match="needs the whole model in memory: its blocks return more"):
        jobs.compress_directory(source, tmp_path / "o", 4, CODEC, run, progress=False)
    model = hf.from_pretrained(source)
    rs.compress(model, calibration=TOKENS, codec=CODEC, progress=False)
    rs.save(model, tmp_path / "wanted", dense_dtype=torch.float16)
    got, wanted = (tmp_path / name / WEIGHTS for name in ("o", "wanted"))
    assert got.read_bytes() == wanted.read_bytes()


def test_layers_outside_the_blocks_need_the_whole_model(dense, tmp_path):
    with pytest.raises(NeedsWholeModel, match="'lm_head' is calibrated outside the blocks"):
        compress(dense, tmp_path / "o", plan=[("lm_head", CODEC)])
    assert not list(tmp_path.iterdir())


def test_tokens_without_a_row_and_several_processes_are_refused(dense, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="gives token 160, the model knows 160"):
        compress(dense, tmp_path / "o", calibration=torch.full((1, 4), 160))

    class Two(Team):
        def each(self, work):
            return work()

    monkeypatch.setattr(streaming_compress, "team", lambda: contextlib.nullcontext(Two(0, 2)))
    with pytest.raises(ValueError, match="start one process"):
        compress(dense, tmp_path / "o")
    assert not list(tmp_path.iterdir())
