"""Watching layers in training: readings, alerts, changes of precision, and what optimisers do."""

import copy
import json
import math

import pytest
import torch
import walk
from torch import nn

from reality_stone.nn import RBELinear, lora
from reality_stone.training import Monitor
from reality_stone.training.optimisers import renew, table_params
from reality_stone.training.rates import next_rate, stored_bits
from reality_stone.training.sampling import RowSample, entropy, used

FEW = pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
WIDE = (0.0, 10.0)


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))


def packed(codec="uniform(bits=3, group=32)") -> nn.Sequential:
    model = dense()
    for i in (0, 2):
        model[i] = RBELinear.from_linear(model[i], codec)
    return model


# --- what is measured -----------------------------------------------------------------------------


@FEW
def test_sampled_rows_are_the_rows_of_the_whole_weight(codec):
    for shape in [(33, 50), (384, 64), (512, 40), (192, 32), (0, 16)]:
        layer = RBELinear.from_packed(walk.random_layer(codec, shape))
        sample = RowSample(layer, 128)
        assert torch.equal(sample.decode(), layer.weight[sample.index])
        if shape == (512, 40):
            assert len(sample.index) == 128
            assert sample.packed().shape == (128, 40)  # cut out, not decoded whole


def test_sampled_rows_follow_the_adapter_and_the_codec():
    layer = RBELinear.from_packed(walk.random_layer(walk.DEFAULTS[0], (512, 64)))
    sample = RowSample(layer, 128)
    for codec in walk.DEFAULTS:
        layer.recode(walk.random_layer(codec, (512, 64)))
        assert torch.equal(sample.decode(), layer.weight[sample.index])
    lora.add_lora(layer, rank=2)
    layer.adapter.b.data.normal_()
    want = (layer.weight + layer.adapter.weight)[sample.index]
    assert walk.relative(sample.decode(), want) <= 1e-6


def test_the_error_is_that_of_the_weight_or_of_the_outputs_seen():
    model, original = packed(), dense()
    monitor = Monitor(model, original, band=WIDE, rows=1000)
    monitor.step()
    for name, reading in monitor.latest().items():
        q, w = model.get_submodule(name).weight, original.get_submodule(name).weight
        assert reading.error == pytest.approx(walk.relative(q, w), rel=1e-6)
        assert reading.bits == model.get_submodule(name).bits_per_weight
    outputs = Monitor(model, original, band=WIDE, rows=1000, measure="output")
    assert outputs.step() == []
    assert not outputs.history  # nothing has been seen
    x = walk.gaussian(50, 64)
    model(x)
    outputs.step()
    want = walk.relative(x @ model[0].weight.t(), x @ original[0].weight.t())
    assert outputs.latest()["0"].error == pytest.approx(want, rel=1e-4)
    outputs.close()
    assert not model[0]._forward_pre_hooks


def test_the_average_moves_by_its_smoothing_and_without_a_reference_shows_the_drift():
    model = packed()
    monitor = Monitor(model, band=WIDE, smoothing=0.75, every=2)
    monitor.step()
    assert monitor.latest()["0"].error == 0
    with torch.no_grad():
        model[0].scale.mul_(1.1)
    monitor.step()  # between readings
    monitor.step()
    assert monitor.latest()["0"].error == pytest.approx(0.1, rel=1e-5)
    assert monitor.latest()["0"].average == pytest.approx(0.025, rel=1e-5)
    assert len(monitor.history) == 4


def test_entropy_counts_the_information_in_codes():
    assert entropy(torch.zeros(100, dtype=torch.uint8)) == 0
    assert entropy(torch.arange(256, dtype=torch.uint8)) == pytest.approx(8)
    assert entropy(torch.tensor([1, 1, 7, 7], dtype=torch.uint8)) == pytest.approx(1)
    assert entropy(torch.zeros(0, dtype=torch.uint8)) == 0


def test_used_counts_the_entries_of_a_table_that_codes_name():
    palette = walk.encoded(walk.rs.codec("palette", bits=2), (16, 64))
    assert used(palette) == {"codebook": 1.0}
    layer = RBELinear.from_packed(palette)
    layer.codes.zero_()
    one = Monitor(layer, band=WIDE)
    one.step()
    assert one.history[0].used == {"codebook": 0.25}
    assert one.history[0].entropy == 0


