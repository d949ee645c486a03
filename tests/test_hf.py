"""transformers: packed checkpoints, compression on the fly, saving, training, generating."""

import copy
import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import reality_stone as rs
from reality_stone import checkpoint, registration, tensorfile
from reality_stone.checkpoint import CONFIG, NOTE, WEIGHTS
from reality_stone.inspection import inspect
from reality_stone.nn import Compressed

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
# Class, config and settings of each architecture that is tested.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "bert": ("BertModel", "BertConfig", SMALL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
CODEC = "uniform(bits=4, group=32)"
SHARED = "ultra(codebook=model)"


def build(name: str, **changes) -> nn.Module:
    model, config, settings = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings | changes)
    return getattr(transformers, model)(made).eval()


@pytest.fixture(scope="module", params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def packed_at(tmp_path_factory):
    """(architecture, codec) -> a directory that rs.save wrote."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, codec: str = CODEC) -> Path:
        if (name, codec) not in made:
            model = build(name)
            rs.compress(model, codec=codec, progress=False)
            made[name, codec] = rs.save(model, tmp_path_factory.mktemp(name) / "packed")
        return made[name, codec]

    return get


def auto(name: str) -> type:
    """The class that picks a class by config.json."""
    causal = MODELS[name][0].endswith(("ForCausalLM", "LMHeadModel"))
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel


def load(name: str, directory: Path, **options) -> nn.Module:
    return auto(name).from_pretrained(directory, **options)


def outputs(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(ids)[0]


def layers(model: nn.Module) -> dict[str, Compressed]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Compressed)}


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in directory.iterdir()}


def stored(directory: Path) -> dict[str, torch.Tensor]:
    header = tensorfile.read_header(directory / WEIGHTS)
    with (directory / WEIGHTS).open("rb") as file:
        return {n: tensorfile.read_tensor(header, e, file) for n, e in header.entries.items()}


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy whose tensors have been changed, without the records of what was written."""
    tensors = stored(source)
    change(tensors)
    target.mkdir()
    (target / CONFIG).write_bytes((source / CONFIG).read_bytes())
    tensorfile.write(target / WEIGHTS, tensors, {})
    return target


# --- loading ---


def test_a_packed_checkpoint_loads_as_ours_does(name, packed_at):
    directory = packed_at(name)
    ours, model = rs.from_pretrained(directory), load(name, directory)
    assert type(model) is type(ours)
    assert list(layers(model)) == list(layers(ours)) != []
    assert torch.equal(outputs(model), outputs(ours))
    assert not model.training
    assert all(not t.is_meta for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_and_tables_keep_their_dtypes_whatever_the_model_has(name, packed_at, dtype):
    model = load(name, packed_at(name), dtype=dtype)
    assert model.dtype == dtype
    for layer in layers(model).values():
        assert layer.codes.dtype == torch.uint8
        assert {p.dtype for p in layer.params} == {torch.float32}
        assert layer.bias is None or layer.bias.dtype == dtype
    assert outputs(model).dtype == dtype


def test_tables_that_layers_share_are_one_tensor_after_loading(packed_at):
    directory = packed_at("llama", SHARED)
    ours, model = rs.from_pretrained(directory), load("llama", directory)
    for one in (ours, model):
        assert len({id(layer.codebook) for layer in layers(one).values()}) == 1
    assert torch.equal(outputs(model), outputs(ours))


def test_a_compressed_embedding_and_its_tied_head_load_save_and_stay_one(tmp_path):
    model = build("qwen3")
    rs.compress(model, codec=CODEC, plan=[("*embed_tokens", CODEC)], progress=False)
    rs.save(model, tmp_path / "ours")
    wanted = outputs(model)
    again, info = load("qwen3", tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert again.lm_head.codes is again.model.embed_tokens.codes
    assert torch.equal(outputs(again), wanted)
    again.save_pretrained(tmp_path / "theirs")
    assert list(stored(tmp_path / "theirs")) == list(stored(tmp_path / "ours"))
    for other in (load("qwen3", tmp_path / "theirs"), rs.from_pretrained(tmp_path / "theirs")):
        assert other.lm_head.codes is other.model.embed_tokens.codes
        assert torch.equal(outputs(other), wanted)


def test_loading_reports_no_tensor_as_missing(name, packed_at):
    for codec in (CODEC, SHARED):
        _, info = load(name, packed_at(name, codec), output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "error_msgs"))


def test_shards_load_as_one_file_does(name, packed_at, tmp_path):
    model = load(name, packed_at(name))
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = load(name, tmp_path / "shards")
    assert torch.equal(outputs(again), outputs(model))


def test_a_base_model_and_one_with_a_head_load_from_each_other(packed_at, tmp_path):
    with_head = packed_at("llama")
    base = transformers.AutoModel.from_pretrained(with_head, dtype=torch.bfloat16)
    assert len(layers(base)) == 10  # keys and values are too small
    whole = load("llama", with_head, dtype=torch.bfloat16)
    assert torch.equal(outputs(base), outputs(whole.model))
    assert {p.dtype for p in base.norm.parameters()} == {torch.bfloat16}
    assert {p.dtype for layer in layers(base).values() for p in layer.params} == {torch.float32}
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(outputs(again.model), outputs(base))


def zeros(directory: Path) -> tuple[int, int]:
    """Save a Llama of 152 MB in float32 at 2.25 bits; (bytes when dense, bytes of the file)."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=3072, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    dense = sum(p.nbytes for p in model.parameters())
    # Zeros are codes of this codec, so nothing has to be encoded.
    codec = rs.codec("uniform(bits=2, group=64)")
    found = (
        (n, m.weight.shape) for n, m in model.model.named_modules() if isinstance(m, nn.Linear)
    )
    rs.replace(model, [rs.swap.PlanEntry(f"model.{n}", tuple(s), codec, False) for n, s in found])
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    rs.save(model, directory)
    return dense, (directory / WEIGHTS).stat().st_size


# --- import order, none, and memory ---

FRESH = """
import json, os, sys
from transformers import AutoModelForCausalLM

def kind(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    return type(model.model.layers[0].mlp.up_proj).__name__

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

small, large = sys.argv[1:]
alone = kind(small)
import reality_stone
with_ours, grown = kind(small), None
if os.path.exists("/proc/self/clear_refs"):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = memory("VmRSS")
    AutoModelForCausalLM.from_pretrained(large)
    grown = memory("VmHWM") - before
print(json.dumps({"alone": alone, "with ours": with_ours, "grown": grown}))
"""


@pytest.fixture(scope="module")
def fresh(packed_at, tmp_path_factory) -> dict:
    """What a process sees that imports transformers first, and us only later."""
    large = tmp_path_factory.mktemp("large") / "packed"
    dense, size = zeros(large)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, packed_at("llama"), large], capture_output=True, text=True,
        timeout=300, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"dense": dense, "size": size, "log": done.stderr}


def test_importing_us_after_transformers_is_in_time(fresh):
    assert fresh["with ours"] == "RBELinear"


def test_importing_us_before_transformers_leaves_nothing_behind():
    # As this file does.
    assert not [f for f in sys.meta_path if type(f).__module__.startswith("reality_stone")]
    auto_module = sys.modules["transformers.quantizers.auto"]
    assert "exec_module" not in vars(auto_module.__loader__)
    assert auto_module.AUTO_QUANTIZER_MAPPING["reality_stone"].__module__ == (
        "reality_stone.hf_quantizer"
    )


def test_waiting_for_transformers_survives_an_import_that_fails(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "late_module.py"
    module.write_text("raise RuntimeError('not yet')")
    monkeypatch.setattr(registration, "MODULE", "late_module")
    seen = []
    monkeypatch.setattr(registration, "_register", lambda: seen.append(sys.modules["late_module"]))
    registration.announce()
    registration.announce()
    waiting = sys.meta_path[0]
    assert sum(type(f) is type(waiting) for f in sys.meta_path) == 1
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module("late_module")
    assert not seen
    module.write_text("register_quantizer = None  # and more")
    importlib.invalidate_caches()
    late = importlib.import_module("late_module")
    assert seen == [late]
    assert waiting not in sys.meta_path
    registration.announce()
    assert seen == [late, late]


def test_without_our_import_layers_are_random_and_readme_and_config_say_so(fresh, packed_at):
    assert fresh["alone"] == "Linear"
    assert "Unknown quantization type, got reality_stone" in fresh["log"]
    directory = packed_at("llama")
    assert "without `import reality_stone` it only warns" in (directory / NOTE).read_text()
    note = json.loads((directory / CONFIG).read_text())["quantization_config"]["note"]
    assert note.startswith("import reality_stone before loading")


def test_memory_while_loading_stays_near_the_size_of_the_file(fresh):
    assert fresh["size"] < fresh["dense"] / 10, fresh
    if fresh["grown"] is None:
        pytest.skip("only Linux says how much memory was used at most since some moment")
    # The file mapped to memory and a copy of it; 32 MB for threads and what the allocator keeps.
    assert fresh["grown"] < 2 * fresh["size"] + (32 << 20) < fresh["dense"] / 2


def test_the_config_class_is_there_by_name():
    assert rs.RealityStoneConfig is rs.hf_quantizer.RealityStoneConfig
    assert "RealityStoneConfig" in rs.__all__


@pytest.mark.parametrize(
    "first", ["rs.RealityStoneConfig()", "import reality_stone.hf_quantizer", "rs.from_pretrained"]
)
def test_the_method_is_known_whatever_of_ours_is_touched_first(first):
    program = f"""
import reality_stone as rs
{first}
from transformers.quantizers import auto
assert "reality_stone" in auto.AUTO_QUANTIZER_MAPPING
assert "reality_stone" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
rs.RealityStoneConfig(bits=3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# --- damage ---


def broken(tensors: dict) -> tuple[str, torch.Tensor]:
    name = next(n for n in tensors if n.endswith("o_proj.scale"))
    return name, tensors[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(broken(t)[0]), "o_proj.scale' is missing, the plan needs it"),
        (lambda t: t.update({broken(t)[0]: broken(t)[1][:, :1]}), "needs F16 or F32 or BF16"),
        (lambda t: t.update({broken(t)[0]: broken(t)[1].to(torch.int8)}), "is I8"),
        (lambda t: broken(t)[1].fill_(torch.nan), "o_proj.scale' holds values that are not finite"),
        (lambda t: t.update({"model.x.codes": torch.zeros(1, dtype=torch.uint8)}), "no layer of"),
    ],
)
def test_damage_in_packed_layers_is_one_sentence(change, words, packed_at, tmp_path):
    directory = rewritten(packed_at("llama"), tmp_path / "m", change)
    with pytest.raises(ValueError, match=words) as caught:
        load("llama", directory)
    assert "\n" not in str(caught.value)


def test_codes_that_are_none_are_refused(packed_at, tmp_path):
    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith("down_proj.codes"):
                tensor.fill_(255)

    codec = "sparse(percent=10)"
    directory = rewritten(packed_at("llama", codec), tmp_path / "m", change)
    with pytest.raises(ValueError, match=r"layer 'model.layers.\d.mlp.down_proj': "):
        load("llama", directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(version=99), "newer release may read it"),
        (lambda q: q["plan"][0].update(name="model.layers.7.mlp.up_proj"), "is missing"),
        (lambda q: q["plan"].append(q["plan"][0]), "stands in the plan twice"),
        (lambda q: q["plan"][0].update(shape=[1, 2]), "needs U8"),
    ],
)
def test_a_wrong_plan_is_one_sentence(change, words, packed_at, tmp_path):
    directory = rewritten(packed_at("llama"), tmp_path / "m", lambda t: None)
    config = json.loads((directory / CONFIG).read_text())
    change(config["quantization_config"])
    (directory / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as caught:
        load("llama", directory)
    assert "\n" not in str(caught.value)


# --- compressing on the fly ---


@pytest.fixture(scope="module")
def dense(name, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / name
    build(name).save_pretrained(directory)
    return directory


def test_a_dense_checkpoint_is_compressed_while_it_loads(name, dense, tmp_path):
    config = rs.RealityStoneConfig(codec=CODEC, progress=False)
    model = load(name, dense, quantization_config=config)
    wanted = build(name)
    rs.compress(wanted, codec=CODEC, progress=False)
    assert list(layers(model)) == list(layers(wanted)) != []
    assert torch.equal(outputs(model), outputs(wanted))
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(load(name, tmp_path / "packed")), outputs(model))
    assert config.entries is None  # the user's own config can be used again


def test_settings_reach_the_compression_and_no_file(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    tokens = torch.randint(96, (4, 16))
    config = rs.RealityStoneConfig(
        3, "uniform", calibration=tokens, plan=[("*.q_proj", "palette(bits=4)")],
        skip=["*.o_proj"], modules_to_not_convert=["layers.1.mlp"], progress=False,
    )  # fmt: skip
    model = load("llama", tmp_path / "dense", quantization_config=config)
    wanted = build("llama")
    rs.compress(
        wanted, 3, tokens, "uniform", plan=[("*.q_proj", "palette(bits=4)")],
        skip=["*.o_proj", "model.layers.1.mlp.*"], progress=False,
    )  # fmt: skip
    found = {name: layer.codec.spec for name, layer in layers(model).items()}
    assert found == {name: layer.codec.spec for name, layer in layers(wanted).items()}
    assert len(found) == 10 - 2 - 3
    assert torch.equal(outputs(model), outputs(wanted))
    model.save_pretrained(tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / CONFIG).read_text())["quantization_config"]
    assert set(written) == {"quant_method", "version", "note", "plan"}


def test_compressing_on_the_fly_says_how_much_stays_dense(tmp_path):
    build("llama").save_pretrained(tmp_path)
    settings = rs.RealityStoneConfig(codec=CODEC, skip=["*mlp*"], progress=False)
    with pytest.warns(UserWarning, match=r"only \d+\.\d% of the weights in matrices") as seen:
        model = load("llama", tmp_path, quantization_config=settings)
    told = [str(w.message) for w in seen if "of the weights in matrices" in str(w.message)]
    assert len(told) == 1
    assert f"only {rs.coverage(model):.1%} of" in told[0]
    assert rs.coverage(model) < 0.9


def test_settings_can_be_given_as_a_dictionary(tmp_path):
    build("llama").save_pretrained(tmp_path)
    settings = {"quant_method": "reality_stone", "codec": CODEC, "progress": False}
    model = load("llama", tmp_path, quantization_config=settings)
    assert {layer.codec.spec for layer in layers(model).values()} == {rs.codec(CODEC).spec}
    with pytest.raises(ValueError, match="unexpected keyword argument 'bit'"):
        load("llama", tmp_path, quantization_config=settings | {"bit": 3})


def test_a_config_not_used_yet_shows_its_settings():
    config = rs.RealityStoneConfig(3, calibration=torch.zeros(1, 4), skip=["a"])
    shown = json.loads(config.to_json_string())
    assert (shown["bits"], shown["calibration"], shown["skip"]) == (3, "given", ["a"])


def test_compressing_while_loading_on_several_devices_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="on one device, device_map names 2"):
        load(
            "llama", tmp_path, quantization_config=rs.RealityStoneConfig(),
            device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path,
        )  # fmt: skip


