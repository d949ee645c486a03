"""Kinds of models as transformers builds them: found, calibrated block by block, saved, loaded."""

import warnings

import pytest
import torch
from torch import nn

import reality_stone as rs
from reality_stone.blocks import calls_from, find_blocks, input_hessian, not_padding, stages
from reality_stone.nn import KINDS, RBEConv1D, RBEExperts, RBELinear
from reality_stone.nn.experts import fuse, unfuse, unfused
from reality_stone.swap import plan_of
from reality_stone.targets import candidates
from reality_stone.training import reconstruct
from reality_stone.training.latent import finalize, latent

transformers = pytest.importorskip("transformers", reason="needs reality-stone[hf]")

CODEC = "uniform(bits=3, group=32)"
SIZE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 80,
}  # fmt: skip
LLAMA = SIZE | {"num_key_value_heads": 2, "head_dim": 32, "use_cache": False}


def build(kind: str) -> nn.Module:
    t = transformers
    torch.manual_seed(0)
    return {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, vocab_size=80)
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA)),
        "bert": lambda: t.BertModel(t.BertConfig(**SIZE)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**LLAMA, num_local_experts=4)),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(
                **LLAMA, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=80
            )
        ),
        "gpt_oss": lambda: t.GptOssForCausalLM(
            t.GptOssConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)
        ),
    }[kind]().eval()  # fmt: skip


def ids(rows: int = 12, length: int = 20) -> torch.Tensor:
    return torch.randint(80, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def output(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens)[0]


@pytest.fixture(params=["gpt2", "llama", "qwen3", "bert", "mixtral", "qwen3_moe", "gpt_oss"])
def kind(request):
    return request.param


MOE = ["mixtral", "qwen3_moe", "gpt_oss"]


def test_a_model_is_calibrated_block_by_block_and_comes_back_from_its_files(kind, tmp_path):
    model, tokens = build(kind), ids()
    want = output(model, tokens)
    report = rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    assert report.coverage == rs.coverage(model) > 0.95
    assert not any("attn" in n or "mlp.experts" in n for n in report.skipped)
    got = output(model, tokens)
    assert 0 < (got - want).norm() < 0.5 * want.norm()
    rs.save(model, tmp_path / "m")
    other = rs.load(build(kind), tmp_path / "m")
    assert torch.equal(output(other, tokens), got)
    with torch.device("meta"):
        empty = build(kind)
    rs.replace(empty, [e.to_config() for e in plan_of(model)])
    assert {n: t.shape for n, t in empty.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def test_the_blocks_of_every_kind_are_a_chain(kind):
    model, tokens = build(kind), ids()
    with unfused(model):
        targets = {c.name: c.module for c in candidates(model)}
        blocks = find_blocks(model, targets)
    assert len(blocks) == 2
    names = [stage.name for stage in stages(model, blocks, calls_from(tokens, 4))]
    assert names == blocks


def test_calibration_brings_the_output_nearer_to_that_of_the_dense_model(kind):
    tokens, errors = ids(64, 20), {}
    fresh = ids(144, 20)[64:]  # routing jumps: a mixture's error on few windows is mostly chance
    want = output(build(kind), fresh)
    for data in (tokens, None):
        model = build(kind)
        rs.compress(model, calibration=data, codec="uniform(bits=2)", progress=False)
        errors[data is not None] = (output(model, fresh) - want).norm()
    assert errors[True] < errors[False]


def test_dequantize_gives_the_modules_and_names_of_the_dense_model(kind):
    model, dense, tokens = build(kind), build(kind), ids()
    rs.compress(model, codec=CODEC, progress=False)
    with rs.accuracy("exact"):
        got = output(model, tokens)
    rs.dequantize(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in dense.state_dict().items()
    }
    # The same weights in another order of summation.
    torch.testing.assert_close(output(model, tokens), got, atol=1e-5, rtol=1e-4)


def test_conv1d_is_the_linear_layer_of_its_transpose():
    conv = transformers.pytorch_utils.Conv1D(96, 64)
    linear = nn.Linear(64, 96)
    linear.weight, linear.bias = nn.Parameter(conv.weight.t().contiguous()), conv.bias
    model = nn.ModuleDict({"conv": conv, "linear": linear})
    rs.compress(model, codec=CODEC, progress=False)
    assert isinstance(model["conv"], RBEConv1D)
    assert torch.equal(model["conv"].codes, model["linear"].codes)
    x = torch.randn(3, 5, 64)
    assert torch.equal(model["conv"](x), model["linear"](x))
    assert KINDS["conv1d"].replaces(conv)
    assert not KINDS["linear"].replaces(conv)
    assert not KINDS["conv1d"].replaces(nn.Conv1d(64, 96, 1))


def test_gpt2_trains_its_tables_and_in_the_latent_state():
    model = build("gpt2")
    rs.compress(model, codec=CODEC, progress=False)
    batches = ids(8)
    before = rs.perplexity(model, batches, context=20)
    rs.finetune(model, batches, mode="tables", progress=False, epochs=4)
    assert rs.perplexity(model, batches, context=20) < before
    latent(model, skip=["lm_head"])
    finalize(model)
    assert {e.kind for e in plan_of(model)} == {"conv1d"}


@pytest.mark.parametrize("kind", MOE)
def test_experts_as_modules_compute_what_the_fused_ones_do(kind):
    model, tokens = build(kind), ids(3, 7)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        fused = dict(model.state_dict())
        model.set_experts_implementation(implementation)
        want = output(model, tokens)
        unfuse(model)
        experts = model.model.layers[0].mlp.experts
        first = getattr(experts, experts.matrices[0])[1].weight
        at = fused[f"model.layers.0.mlp.experts.{experts.matrices[0]}"]
        assert first.data_ptr() == at[1].data_ptr()  # a view
        # Sums of 64 to 96 float32 products and of the experts, in another order.
        torch.testing.assert_close(output(model, tokens), want, atol=2e-6, rtol=1e-5)
        fuse(model)
        assert torch.equal(output(model, tokens), want)
        assert all(torch.equal(t, fused[n]) for n, t in model.state_dict().items())


def test_experts_take_no_tokens_tokens_for_nobody_and_gradients():
    torch.manual_seed(0)
    experts = build("mixtral").model.layers[0].mlp.experts
    layers = RBEExperts(experts)
    assert layers(torch.zeros(0, 64), torch.zeros(0, 2).long(), torch.zeros(0, 2)).shape == (0, 64)
    x, weights = torch.randn(5, 64, requires_grad=True), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [1, 4], [4, 4], [3, 0], [1, 3]])  # 4: no expert
    one = layers(x, index, weights)
    assert not one[2].any()
    alone = layers.expert(1, x[1:2]) * weights[1, 0]
    torch.testing.assert_close(one[1:2], alone)
    one.square().sum().backward()
    assert layers.gate_up_proj[2].weight.grad is None
    mine = layers.gate_up_proj[3].weight.grad
    experts.config._experts_implementation = "eager"
    # transformers before 5.18 knows no index for nobody: an expert of weight 0 is the same.
    none = index == 4
    experts(x, index.masked_fill(none, 0), weights.masked_fill(none, 0)).square().sum().backward()
    torch.testing.assert_close(mine, experts.gate_up_proj.grad[3], atol=1e-5, rtol=1e-4)