# --- alerts ---------------------------------------------------------------------------------------


def test_one_alert_when_the_average_leaves_its_band_and_another_after_it_was_back():
    model, seen = packed(), []
    monitor = Monitor(model, band=(0.0, 0.05), smoothing=0.0, alert=seen.append)
    scale = model[0].scale.detach().clone()
    for factor in (1.0, 1.2, 1.3, 1.0, 1.2):
        with torch.no_grad():
            model[0].scale.copy_(factor * scale)
        assert monitor.step() == []
    assert [a.step for a in seen] == [2, 5]
    assert seen == monitor.alerts
    assert "layer '0' at step 2: the relative error 0.2 is above 0.05" in str(seen[0])
    assert monitor.outside == {"0"}


def test_an_alert_is_a_warning_by_default_and_says_which_side():
    model = packed()
    monitor = Monitor(model[0], dense()[0], band=(0.9, 1.0))
    with pytest.warns(UserWarning, match="is below 0.9; nothing is changed"):
        monitor.step()


def test_a_weight_that_is_not_finite_is_an_alert_and_stays_out_of_the_average():
    model, seen = packed(), []
    monitor = Monitor(model, band=(0.0, 0.5), alert=seen.append)
    monitor.step()
    with torch.no_grad():
        model[0].scale[0, 0] = math.nan
    monitor.step()
    assert [a.layer for a in seen] == ["0"]
    assert monitor.averages["0"] == 0


# --- changes of precision -------------------------------------------------------------------------


@FEW
def test_the_next_rate_is_the_nearest_and_keeps_the_other_settings(codec):
    shape = (128, 256)
    up, down = next_rate(codec, shape, up=True), next_rate(codec, shape, up=False)
    size = stored_bits(codec, shape)
    assert up is None or stored_bits(up, shape) > size
    assert down is None or stored_bits(down, shape) < size
    if up is not None:
        back = next_rate(up, shape, up=False)  # a setting may itself be none of the usual rates
        assert back is None or stored_bits(back, shape) <= stored_bits(up, shape)
    assert size == walk.random_layer(codec, shape).codes.numel() * 8 + sum(
        p.numel() * (16 if p.is_floating_point() else 8)
        for p in walk.values(walk.random_layer(codec, shape))
    )


def test_settings_of_the_next_rate_by_example():
    def after(codec, up):
        found = next_rate(walk.rs.codec(codec), (128, 256), up)
        return found and found.spec

    assert after("trellis(bits=2, rotate=False)", True) == (
        "trellis(bits=2.5, rotate=False, search=exact)"
    )
    assert after("uniform(bits=3, group=32)", False) == "uniform(bits=2, group=32, symmetric=False)"
    assert after("uniform(bits=2)", False) is None
    assert after("uniform(bits=8)", True) is None
    assert after("palette(bits=2)", True) == "palette(layout=pair, bits=2.5, group=0)"
    assert after("cyclic(word=16, activation=int8)", True).startswith("cyclic(word=32")
    assert after("residual(base=uniform(bits=2))", True).startswith("residual(base=uniform(bits=3")


@DEFAULTS
def test_a_layer_takes_codes_of_any_other_codec(codec):
    layer = RBELinear.from_packed(walk.encoded(walk.DEFAULTS[0], (48, 64)), torch.zeros(48))
    x = walk.gaussian(3, 64)
    other = walk.encoded(codec, (48, 64))
    layer.recode(other)
    assert torch.equal(layer.weight, other.decode())
    fresh = RBELinear.from_packed(other, torch.zeros(48))
    assert walk.same_bits(layer(x).detach(), fresh(x).detach())
    assert set(layer.state_dict()) == set(fresh.state_dict())
    assert {n for n, _ in layer.named_parameters()} == {n for n, _ in fresh.named_parameters()}
    layer.codes.zero_()
    assert torch.equal(fresh.weight, other.decode())  # nothing is shared
    with pytest.raises(ValueError, match="expected a weight of"):
        layer.recode(walk.encoded(codec, (48, 32)))