# --- saving ---


def test_saving_what_was_loaded_gives_the_same_bytes(name, packed_at, tmp_path):
    for codec in (CODEC, SHARED):
        source = packed_at(name, codec)
        first, second = tmp_path / f"{codec}1", tmp_path / f"{codec}2"
        load(name, source).save_pretrained(first)
        load(name, first).save_pretrained(second)
        assert bytes_of(first) == bytes_of(second)
        ours, theirs = stored(source), stored(first)
        assert list(ours) == list(theirs)
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype
            assert torch.equal(value, theirs[key])


def test_we_read_what_save_pretrained_wrote(name, packed_at, tmp_path):
    for codec in (CODEC, SHARED):
        model = rs.from_pretrained(packed_at(name, codec))
        model.save_pretrained(tmp_path / codec)
        again = rs.from_pretrained(tmp_path / codec)
        assert torch.equal(outputs(again), outputs(model))
        found = inspect(tmp_path / codec, progress=False)
        assert found.sound
        assert found.bits_per_weight == inspect(packed_at(name, codec), False).bits_per_weight


def test_a_directory_can_be_saved_over_itself(packed_at, tmp_path):
    load("llama", packed_at("llama")).save_pretrained(tmp_path)
    model = load("llama", tmp_path)
    wanted = outputs(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(model), wanted)
    assert torch.equal(outputs(load("llama", tmp_path)), wanted)