def test_experts_that_calibration_does_not_reach_are_named_once():
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2] = 0  # its logit is 0, others' are larger or smaller
            layer.mlp.gate.weight[:2] = layer.mlp.gate.weight[3]
    with pytest.warns(UserWarning, match=r"no calibration input reaches") as seen:
        rs.compress(model, calibration=ids(2, 3), codec=CODEC, progress=False)
    assert sum("reaches" in str(w.message) for w in seen) == 1
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj[2], RBELinear)


def test_an_experts_hessian_is_that_of_its_own_tokens():
    model, tokens = build("mixtral"), ids(4, 9)
    seen = {}
    unfuse(model)
    expert = model.model.layers[0].mlp.experts.gate_up_proj[1]
    handle = expert.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0]))
    output(model, tokens)
    handle.remove()
    x = seen["x"].double()
    assert 0 < len(x) < tokens.numel()
    # The third layer to be encoded: both of the first expert come before.
    want = RBELinear.from_linear(expert, CODEC, x.t() @ x / len(x), seed=2)
    plan = [("*.layers.0.mlp.experts.*", CODEC), ("*", None)]
    rs.compress(model, calibration=tokens, plan=plan, progress=False)
    got = model.model.layers[0].mlp.experts.gate_up_proj[1]
    assert torch.equal(got.codes, want.codes)


def test_a_directory_of_a_mixture_loads_as_a_language_model(tmp_path):
    model, tokens = build("mixtral"), ids()
    rs.compress(model, codec=CODEC, progress=False)
    rs.save(model, tmp_path / "m")
    assert torch.equal(output(rs.from_pretrained(tmp_path / "m"), tokens), output(model, tokens))