def test_precision_rises_above_the_band_until_the_error_is_inside():
    model, original, seen = packed("uniform(bits=2, group=32)"), dense(), []
    monitor = Monitor(model, original, band=(0.0, 0.1), alert=seen.append, adapt=True)
    changed = [monitor.step() for _ in range(5)]
    assert changed[0] == ["0", "2"]
    assert changed[-1] == []
    assert [m.codec.bits for m in (model[0], model[2])] == [4, 4]
    assert all(walk.relative(model[i].weight, original[i].weight) <= 0.1 for i in (0, 2))
    assert "encoded anew as uniform(bits=3" in seen[0].action
    assert seen[0].codec == "uniform(bits=2, group=32, symmetric=False)"
    assert not monitor.outside


def test_precision_falls_below_the_band_but_not_past_it():
    model, original = packed("uniform(bits=8, group=32)"), dense()
    monitor = Monitor(model, original, band=(0.05, 0.12), alert=lambda a: None, adapt=True)
    for _ in range(8):
        monitor.step()
    assert [m.codec.bits for m in (model[0], model[2])] == [4, 4]
    assert monitor.step() == []
    # Where no rate is inside the band, the better one stays.
    tight = packed("uniform(bits=4, group=32)")
    seen = []
    monitor = Monitor(tight, original, band=(0.08, 0.09), alert=seen.append, adapt=True)
    state = {n: v.clone() for n, v in tight.state_dict().items()}
    assert monitor.step() == []
    assert all("nothing is changed" in a.action for a in seen)
    assert all(torch.equal(v, state[n]) for n, v in tight.state_dict().items())


def test_the_budget_holds_and_the_end_of_the_rates_is_said():
    model, original, seen = packed("uniform(bits=2, group=32)"), dense(), []
    before = Monitor(model, band=WIDE).bits_per_weight
    monitor = Monitor(
        model, original, band=(0.0, 0.1), alert=seen.append, adapt=True, budget=before + 0.8
    )
    changed = [monitor.step() for _ in range(4)]
    # One bit more for two thirds of the weights; then nothing that is left is cheap enough.
    assert changed == [["0"], [], [], []]
    assert before + 0.6 < monitor.bits_per_weight <= before + 0.8
    assert len(seen) == 3
    assert all("would exceed the budget" in a.action for a in seen[1:])
    top = packed("uniform(bits=8, group=32)")
    Monitor(top, original, band=(0.0, 1e-6), alert=seen.append, adapt=True).step()
    assert "has no higher rate" in seen[-1].action


def test_without_a_reference_a_layer_is_encoded_from_what_it_is():
    model = packed("uniform(bits=3, group=32)")
    monitor = Monitor(model[0], band=(0.01, 0.9), alert=lambda a: None, adapt=True)
    want = model[0].weight
    assert monitor.step() == [""]
    assert model[0].codec.bits == 2
    assert 0.05 < walk.relative(model[0].weight, want) < 0.9


def test_an_adapter_stays_and_the_codes_are_made_for_what_it_leaves():
    model, original = packed("uniform(bits=2, group=32)"), dense()
    lora.add_lora(model, rank=4, init="error", weights=original)
    monitor = Monitor(model, original, band=(0.0, 0.2), alert=lambda a: None, adapt=True)
    while monitor.step():
        pass
    for i in (0, 2):
        together = model[i].weight + model[i].adapter.weight
        assert walk.relative(together, original[i].weight) <= 0.2
        assert not model[i].scale.requires_grad
    model[0].recode(walk.encoded(walk.rs.codec("palette"), (128, 64)))
    assert not model[0].codebook.requires_grad
    lora.remove_lora(model)
    assert model[0].codebook.requires_grad


# --- optimisers -----------------------------------------------------------------------------------