def test_a_model_compressed_in_memory_is_saved_and_trained_as_one_that_was_loaded(name, tmp_path):
    model = build(name)
    rs.compress(model, codec=SHARED, progress=False)
    model.save_pretrained(tmp_path)
    again = load(name, tmp_path)
    assert list(layers(again)) == list(layers(model))
    assert torch.equal(outputs(again), outputs(model))
    assert model.hf_quantizer.is_qat_trainable
    rs.dequantize(model)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")


def test_a_model_inside_another_module_is_saved_under_its_own_names(tmp_path):
    model = build("llama")
    rs.compress(nn.ModuleDict({"inner": model}), codec=CODEC, skip=["*lm_head"], progress=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load("llama", tmp_path)), outputs(model))
    assert not hasattr(model.model, "hf_quantizer")  # it is no checkpoint of its own


# --- devices ---


def test_sizes_for_a_device_map_are_those_of_the_packed_tensors(packed_at):
    from accelerate.utils import compute_module_sizes
    from transformers.integrations import accelerate as integration

    model = load("llama", packed_at("llama"))
    wanted = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    empty = copy.deepcopy(model).to("meta")
    assert compute_module_sizes(empty)[""] == wanted
    sizes, _ = integration.compute_module_sizes(empty, model.hf_quantizer)
    assert sizes[""] == wanted
    layer = model.model.layers[0]
    own = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    assert (
        sizes["model.layers.0"]
        == own
        < sum(p.nbytes for p in build("llama").model.layers[0].parameters())
    )
    devices = integration.infer_auto_device_map(
        empty, {0: 2 * own + 30_000, "cpu": 10**9}, ["LlamaDecoderLayer"], model.hf_quantizer
    )
    assert devices["model.layers.0"] == 0
    assert devices["lm_head"] == "cpu"


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"])
def test_device_maps_load(device_map, packed_at):
    model = load("llama", packed_at("llama"), device_map=device_map)
    assert torch.equal(outputs(model), outputs(rs.from_pretrained(packed_at("llama"))))


