"""PEFT's LoRA on a compressed Llama: attach, train, save, reload, merge or refuse."""

import copy
import importlib
import sys

import pytest
import torch
import walk
from torch import nn

import reality_stone as rs
from reality_stone.nn import RBELinear, lora

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from reality_stone.peft import LoraRBELinear  # noqa: E402  (needs peft)

TOKENS = torch.arange(24).reshape(2, 12) % 96
CODEC = "uniform(bits=4, group=32)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A packed Llama on disk: 14 compressed layers, a dense head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    rs.compress(model, codec=CODEC, plan=[("*down_proj", "trellis(bits=4)")], progress=False)
    plan = [(name, CODEC) for name in ("*k_proj", "*v_proj")]  # below the size that is worth it
    rs.compress(model, codec=CODEC, plan=plan, progress=False)
    return rs.save(model, tmp_path_factory.mktemp("peft") / "packed")


@pytest.fixture
def model(checkpoint):
    return rs.from_pretrained(checkpoint)


def config(**settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings)


def moved(model, scale=0.1):
    """Adapters as after some training."""
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_" in name:
            p.data.add_(scale * walk.gaussian(*p.shape, seed=i))
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def codes(model):
    return {n.removeprefix("base_model.model.").replace(".base_layer", ""): m.packed
            for n, m in model.named_modules() if isinstance(m, RBELinear)}  # fmt: skip


def same_codes(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n].codes, b[n].codes)
        and all(walk.same_bits(v, b[n].params[k]) for k, v in a[n].params.items())
        for n in a
    )


def snapshot(model):
    return copy.deepcopy(codes(model))


def test_a_new_adapter_changes_no_bit_and_only_adapters_train(model):
    before, held = logits(model), snapshot(model)
    tuned = peft.get_peft_model(model, config())
    assert walk.same_bits(logits(tuned), before)
    assert sum(isinstance(m, LoraRBELinear) for m in tuned.modules()) == 4
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all("lora_" in n for n in trained)
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 3e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert same_codes(codes(tuned), held)
    assert not torch.equal(logits(tuned), before)


def test_an_adapter_adds_its_product_as_on_a_dense_layer(model):
    dense = peft.get_peft_model(rs.dequantize(copy.deepcopy(model)), config())
    tuned = peft.get_peft_model(model, config())
    moved(tuned)
    dense.load_state_dict(
        {n: v for n, v in tuned.state_dict().items() if "lora_" in n}, strict=False
    )
    # Products of 128 terms in another order, through two blocks.
    with rs.accuracy("exact"):
        assert walk.relative(logits(tuned), logits(dense)) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "target_modules": "all-linear"},
        {"use_dora": True},
        {"init_lora_weights": "gaussian", "bias": "all", "modules_to_save": ["lm_head"]},
        {"lora_dropout": 0.2, "rank_pattern": {"down_proj": 2}},
    ],
    ids=["plain", "rslora", "dora", "head", "ranks"],
)
def test_a_saved_adapter_gives_the_same_bits_on_a_freshly_loaded_model(
    model, checkpoint, tmp_path, settings
):
    tuned = moved(peft.get_peft_model(model, config(**settings))).eval()
    want = logits(tuned)
    tuned.save_pretrained(tmp_path)
    assert not any("codes" in name for name in peft.get_peft_model_state_dict(tuned))
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(
            rs.from_pretrained(checkpoint), tmp_path, low_cpu_mem_usage=low
        )
        assert walk.same_bits(logits(again), want)
    resumed = peft.PeftModel.from_pretrained(
        rs.from_pretrained(checkpoint), tmp_path, is_trainable=True
    )
    assert {n for n, p in resumed.named_parameters() if p.requires_grad} == {
        n for n, p in tuned.named_parameters() if p.requires_grad
    }


