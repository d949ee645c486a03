"""Planning rates: the allocation, what it is based on, and what becomes of it."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from models import bigrams
from torch import nn

import reality_stone as rs
from reality_stone.allocation import Choice, LayerCurve, allocate, options, stored_bits
from reality_stone.blocks import calls_from
from reality_stone.codecs import Trellis, Uniform
from reality_stone.layer_plan import FORMAT
from reality_stone.nn import RBELinear
from reality_stone.sensitivity import measure

RATES = (2, 3, 4, 5, 6, 8, 16)


class Block(nn.Module):
    """Two layers beside each other, one of which counts `gain` times as much."""

    def __init__(self, width: int, gain: float):
        super().__init__()
        self.loud, self.quiet = nn.Linear(width, width), nn.Linear(width, width)
        self.gain = gain

    def forward(self, x):
        return x + self.gain * torch.tanh(self.loud(x)) + torch.tanh(self.quiet(x))


class Model(nn.Module):
    def __init__(self, width: int = 128, gain: float = 6.0):
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.layers = nn.ModuleList(Block(width, gain) for _ in range(2))
        self.head = nn.Linear(width, 40)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def tokens():
    return torch.randint(40, (32, 16), generator=torch.Generator().manual_seed(1))


def plan(model, bits, tokens=None, **settings):
    settings = {"codec": "uniform", "skip": ["head"], "progress": False} | settings
    return rs.plan(model, bits, tokens, **settings)


def curves(seed: int, layers: int) -> list[LayerCurve]:
    """Layers of any size with falling, not always convex losses."""
    random = np.random.default_rng(seed)
    codecs = options("uniform", RATES)
    found = []
    for i in range(layers):
        shape = (int(random.integers(1, 9)) * 16, int(random.integers(1, 9)) * 16)
        size = math.exp(random.normal(0, 2))
        noise = np.exp(random.normal(0, 0.5, len(codecs)))
        loss = [0.0 if c is None else size * 4.0**-r * n
                for (r, c), n in zip(codecs.items(), noise, strict=True)]  # fmt: skip
        weights = shape[0] * shape[1]
        choices = (
            Choice(rate, codec, stored_bits(codec, shape) / weights, error)
            for (rate, codec), error in zip(codecs.items(), loss, strict=True)
        )
        found.append(LayerCurve(f"layer {i}", shape, tuple(choices)))
    return found


def spent(layers: list[LayerCurve], choices: list[Choice]) -> float:
    return sum(c.bits * layer.weights for c, layer in zip(choices, layers, strict=True))


def budget(layers: list[LayerCurve], bits: float) -> float:
    return sum(layer.bits_at(bits) * layer.weights for layer in layers)


# --- allocation ---


@pytest.mark.parametrize("seed", range(5))
def test_an_allocation_keeps_within_its_budget_and_more_bits_never_predict_more_loss(seed):
    layers, last = curves(seed, 12), math.inf
    for bits in np.linspace(2, 16, 300):
        found = allocate(layers, float(bits))
        assert spent(layers, found) <= budget(layers, bits) + 1
        loss = sum(c.loss for c in found)
        assert loss <= last
        last = loss


@pytest.mark.parametrize("seed", range(5))
def test_an_allocation_is_near_the_best_of_all(seed):
    layers = curves(seed, 5)
    for bits in (2.3, 3.1, 4.7):
        limit = budget(layers, bits)
        every = itertools.product(*(layer.choices for layer in layers))
        best = min(sum(c.loss for c in cs) for cs in every if spent(layers, cs) <= limit)
        found = sum(c.loss for c in allocate(layers, bits))
        # The bound of the relaxed problem: less than the one step that did not fit.
        step = max(
            a.loss - b.loss for layer in layers for a, b in itertools.pairwise(layer.choices)
        )
        assert best * (1 - 1e-9) <= found < best + step
        assert found < 1.5 * best


def test_layers_that_are_all_alike_get_one_rate():
    codecs = options("uniform", RATES)
    choices = tuple(Choice(r, c, r, 0.0 if c is None else 4.0**-r) for r, c in codecs.items())
    layers = [LayerCurve(str(i), (64, 64), choices) for i in range(7)]
    assert {c.rate for c in allocate(layers, 4)} == {4}
    assert sorted(c.rate for c in allocate(layers, 3.5)) == [3] * 4 + [4] * 3


def test_the_candidates_are_the_rates_a_codec_has_then_uniform_and_dense():
    assert options("trellis") == {
        **{r: Trellis(bits=r) for r in (1.5, 2, 2.5, 3, 3.5, 4)}, 8: Uniform(bits=8), 16: None
    }  # fmt: skip
    assert list(options("uniform(bits=4, group=128)")) == [2, 3, 4, 8, 16]
    assert options("uniform(bits=4, group=128)")[3] == Uniform(bits=3, group=128)
    with pytest.raises(ValueError, match="two rates"):
        options("trellis", (2, 16))
    with pytest.raises(ValueError, match="unknown codec"):
        options("nonsense")


@pytest.mark.parametrize("codec", [Trellis(bits=2.5), Uniform(bits=3, group=32), None])
@pytest.mark.parametrize("shape", [(128, 256), (40, 72)])
def test_stored_bits_are_what_encoding_stores(codec, shape):
    want = 16 * shape[0] * shape[1] if codec is None else codec.encode(torch.randn(shape)).bits
    assert stored_bits(codec, shape) == want


# --- sensitivity ---


@pytest.mark.parametrize("codec", ["uniform", "trellis"])
def test_the_predicted_loss_is_the_divergence_that_one_layers_error_causes(model, tokens, codec):
    codecs = {3.0: options(codec)[3.0], 4.0: options(codec)[4.0]}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    found, unit = measure(model, names, codecs, calls_from(tokens, 8), progress=False)
    assert unit == "nats per token"
    for curve in found:
        for choice in curve.choices:
            other = copy.deepcopy(model)
            pair = [(curve.name, choice.codec), ("*", None)]
            rs.compress(other, calibration=tokens, plan=pair, progress=False)
            kl = rs.kl_divergence(other, model, tokens, context=16)
            # Second order, on half of the tokens, with labels drawn once.
            assert kl / 1.6 < choice.loss < kl * 1.6


def test_rows_of_a_large_layer_stand_for_all_of_them(tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 1024), nn.Linear(1024, 40))
    codecs, calls = options("uniform", (2, 3, 4)), calls_from(tokens, 8)
    (some,), _ = measure(model, ["1"], codecs, calls, progress=False)
    whole = copy.deepcopy(model)
    rs.compress(whole, calibration=tokens, plan=[("1", codecs[3]), ("*", None)], progress=False)
    kl = rs.kl_divergence(whole, model, tokens, context=16)
    loss = next(c.loss for c in some.choices if c.rate == 3)
    assert kl / 1.3 < loss < kl * 1.3


def test_a_layer_that_counts_more_gets_more_bits_and_the_plan_beats_blind_ones(model, tokens):
    found = plan(model, 2.5, tokens)
    rates = {layer.name: found.chosen(layer).rate for layer in found.curves}
    assert all(rates[f"layers.{i}.loud"] > rates[f"layers.{i}.quiet"] for i in range(2))

    def kl(chosen) -> float:
        other = copy.deepcopy(model)
        rs.compress(other, calibration=tokens, plan=chosen, progress=False)
        return rs.kl_divergence(other, model, tokens, context=16)

    ours, two, three = kl(found), Uniform(bits=2), Uniform(bits=3)
    for raised in itertools.combinations(rates, 2):
        blind = [(n, three if n in raised else two) for n in rates]
        if set(raised) != {n for n in rates if "loud" in n}:
            assert ours < kl([*blind, ("*", None)])


def test_a_model_that_is_no_language_model_is_planned_by_its_outputs_error():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    x = torch.randn(256, 64)
    found = plan(net, 4, x)
    assert found.measure == "relative squared error of the output"
    other = copy.deepcopy(net)
    rs.compress(other, calibration=x, plan=found, progress=False)
    with torch.no_grad():
        error = rs.metrics.nmse(other(x), net(x))
    assert error / 1.6 < found.loss < error * 1.6


def test_a_layer_no_call_reaches_is_weighed_as_a_middling_one(model, tokens):
    model.layers[0].unused = nn.Linear(128, 128)
    found = plan(model, 3, tokens)
    losses = {layer.name: layer.choices[0].loss for layer in found.curves}
    others = [loss for name, loss in losses.items() if "unused" not in name]
    assert min(others) / 2 < losses["layers.0.unused"] < max(others) * 2


def test_without_calibration_the_weights_decide(model):
    found = plan(model, 2.5)
    assert "weights" in found.measure
    assert 0 < found.loss < 4 * len(found.curves)


def test_a_plan_is_the_same_every_time_and_leaves_the_model_alone(model, tokens):
    before = copy.deepcopy(model.state_dict())
    model.train()
    first, second = plan(model, 2.5, tokens), plan(model, 2.5, tokens)
    assert first == second
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # The curves do not depend on the target, so plans of one model compare.
    assert plan(model, 3, tokens).curves == first.curves


# --- what becomes of a plan ---


def test_a_plan_stores_no_more_than_its_target_and_says_so_before_any_work(model, tokens):
    found = plan(model, 2.5, tokens)
    layers = list(found.curves)
    assert found.stored <= budget(layers, 2.5)
    report = rs.compress(model, calibration=tokens, plan=found, progress=False)
    assert report.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert list(report.skipped) == ["head"]
    text = str(found)
    assert f"{found.bits_per_weight:.3f} bits each" in text
    assert f"predicted loss {found.loss:.4g} (nats per token)" in text
    assert "left dense: head" in text
    assert all(layer.name in text for layer in layers)


@pytest.mark.parametrize("calibrated", [True, False])
def test_compress_plans_by_itself_between_the_rates_of_a_codec(model, tokens, calibrated):
    data, other = tokens if calibrated else None, copy.deepcopy(model)
    report = rs.compress(
        model, 2.5, data, "uniform", plan=[("*.0.quiet", None)], skip=["head"], progress=False
    )
    codecs = {layer.codec for layer in report.layers}
    assert len(report.layers) == 3
    assert codecs > {Uniform(bits=2).spec} or len(codecs) > 1
    # 2 and 3 bits with a scale and a zero for each 64 weights.
    assert 2.5 < report.bits_per_weight <= 3
    want = plan(other, 2.5, data, skip=["head", "*.0.quiet"])
    rs.compress(other, calibration=data, plan=want, progress=False)
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_plan_says_it_all_and_a_layer_it_does_not_match_stays_dense(model):
    only = rs.Plan((("layers.*.loud", Uniform(bits=4)),))
    report = rs.compress(model, plan=only, progress=False)
    assert [layer.name for layer in report.layers] == ["layers.0.loud", "layers.1.loud"]
    assert list(report.skipped) == ["layers.0.quiet", "layers.1.quiet", "head"]


def test_a_plan_of_another_model_is_refused_before_anything_changes(model):
    wrong = rs.Plan((("*.loud", Uniform(bits=4)), ("body.*", Uniform(bits=4))))
    with pytest.raises(ValueError, match=r"'body\.\*', but the model has no such"):
        rs.compress(model, plan=wrong, progress=False)
    assert not any(isinstance(m, RBELinear) for m in model.modules())


@pytest.mark.parametrize("bits", [1.9, 17, math.nan, "2"])
def test_targets_outside_of_the_rates_are_refused_before_any_work(model, bits, monkeypatch):
    monkeypatch.setattr(Uniform, "encode", None)
    with pytest.raises(ValueError, match="bits must be between 2 and 16"):
        plan(model, bits)


def test_tied_small_and_head_layers_stay_dense_and_are_named():
    dense, _ = bigrams()
    found = plan(dense, 4, skip=["body.2"])
    assert [layer.name for layer in found.curves] == ["body.0"]
    assert found.skipped == ("body.2", "head")
    assert found.codec_of("head") is None


# --- JSON ---


def test_a_plan_survives_json_and_a_file(model, tokens, tmp_path):
    found = plan(model, 2.5, tokens, rates=(2, 3, 8, 16))
    assert rs.Plan.from_json(json.loads(json.dumps(found.to_json()))) == found
    found.save(tmp_path / "plan.json")
    assert rs.Plan.load(tmp_path / "plan.json") == found


def test_names_with_brackets_are_matched_as_they_are(tokens):
    net = nn.ModuleDict({"a[0]": nn.Linear(64, 64), "a0": nn.Linear(64, 64)})
    found = plan(net, 2.5)
    assert found.codec_of("a[0]") is not None
    assert {pattern for pattern, _ in found.entries} == {"a[[]0]", "a0"}


HAND = {"format": FORMAT, "version": 1,
        "entries": [{"pattern": "*.q", "codec": {"name": "uniform", "version": 1, "bits": 4}},
                    {"pattern": "*", "codec": None}]}  # fmt: skip
CURVE = {"name": "a", "shape": [4, 4],
         "choices": [{"rate": 16, "codec": None, "bits": 16, "loss": 0}]}  # fmt: skip


def test_a_plan_written_by_hand_needs_its_entries_only():
    found = rs.Plan.from_json(HAND)
    assert found.codec_of("layers.0.q") == Uniform(bits=4)
    assert found.codec_of("layers.0.k") is None
    assert str(found) == "*.q: uniform(bits=4, group=64)\n*: dense"
    assert math.isnan(rs.Plan.from_json(
        HAND | {"curves": [CURVE | {"name": "a.q"}]}).loss)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"entries": None}, "a plan's entries must be a list"),
        ({"format": "other"}, "format"),
        ({"version": 2}, "version 2"),
        ({"more": 1}, "a plan has no 'more'"),
        ({"bits": "two"}, "a plan's bits must be a number"),
        ({"bits": True}, "a plan's bits must be a number"),
        ({"measure": 3}, "a plan's measure must be text"),
        ({"skipped": [3]}, "a skipped layer must be text"),
        ({"entries": [{"pattern": "a"}]}, "an entry must have codec"),
        ({"entries": [{"pattern": 1, "codec": None}]}, "an entry's pattern must be text"),
        ({"entries": [{"pattern": "a", "codec": "trellis"}]}, "entry 'a': a codec's configuration"),
        ({"entries": [{"pattern": "a", "codec": {"name": "x"}}]}, "entry 'a': unknown codec"),
        ({"entries": ["a"]}, "an entry must be an object"),
        ({"curves": [3]}, "a curve must be an object"),
        ({"curves": [CURVE | {"shape": [4]}]}, "curve 'a': shape must be"),
        ({"curves": [CURVE | {"shape": [4, -1]}]}, "curve 'a': shape must be"),
        ({"curves": [CURVE | {"choices": []}]}, "curve 'a': its rates must"),
        ({"curves": [CURVE | {"choices": CURVE["choices"] * 2}]}, "curve 'a': its rates must"),
        ({"curves": [CURVE | {"choices": [{"rate": 1}]}]}, "curve 'a': a choice must have"),
    ],
)
def test_anything_but_a_plan_is_refused_in_one_sentence(change, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as caught:
        rs.Plan.from_json(HAND | change)
    assert "\n" not in str(caught.value)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(HAND | change))
    with pytest.raises(ValueError, match=r"plan\.json: this is not a plan: "):
        rs.Plan.load(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", "[" * 100_000, '"a"', "\ud800"])
def test_files_that_are_no_plans_are_refused_with_their_name(text, tmp_path):
    file = tmp_path / "plan.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"plan\.json: this is not a plan: "):
        rs.Plan.load(file)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        rs.Plan.load(tmp_path / "missing.json")


def test_a_plan_can_be_drawn_if_it_has_curves(model, tokens, tmp_path):
    pytest.importorskip("matplotlib")
    plan(model, 2.5, tokens).plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        rs.Plan.from_json(HAND).plot(tmp_path / "none.png")
