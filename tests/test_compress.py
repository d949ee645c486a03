"""Compressing whole models: order, calibration, reports, bad input, interrupts."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

import reality_stone as rs
from reality_stone.blocks import Call, Stage, execution_groups, find_blocks, stages
from reality_stone.codecs import Uniform
from reality_stone.nn import RBELinear
from reality_stone.targets import candidates

CODEC = "uniform(bits=3, group=32)"


class Block(nn.Module):
    """Attention-like: q, k and v read one input, o reads their sum."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.calls = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return x + scale * self.o(torch.tanh(self.q(x) + self.k(x) * self.v(x)))


class Model(nn.Module):
    def __init__(self, width: int = 96, depth: int = 3):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def tokens():
    return torch.randint(50, (24, 16), generator=torch.Generator().manual_seed(1))


def test_layers_are_compressed_in_execution_order_and_the_tied_head_stays_dense(model, tokens):
    report = rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    assert [layer.name for layer in report.layers] == [
        f"layers.{i}.{name}" for i in range(3) for name in ("q", "k", "v", "o")
    ]
    assert list(report.skipped) == ["head"]
    assert model.head.weight is model.embed.weight
    assert all(isinstance(m, RBELinear) for b in model.layers for m in (b.q, b.k, b.v, b.o))


def test_the_report_counts_every_stored_bit_and_survives_json(model, tokens, tmp_path):
    report = rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    bits = sum(m.packed.bits for m in model.modules() if isinstance(m, RBELinear))
    assert report.bits_per_weight == pytest.approx(bits / report.weights)
    assert report.weights == 12 * 96 * 96
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(
        json.dumps(report.to_json())
    )
    assert "12 layers" in str(report)
    assert all(0 < layer.hessian_error < layer.error for layer in report.layers)


def test_each_layer_is_calibrated_on_the_outputs_of_the_compressed_ones(model, tokens):
    inputs = {}
    dense = Model().eval()
    dense.load_state_dict(model.state_dict())
    rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    last = model.layers[2].o
    handle = last.register_forward_pre_hook(lambda m, args: inputs.__setitem__("x", args[0]))
    model(tokens)
    handle.remove()
    x = inputs["x"].flatten(0, 1).double()
    # Encoding that layer again with the Hessian of the compressed model gives the same codes.
    hessian = x.t() @ x / len(x)
    again = RBELinear.from_linear(dense.layers[2].o, CODEC, hessian, seed=11)
    same = (again.codes == last.codes).float().mean().item()
    assert same > 0.98  # sums of float32 products over other batches round differently


def test_calibration_lowers_the_error_of_the_models_output(model, tokens):
    want = model(tokens)
    errors = {}
    for name, data in (("with", tokens), ("without", None)):
        other = Model().eval()
        other.load_state_dict(model.state_dict())
        rs.compress(other, calibration=data, codec=CODEC, progress=False)
        errors[name] = (other(tokens) - want).norm().item()
    assert errors["with"] < errors["without"]


def test_hidden_states_are_carried_forward(model, tokens):
    rs.compress(model, calibration=tokens, codec=CODEC, batch=8, progress=False)
    # 3 batches. Each block: once in the collecting pass, one probe for the order, three per group
    # (q, k and v are one), and three to carry on, except from the last.
    assert [b.calls for b in model.layers] == [3 + 1 + 2 * 3 + 3] * 2 + [3 + 1 + 2 * 3]


def test_a_model_whose_blocks_do_not_chain_is_run_as_a_whole(tokens):
    class Skips(Model):
        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(self.layers[0](x) + self.layers[1](x * 2))

    torch.manual_seed(0)
    model = Skips(depth=2).eval()
    names = find_blocks(model, {c.name: c.module for c in candidates(model)})
    assert names == ["layers.0", "layers.1"]
    assert [s.name for s in stages(model, names, [Call((tokens,))])] == [""]
    report = rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    assert all(layer.hessian_error is not None for layer in report.layers)