def test_adapters_go_off_and_on_and_several_live_beside_each_other(model):
    before = logits(model)
    tuned = peft.get_peft_model(model, config()).eval()
    moved(tuned)
    first = logits(tuned)
    tuned.add_adapter("second", config(r=2, target_modules="all-linear"))
    assert walk.same_bits(logits(tuned), first)
    tuned.set_adapter("second")
    assert walk.same_bits(logits(tuned), before)
    moved(tuned, 0.05)
    second = logits(tuned)
    with tuned.disable_adapter():
        assert walk.same_bits(logits(tuned), before)
    with torch.no_grad():
        mixed = tuned(input_ids=TOKENS, adapter_names=["second", "__base__"]).logits
    # Half the rows at a time: products of other sizes.
    assert walk.relative(mixed[:1], second[:1]) < 2e-2
    assert walk.relative(mixed[1:], before[1:]) < 2e-2
    tuned.delete_adapter("second")
    tuned.set_adapter("default")
    unloaded = tuned.unload()
    assert not any(isinstance(m, LoraRBELinear) for m in unloaded.modules())
    assert walk.same_bits(logits(unloaded), before)


def test_all_linear_means_every_layer_but_the_head_compressed_or_not(model):
    names = {n for n, m in model.named_modules() if isinstance(m, RBELinear)}
    assert len(names) == 14
    name = next(iter(names))
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, model.get_submodule(name).to_linear())
    tuned = peft.get_peft_model(model, config(target_modules="all-linear"))
    prefix = "base_model.model."
    found = {n for n, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert found == {prefix + n for n in names}
    assert isinstance(tuned.get_submodule(prefix + name).get_base_layer(), nn.Linear)


def test_a_compressed_head_is_no_target_of_all_linear():
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings)
    rs.compress(model, codec=CODEC, plan=[("lm_head", CODEC)], progress=False)
    assert isinstance(model.lm_head, RBELinear)
    tuned = peft.get_peft_model(model, config(target_modules="all-linear"))
    assert isinstance(tuned.base_model.model.lm_head, RBELinear)


@pytest.mark.skipif(
    int(peft.__version__.split(".")[1]) < 20, reason="transformers itself asks for peft 0.20 there"
)
def test_transformers_adds_an_adapter_by_itself(model):
    before = logits(model)
    model.add_adapter(config())
    assert walk.same_bits(logits(model), before)
    assert sum(isinstance(m, LoraRBELinear) for m in model.modules()) == 4


def test_generation_and_checkpointed_training_go_through_adapters(model):
    tuned = moved(peft.get_peft_model(model, config())).train()
    tuned.enable_input_require_grads()
    tuned(input_ids=TOKENS, labels=TOKENS).loss.backward()
    want = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad()
    tuned.gradient_checkpointing_enable({"use_reentrant": False})
    tuned(input_ids=TOKENS, labels=TOKENS).loss.backward()
    got = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    assert len(want) == 8
    assert all(torch.equal(got[n], want[n]) for n in want)
    tokens = tuned.eval().generate(input_ids=TOKENS[:, :4], max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 7)


def test_attaching_does_not_decode_the_weight(model, monkeypatch):
    read = []
    weight = RBELinear.weight.fget
    monkeypatch.setattr(RBELinear, "weight", property(lambda self: read.append(1) or weight(self)))
    peft.get_peft_model(model, config(target_modules="all-linear"))
    assert not read


def test_a_compiled_layer_with_an_adapter_is_one_graph(model):
    tuned = moved(peft.get_peft_model(model, config()))
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    x = walk.gaussian(5, 64)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert walk.same_bits(run(x).detach(), layer(x).detach())


# --- merging ---


def test_a_merge_encodes_the_sum_and_its_way_back_is_exact(model):
    before, held = logits(model), snapshot(model)
    tuned = moved(peft.get_peft_model(model, config()), 0.3).eval()
    want = logits(tuned)
    tuned.merge_adapter()
    merged = logits(tuned)
    assert not same_codes(codes(tuned), held)
    # Codes of 4 bits: nearer to the sum than codes without the adapter are.
    assert walk.relative(merged, want) < 0.5 * walk.relative(before, want)
    tuned.unmerge_adapter()
    assert same_codes(codes(tuned), held)
    assert walk.same_bits(logits(tuned), want)
    alone = tuned.merge_and_unload()
    assert walk.same_bits(logits(alone), merged)
    assert sum(isinstance(m, RBELinear) for m in alone.modules()) == 14
    assert not any(isinstance(m, LoraRBELinear) for m in alone.modules())