def test_layers_can_stay_on_disk(packed_at, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
              "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load("llama", packed_at("llama"), device_map=places, offload_folder=tmp_path)
    assert torch.equal(outputs(model), outputs(rs.from_pretrained(packed_at("llama"))))


# --- training, generating, going back ---


def trainer(model: nn.Module, directory: Path, **options) -> "transformers.Trainer":
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(96, (16, 12), generator=generator)
    settings = transformers.TrainingArguments(
        str(directory), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2,
        logging_steps=1, save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(model, settings, train_dataset=data)


@pytest.mark.parametrize("codec", [CODEC, SHARED])
def test_the_trainer_trains_tables_saves_and_resumes(codec, packed_at, tmp_path):
    model = load("llama", packed_at("llama", codec))
    codes = {name: layer.codes.clone() for name, layer in layers(model).items()}
    tables = {n: p.detach().clone() for n, p in model.named_parameters() if "proj." in n}
    one = trainer(model, tmp_path / "one")
    one.train()
    losses = [line["loss"] for line in one.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.codes, codes[n]) for n, layer in layers(model).items())
    changed = [not torch.equal(p, tables[n]) for n, p in model.named_parameters() if n in tables]
    assert tables
    assert all(changed)
    one.save_model(str(tmp_path / "saved"))
    assert torch.equal(outputs(load("llama", tmp_path / "saved")), outputs(model.eval()))
    half = tmp_path / "one" / "checkpoint-4"
    other = trainer(load("llama", packed_at("llama", codec)), tmp_path / "other")
    other.train(resume_from_checkpoint=str(half))
    assert other.state.global_step == 8
    assert torch.equal(outputs(other.model.eval()), outputs(model))


def test_gradient_checkpointing_gives_the_same_gradients(packed_at):
    gradients = []
    ids = torch.arange(24).reshape(2, 12)
    for again in (False, True):
        model = load("llama", packed_at("llama")).train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert any("scale" in n for n in gradients[0])
    for n, wanted in gradients[0].items():
        assert torch.equal(gradients[1][n], wanted), n


def test_generated_tokens_are_those_of_the_greedy_loop(packed_at):
    model, ours = load("llama", packed_at("llama")), rs.from_pretrained(packed_at("llama"))
    ids = torch.tensor([[5, 6, 7]])
    for one in (model, ours):
        found = one.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        wanted = ids
        while wanted.shape[1] < 15:
            with torch.no_grad():
                step = ours(wanted).logits[:, -1]
            step[:, ours.generation_config.eos_token_id] = -torch.inf
            wanted = torch.cat([wanted, step.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found, wanted)


def test_a_model_goes_back_to_dense_layers(name, packed_at, tmp_path):
    model = load(name, packed_at(name))
    wanted = outputs(model)
    back = model.dequantize()
    assert not layers(back)
    # Two ways of computing one product in float32, through two blocks.
    torch.testing.assert_close(outputs(back), wanted, rtol=1e-2, atol=1e-2)
    back.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / CONFIG).read_text())
    assert torch.equal(outputs(load(name, tmp_path)), outputs(back))