def test_experts_left_dense_stay_fused_and_a_failed_load_changes_nothing(tmp_path):
    model = build("mixtral")
    plan = [("*.layers.0.mlp.experts.*", None)]
    report = rs.compress(model, codec=CODEC, plan=plan, progress=False)
    kinds = [type(layer.mlp.experts).__name__ for layer in model.model.layers]
    assert kinds == ["MixtralExperts", "RBEExperts"]
    assert "model.layers.0.mlp.experts.down_proj.3" in report.skipped
    rs.save(model, tmp_path / "m")
    other = rs.load(build("mixtral"), tmp_path / "m")
    assert torch.equal(output(other, ids()), output(model, ids()))
    wrong = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA | {"vocab_size": 81}, num_local_experts=4)
    )
    with pytest.raises(ValueError, match="the model needs"):
        rs.load(wrong, tmp_path / "m")
    assert not any(isinstance(m, RBEExperts) for m in wrong.modules())


def test_a_mixture_of_plain_layers_is_compressed_too():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(64, 4)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            share, chosen = self.gate(x).softmax(-1).max(-1)
            parts = [(chosen == i)[..., None] * e(x) for i, e in enumerate(self.experts)]
            return x + share[..., None] * sum(parts)

    model = nn.Sequential(Mixture(), Mixture())
    report = rs.compress(model, calibration=torch.randn(128, 64), codec=CODEC, progress=False)
    assert len(report.layers) == 8
    assert all(layer.hessian_error is not None for layer in report.layers)


class Odd(nn.Module):
    """A convolution, fused experts of its own making, and little else."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(64, 64, 3)
        self.weights = nn.Parameter(torch.randn(4, 64, 64))
        self.table = nn.Embedding(100, 64)
        self.small = nn.Linear(8, 8)
        self.body = nn.Linear(64, 64)


def test_what_nothing_stands_for_is_named_counted_and_warned_of():
    model = Odd()
    with pytest.warns(
        UserWarning, match=r"only 12\.5% of the weights .*weights \(16,384 weights, "
    ):
        report = rs.compress(model, codec=CODEC, progress=False)
    total = 64 * 64 * 3 + 4 * 64 * 64 + 64 + 64 * 64
    assert report.coverage == pytest.approx(64 * 64 / total)
    assert report.skipped == {
        "small": "below 4096 weights",
        "weights": "no layer stands for Odd",
        "conv.weight": "no layer stands for Conv1d",
    }
    assert report.to_json()["coverage"] == report.coverage == rs.coverage(report)
    assert "left dense, no layer stands for Conv1d: conv.weight" in str(report)


def test_what_the_caller_wants_dense_is_no_reason_to_warn():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = rs.compress(model, codec=CODEC, skip=["1"], progress=False)
    assert report.coverage == 0.5
    assert report.skipped == {"1": "asked for"}


def test_a_layer_used_twice_stays_one_layer():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    rs.compress(model, codec=CODEC, progress=False)
    assert isinstance(model[2], RBELinear)
    assert model[0] is model[2]


def test_padding_calibrates_nothing():
    model, tokens = build("bert"), ids(4, 10)
    mask = torch.ones_like(tokens)
    mask[1:, 6:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    noise = batch | {"input_ids": torch.where(mask.bool(), tokens, tokens.flip(0))}
    blocks = [f"encoder.layer.{i}" for i in range(2)]

    def moments(item):
        return [
            input_hessian(stage, stage.module.attention.self.query)
            for stage in stages(model, blocks, calls_from([item], 1))
        ]

    for one, other in zip(moments(batch), moments(noise), strict=True):
        torch.testing.assert_close(one, other)
    x = torch.arange(80.0).view(4, 10, 2)
    assert len(not_padding(x, mask.bool())) == mask.sum()
    assert torch.equal(not_padding(x.flatten(0, 1), mask.bool()), x[mask.bool()])
    assert len(not_padding(x[:, 0], mask.bool())) == 4


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_codes_are_found_anew_against_a_teacher_of_another_layout(kind):
    teacher, model, tokens = build(kind), build(kind), ids(8, 12)
    state = {n: t.clone() for n, t in teacher.state_dict().items()}
    rs.compress(model, codec="uniform(bits=2, group=32)", progress=False)
    before = rs.kl_divergence(model, teacher, tokens, context=12)
    report = reconstruct(model, teacher, tokens, steps=2, precision="float32", progress=False)
    assert [block.accepted for block in report.blocks] == [True, True]
    assert rs.kl_divergence(model, teacher, tokens, context=12) < before
    after = teacher.state_dict()  # transposed and fused as it was
    assert all(torch.equal(after[n], t) for n, t in state.items())
    assert len(after) == len(state)