def train(model, optimiser, x, goal) -> float:
    loss = (model(x) - goal).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def test_an_optimiser_goes_on_with_the_parameters_of_changed_layers():
    model, original = packed("palette(bits=2)"), dense()
    x = walk.gaussian(256, 64)
    goal = original(x).detach()
    optimiser = torch.optim.Adam(
        [
            {"params": list(table_params(model[0]).values()), "lr": 1e-3},
            {"params": [*table_params(model[2]).values(), model[2].bias], "lr": 2e-3},
        ]
    )
    monitor = Monitor(model, original, band=(0.0, 0.15), alert=lambda a: None, adapt=True)
    for _ in range(3):
        train(model, optimiser, x, goal)
    codebook, bias = model[0].codebook, model[2].bias
    changed = monitor.step(optimiser)
    assert changed == ["0", "2"]
    assert model[0].codebook is not codebook
    for group, i, lr in ((0, 0, 1e-3), (1, 2, 2e-3)):
        have = [id(p) for p in optimiser.param_groups[group]["params"]]
        assert {id(p) for p in table_params(model[i]).values()} <= set(have)
        assert optimiser.param_groups[group]["lr"] == lr
    everything = {id(p) for g in optimiser.param_groups for p in g["params"]}
    assert id(codebook) not in everything
    assert set(optimiser.state) == {bias}  # moments of other codes are dropped
    losses = [train(model, optimiser, x, goal) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for m in (model[0], model[2]) for p in m.params)
    optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))


def test_renewing_takes_names_as_they_come_and_go_and_leaves_strangers_alone():
    layer = RBELinear.from_packed(walk.encoded(walk.rs.codec("trellis"), (32, 48)))
    kept = nn.Parameter(torch.zeros(3))
    optimiser = torch.optim.SGD([kept, *layer.parameters()], lr=0.1)
    before = table_params(layer)
    layer.recode(walk.encoded(walk.rs.codec("palette"), (32, 48)))
    assert layer.out_scale is before["out_scale"]  # the same name and sizes
    renew(optimiser, before, table_params(layer))
    have = optimiser.param_groups[0]["params"]
    assert {id(p) for p in have} == {id(kept), id(layer.codebook), id(layer.out_scale)}
    other = torch.optim.SGD([kept], lr=0.1)
    renew(other, before, table_params(layer))
    assert other.param_groups[0]["params"] == [kept]


# --- records --------------------------------------------------------------------------------------


def test_a_resumed_monitor_goes_on_where_it_was():
    model, original = packed(), dense()

    def monitor():
        return Monitor(model, original, band=(0.0, 0.1), alert=lambda a: None, every=2)

    first, second = monitor(), monitor()
    for i in range(5):
        with torch.no_grad():
            model[0].scale.mul_(1.02)
        first.step()
        if i == 2:
            state = json.loads(json.dumps(first.state_dict()))
            second.load_state_dict(state)
        if i > 2:
            second.step()
    assert second.state_dict() == first.state_dict()
    assert second.alerts == first.alerts
    other = Monitor(model[0], band=WIDE)
    with pytest.raises(ValueError, match="state is of another model"):
        other.load_state_dict(first.state_dict())


def test_readings_are_written_as_json_and_shown_as_a_table(tmp_path):
    monitor = Monitor(packed(), dense(), band=(0.0, 0.01), alert=lambda a: None)
    monitor.step()
    monitor.save(tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    assert [r["layer"] for r in found["readings"]] == ["0", "2"]
    assert found["alerts"][0]["action"] == "nothing is changed"
    lines = str(monitor).splitlines()
    assert lines[0].split() == ["layer", "codec", "b/w", "error", "average", "entropy", "used"]
    assert len(lines) == 3
    assert lines[1].endswith("outside")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"band": (0.2, 0.1)}, "band must be"),
        ({"band": (-1, 0.1)}, "band must be"),
        ({"band": (0, math.nan)}, "band must be"),
        ({"smoothing": 1.0}, "smoothing must be"),
        ({"measure": "other"}, "measure must be"),
        ({"rows": 0}, "rows and every must be positive"),
        ({"budget": -1.0}, "budget must be positive"),
        ({"reference": {}}, "the reference of layer '0' must be"),
        ({"reference": nn.Sequential(nn.Linear(3, 4))}, "the reference of layer '0' must be"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        Monitor(packed(), **({"band": WIDE} | settings))
    with pytest.raises(ValueError, match="no compressed layers"):
        Monitor(dense(), band=WIDE)