def test_copies_save_their_own_state(packed_at, tmp_path):
    model = load("llama", packed_at("llama"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(other).values():
            layer.params[0].mul_(2)
    other.save_pretrained(tmp_path)
    assert torch.equal(outputs(load("llama", tmp_path)), outputs(other))
    assert not torch.equal(outputs(model), outputs(other))


# --- rs.from_pretrained ---


def test_the_class_is_the_one_that_the_config_names(tmp_path):
    config = transformers.BertConfig(**SMALL, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "dense")
    assert isinstance(rs.from_pretrained(tmp_path / "dense"), type(model))
    rs.compress(model, codec=CODEC, progress=False)
    rs.save(model, tmp_path / "packed")
    again = rs.from_pretrained(tmp_path / "packed")
    assert isinstance(again, type(model))
    assert torch.equal(outputs(again), outputs(model))
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(auto), outputs(model))


def test_an_architecture_that_transformers_does_not_have_is_named(packed_at, tmp_path):
    directory = rewritten(packed_at("llama"), tmp_path / "m", lambda t: None)
    for name in ("NoSuchModel", "LlamaConfig"):
        config = checkpoint.read_config(directory) | {"architectures": [name]}
        (directory / CONFIG).write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"names the architecture '{name}', which"):
            rs.from_pretrained(directory)