def test_layers_that_read_one_input_are_one_group(model, tokens):
    block = model.layers[0]
    targets = {n: getattr(block, n) for n in "qkvo"}
    stage = Stage("", block, [Call((torch.randn(2, 5, 96),))])
    assert execution_groups(stage, targets) == [["q", "k", "v"], ["o"]]


def test_a_sequential_model_and_layers_outside_blocks_are_compressed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 4))
    x = torch.randn(512, 64)
    report = rs.compress(net, calibration=x, codec="uniform(bits=8, group=64)", progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert list(report.skipped) == ["3"]


def test_a_plan_wins_over_the_codec_and_skip_leaves_layers_dense(model):
    report = rs.compress(
        model,
        codec=CODEC,
        plan=[("*.q", "uniform(bits=8)"), ("*.k", None)],
        skip=["layers.0.*"],
        progress=False,
    )
    by_name = {layer.name: layer.codec for layer in report.layers}
    assert by_name["layers.0.q"].startswith("uniform(bits=8")
    assert "layers.1.k" not in by_name
    assert "layers.0.v" not in by_name
    assert by_name["layers.1.v"].startswith("uniform(bits=3")


def test_an_unused_layer_is_encoded_without_calibration(model, tokens):
    model.layers[0].unused = nn.Linear(96, 96)
    report = rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["layers.0.unused"].hessian_error is None


@pytest.mark.parametrize("empty", [torch.zeros((0, 16), dtype=torch.long), [], [torch.zeros(0, 4)]])
def test_an_empty_calibration_set_is_refused_before_anything_changes(model, empty):
    with pytest.raises(ValueError, match="calibration set is empty"):
        rs.compress(model, calibration=empty, codec=CODEC, progress=False)
    assert not any(isinstance(m, RBELinear) for m in model.modules())


def test_calibration_with_nan_activations_warns_by_layer_and_still_encodes(model):
    with torch.no_grad():
        model.embed.weight[3, 5] = math.nan
    tokens = torch.randint(50, (24, 16))
    with pytest.warns(UserWarning, match=r"layers\.0\.q: the Hessian"):
        rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    assert all(bool(m.weight.isfinite().all()) for m in model.modules() if isinstance(m, RBELinear))


def test_a_constant_calibration_input_gives_a_singular_hessian_and_a_right_result(model):
    tokens = torch.full((4, 16), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    assert bool(model(tokens).isfinite().all())


def test_a_weight_that_is_not_finite_is_refused_naming_layer_and_position(model):
    with torch.no_grad():
        model.layers[1].k.weight[2, 3] = math.inf
    with pytest.raises(ValueError, match=r"layers\.1\.k: .*not finite at \(2, 3\)"):
        rs.compress(model, codec=CODEC, progress=False)
    assert isinstance(model.layers[1].k, nn.Linear)


def test_nothing_to_compress_is_one_sentence():
    with pytest.raises(ValueError, match="nothing to compress"):
        rs.compress(nn.Sequential(nn.Linear(3, 3)), progress=False)


@pytest.mark.parametrize("bits", [0, 1, 17, math.nan])
def test_bits_that_no_mixture_of_rates_has_are_refused(model, bits):
    with pytest.raises(ValueError, match="bits must be"):
        rs.compress(model, bits=bits, progress=False)


def test_an_interrupt_leaves_every_layer_dense_or_compressed(model, tokens, monkeypatch):
    done = []
    encode = Uniform.encode

    def interrupted(self, *args, **kwargs):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(Uniform, "encode", interrupted)
    model.train()
    with pytest.raises(KeyboardInterrupt):
        rs.compress(model, calibration=tokens, codec=CODEC, progress=False)
    assert sum(isinstance(m, RBELinear) for m in model.modules()) == 5
    assert model.training
    assert bool(model(tokens).isfinite().all())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_texts_need_a_tokenizer(model):
    with pytest.raises(ValueError, match="tokenizer"):
        rs.compress(model, calibration=["some text"], codec=CODEC, progress=False)