def test_a_merge_takes_the_codes_that_merge_of_ours_takes(model):
    layer = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    tuned = moved(peft.get_peft_model(model, config()), 0.3)
    wrapped = tuned.base_model.model.model.layers[0].self_attn.q_proj
    lora.add_lora(layer, rank=4, alpha=8)
    layer.adapter.a.data.copy_(wrapped.lora_A["default"].weight)
    layer.adapter.b.data.copy_(wrapped.lora_B["default"].weight)
    lora.merge(layer)
    tuned.merge_adapter()
    assert torch.equal(wrapped.base_layer.codes, layer.codes)


def test_disabling_a_merged_adapter_brings_the_codes_back(model):
    before = logits(model)
    tuned = moved(peft.get_peft_model(model, config()), 0.3).eval()
    tuned.merge_adapter()
    with tuned.disable_adapter():
        assert walk.same_bits(logits(tuned), before)


def test_two_adapters_merge_one_after_the_other_and_come_off_together(model):
    held = snapshot(model)
    tuned = peft.get_peft_model(model, config())
    tuned.add_adapter("second", config())
    moved(tuned, 0.3)
    tuned.merge_adapter(["default"])
    one = snapshot(tuned)
    tuned.merge_adapter(["second"])
    assert not same_codes(codes(tuned), one)
    with pytest.warns(UserWarning, match="merged"):
        tuned.merge_adapter(["second"])
    tuned.unmerge_adapter()
    assert same_codes(codes(tuned), held)


def test_biases_merge_and_come_back():
    torch.manual_seed(0)
    net = nn.Sequential(RBELinear(64, 32, codec=CODEC), nn.ReLU(), RBELinear(32, 8, codec=CODEC))
    bias = net[0].bias.detach().clone()
    tuned = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], r=4, lora_bias=True))
    moved(tuned, 0.3)
    layer = tuned.base_model.model[0]
    step = layer.lora_B["default"].bias.detach() * layer.scaling["default"]
    tuned.merge_adapter()
    assert torch.equal(layer.base_layer.bias, bias + step)
    tuned.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_codes_cannot_hold_is_refused_and_changes_nothing(model, verb):
    held = snapshot(model)
    tuned = moved(peft.get_peft_model(model, config(target_modules="all-linear")), 0.3).eval()
    last = tuned.base_model.model.model.layers[1].mlp.down_proj
    for part in (last.lora_A, last.lora_B):
        part["default"].weight.data.mul_(0.02)
    want = logits(tuned)
    with pytest.raises(ValueError, match=r"down_proj.*keep the adapter, or use more bits"):
        getattr(tuned, verb)()
    assert same_codes(codes(tuned), held)
    assert walk.same_bits(logits(tuned), want)
    last.lora_B["default"].weight.data.zero_()  # adds nothing: the codes hold the sum as they are
    tuned.merge_adapter()
    assert last.merged_adapters == ["default"]
    assert torch.equal(last.base_layer.codes, held["model.layers.1.mlp.down_proj"].codes)


def test_dora_cannot_be_merged_in_one_sentence(model):
    tuned = moved(peft.get_peft_model(model, config(use_dora=True)))
    with pytest.raises(ValueError, match=r"'default' is DoRA, which codes cannot take in: keep it"):
        tuned.merge_and_unload()


# --- refusals and life without peft ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' would write its weight"),
        ({"init_lora_weights": "olora"}, "'olora' would write its weight"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
        ({"fan_in_fan_out": True}, "leave out fan_in_fan_out"),
    ],
)
def test_what_a_compressed_layer_cannot_do_is_refused_before_any_change(model, settings, message):
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, config(**settings))
    assert [type(m) for m in model.modules()] == before


def test_what_writes_a_weight_is_still_there_for_dense_layers():
    net = nn.Sequential(nn.Linear(16, 16), RBELinear(16, 16, codec=CODEC))
    tuned = peft.get_peft_model(
        net, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights="pissa")
    )
    assert not isinstance(tuned.base_model.model[0], LoraRBELinear)


def test_an_adapter_of_ours_is_not_built_over(model):
    lora.add_lora(model, rank=2, targets=["*q_proj"])
    with pytest.raises(ValueError, match=r"has an adapter of nn\.lora"):
        peft.get_peft_model(model, config())


def test_without_peft_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "reality_stone.peft")
    with pytest.raises(ImportError, match=r"pip install reality-stone\[peft\]"):
        importlib.import_module("reality_stone.peft")
