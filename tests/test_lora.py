"""Adapters beside frozen codes: what they compute, train, cost, and how they travel."""

import copy
import io
import json

import pytest
import torch
import walk
from models import bigrams
from torch import nn
from torch.utils.checkpoint import checkpoint

import reality_stone as rs
from reality_stone import tensorfile
from reality_stone.feedback import Hessian
from reality_stone.nn import RBELinear, lora
from reality_stone.training import finetune_lora

DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
AUTO = 3e-3  # the promise of one product
CODEC = "uniform(bits=3, group=16)"


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 24, bias=False))


def packed(codec=CODEC) -> nn.Sequential:
    model = dense()
    for i in (0, 2):
        model[i] = RBELinear.from_linear(model[i], codec)
    return model


def moved(model, seed=1):
    """Adapters as after some training."""
    for i, p in enumerate(lora.lora_parameters(model)):
        p.data.add_(0.1 * walk.gaussian(*p.shape, seed=seed + i))
    return model


@DEFAULTS
def test_an_adapter_adds_its_product_and_only_it_trains(codec):
    layer = RBELinear.from_packed(walk.encoded(codec, (48, 64)), torch.linspace(-1, 1, 48))
    x = walk.gaussian(2, 5, 64)
    before = layer(x).detach()
    assert lora.add_lora(layer, rank=4, alpha=8) == [""]
    assert walk.same_bits(layer(x).detach(), before)
    moved(layer)
    a, b = layer.adapter.a, layer.adapter.b
    want = x @ (layer.weight + 2 * b.detach() @ a.detach()).t() + layer.bias.detach()
    assert walk.relative(layer(x), want) <= 2 * AUTO
    layer(x).square().sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {
        "adapter.a",
        "adapter.b",
    }
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"adapter.a", "adapter.b"}
    assert walk.relative(layer.to_linear()(x), want) <= AUTO


def test_gradients_of_an_adapter_are_those_of_the_dense_sum():
    layer = moved(RBELinear.from_linear(dense()[0], CODEC, lora_rank=5))
    x = walk.gaussian(7, 32).requires_grad_()
    grad = walk.gaussian(7, 48, seed=3)
    layer(x).backward(grad)
    a, b = (p.detach().double().requires_grad_() for p in layer.adapter.parameters())
    wide = x.detach().double().requires_grad_()
    weight = layer.weight.double() + b @ a
    (wide @ weight.t() + layer.bias.double()).backward(grad.double())
    # Products of a few dozen float32 numbers; the codes' own in bfloat16 where that is fast.
    assert walk.relative(layer.adapter.a.grad, a.grad) <= 1e-5
    assert walk.relative(layer.adapter.b.grad, b.grad) <= 1e-5
    assert walk.relative(x.grad, wide.grad) <= AUTO


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_computes_in_the_dtype_of_x_and_trains_in_its_own(dtype):
    layer = moved(RBELinear.from_linear(dense()[0], CODEC, lora_rank=4))
    x = walk.gaussian(6, 32)
    want = layer(x).detach()
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    # Five roundings: of x, A, the product with it, B and the sum.
    assert walk.relative(y.detach(), want) <= 5 * torch.finfo(dtype).eps
    y.float().square().mean().backward()
    assert layer.adapter.a.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        again = layer(x)
    assert again.dtype == dtype
    assert torch.equal(again, y)
    narrow = copy.deepcopy(layer).to(dtype)
    narrow(x.to(dtype)).float().square().mean().backward()
    assert narrow.adapter.b.grad.dtype == dtype


def test_adapters_in_bfloat16_are_made_and_trained():
    model = packed()
    lora.add_lora(model, rank=4, dtype=torch.bfloat16)
    model(walk.gaussian(3, 32)).square().sum().backward()
    assert {p.grad.dtype for p in lora.lora_parameters(model)} == {torch.bfloat16}
    assert lora.lora_bits(model) == 16 * 4 * (32 + 48 + 48 + 24)


def test_dropout_acts_in_training_alone():
    layer = RBELinear.from_linear(dense()[0], CODEC)
    lora.add_lora(layer, rank=4, dropout=0.5)
    moved(layer)
    x = walk.gaussian(4, 32)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_copies_state_dicts_checkpointing_and_the_compiler_know_adapters():
    model = moved(add(packed()))
    x = walk.gaussian(5, 32).requires_grad_()
    want = model(x)
    assert walk.same_bits(copy.deepcopy(model)(x).detach(), want.detach())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = add(packed())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert walk.same_bits(fresh(x).detach(), want.detach())
    want.square().sum().backward()
    checkpoint(fresh, x.detach().requires_grad_(), use_reentrant=False).square().sum().backward()
    for p, q in zip(lora.lora_parameters(model), lora.lora_parameters(fresh), strict=True):
        assert walk.same_bits(p.grad, q.grad)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    y = compiled(x.detach())
    assert walk.same_bits(y.detach(), want.detach())
    y.square().sum().backward()


def add(model, rank=4, **settings):
    lora.add_lora(model, rank, **settings)
    return model


def test_the_packed_names_stay_and_the_adapters_own_are_apart():
    model = packed()
    names = set(model.state_dict())
    own = {f"{i}.adapter.{k}" for i in (0, 2) for k in "ab"}
    assert set(add(model).state_dict()) == names | own


def test_targets_choose_layers_and_the_rest_trains_as_before():
    model = packed()
    assert lora.add_lora(model, rank=2, targets=["2"]) == ["2"]
    assert model[0].adapter is None
    assert model[0].scale.requires_grad
    assert not model[2].scale.requires_grad
    assert list(lora.adapters(model)) == ["2"]


def test_removing_adapters_brings_the_layers_back_as_they_were():
    model = packed()
    model[0].bias.requires_grad_(False)
    x = walk.gaussian(4, 32)
    want, flags = model(x), {n: p.requires_grad for n, p in model.named_parameters()}
    moved(add(model))
    assert not torch.equal(model(x), want)
    assert lora.remove_lora(model) == ["0", "2"]
    assert walk.same_bits(model(x).detach(), want.detach())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert lora.remove_lora(model) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number from 1"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": 25}, "layer '2': an adapter of rank 25 does not fit a layer of 24 x 48"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("inf")}, "alpha must be positive and finite"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"targets": ["nothing"]}, "no compressed layer matches 'nothing'"),
        ({"init": "other"}, "init must be 'zero' or 'error'"),
        ({"init": "error"}, "weights= are needed"),
        ({"weights": {}}, "weights= are needed"),
        ({"init": "error", "weights": {}}, "layer '0' needs a dense weight"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence_and_change_nothing(settings, message):
    model = packed()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lora.add_lora(model, **({"rank": 4} | settings))
    assert set(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_and_a_model_without_codes_are_refused():
    with pytest.raises(ValueError, match="layer '0' has an adapter already"):
        add(add(packed()))
    with pytest.raises(ValueError, match="no compressed layers"):
        lora.add_lora(dense())


def test_a_layer_made_with_a_rank_has_its_adapter():
    layer = RBELinear(32, 16, codec=CODEC, lora_rank=3)
    assert layer.adapter.rank == 3
    assert not layer.scale.requires_grad
    assert not layer.bias.requires_grad
    planned = RBELinear(32, 16, codec=CODEC, lora_rank=3, device="meta")
    assert planned(torch.empty(2, 32, device="meta")).shape == (2, 16)
    real = planned.to_empty(device="cpu")
    real.reset_parameters()
    assert not real.adapter.b.any()
    assert real(walk.gaussian(2, 32)).isfinite().all()


# --- a start at the error of the codes ------------------------------------------------------------


def hessian(n=64, seed=4) -> torch.Tensor:
    """Of inputs most of whose power lies in a few directions."""
    x = walk.gaussian(4 * n, n, seed=seed) * torch.linspace(0, 2, n).pow(4).add(0.05)
    x = x @ torch.linalg.qr(walk.gaussian(n, n, seed=seed + 1)).Q
    return (x.t() @ x).double() / len(x)


@pytest.mark.parametrize("metric", [False, True])
def test_a_start_at_the_error_is_the_best_term_of_its_rank(metric):
    linear, rank = nn.Linear(64, 40), 6
    h = hessian() if metric else None
    layer = RBELinear.from_linear(linear, "uniform(bits=2, group=64)", h)
    error = (linear.weight - layer.weight).detach().double()
    lora.add_lora(
        layer, rank, alpha=2, init="error", weights={"": linear.weight},
        hessians={"": h} if metric else None,
    )  # fmt: skip
    left = error - layer.adapter.weight.double()
    lower = torch.eye(64, dtype=torch.float64)
    if metric:
        lower = torch.linalg.cholesky(Hessian.prepare(h, 64, "").damped().double())
    values = torch.linalg.svdvals(error @ lower)
    best = values[rank:].square().sum()  # Eckart and Young
    # The subspace is found by iteration, on a spectrum that falls slowly.
    assert best * (1 - 1e-4) <= (left @ lower).square().sum() <= best * 1.01
    assert best < 0.9 * values.square().sum()


def test_a_start_at_the_error_takes_the_dense_model_by_names():
    model, original = packed("uniform(bits=2, group=48)"), dense()
    x = walk.gaussian(200, 32)
    want = original(x)
    before = (model(x) - want).norm()
    lora.add_lora(model, 8, init="error", weights=original)
    assert (model(x) - want).norm() < 0.8 * before


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [False, True])
def test_a_merge_says_what_it_costs(metric):
    layer = moved(add(RBELinear.from_linear(nn.Linear(64, 48), "uniform(bits=6, group=16)")))
    h = hessian() if metric else None
    x = walk.gaussian(300, 64)
    want = layer(x).detach()
    target = layer.weight + layer.adapter.weight
    found = lora.merge(layer, h)
    assert layer.adapter is None
    assert layer.scale.requires_grad
    error = rs.metrics.hessian_nmse(layer.weight, target, h) if metric else walk.nmse(
        layer.weight, target
    )  # fmt: skip
    assert found.error == pytest.approx(error, rel=1e-4)
    assert found.error < found.dropped
    if not metric:
        bias = layer.bias.detach()
        # The cost is that of the outputs, up to the chance of 300 inputs and the product's own.
        assert walk.nmse(layer(x).detach() - bias, want - bias) <= 1.3 * found.error + AUTO**2


def test_a_merge_that_costs_more_than_the_adapter_brings_is_refused():
    layer = add(RBELinear.from_linear(nn.Linear(64, 48), "uniform(bits=2, group=64)"))
    layer.scale.data.mul_(1.02)  # trained since: its codes are no longer those of the encoder
    layer.adapter.b.data.copy_(1e-4 * walk.gaussian(48, 4))
    state = {n: v.clone() for n, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match="keep the adapter, or use more bits"):
        lora.merge(layer)
    assert layer.adapter is not None
    assert all(torch.equal(v, state[n]) for n, v in layer.state_dict().items())
    lora.remove_lora(layer)
    with pytest.raises(ValueError, match="one compressed layer that has an adapter"):
        lora.merge(layer)


# --- files ----------------------------------------------------------------------------------------


def test_an_adapter_file_brings_the_same_outputs_to_the_same_codes(tmp_path):
    model = moved(add(packed(), alpha=6, dropout=0.25))
    file = lora.save_adapter(model, tmp_path / "a.safetensors")
    again = packed()
    assert lora.load_adapter(again, file) == ["0", "2"]
    x = walk.gaussian(3, 32)
    assert walk.same_bits(again.eval()(x).detach(), model.eval()(x).detach())
    assert again[0].adapter.alpha == 6
    assert again[0].adapter.dropout == 0.25
    assert not again[0].scale.requires_grad
    from safetensors.torch import load_file

    tensors = load_file(file)
    assert set(tensors) == {f"{i}.{k}" for i in (0, 2) for k in "ab"}


def test_loading_keeps_the_parameters_of_like_adapters_and_takes_off_the_others(tmp_path):
    model = moved(add(packed(), targets=["0"]))
    file = lora.save_adapter(model, tmp_path / "a.safetensors")
    other = add(packed())
    own = other[0].adapter.a
    assert lora.load_adapter(other, file) == ["0"]
    assert other[0].adapter.a is own
    assert torch.equal(own, model[0].adapter.a)
    assert other[2].adapter is None
    assert other[2].scale.requires_grad
    third = add(packed(), rank=7)
    lora.load_adapter(third, file)
    assert third[0].adapter.rank == 4


def test_an_adapter_for_other_codes_warns(tmp_path):
    file = lora.save_adapter(moved(add(packed())), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="2 of 2 adapters were trained beside other codes"):
        lora.load_adapter(packed("uniform(bits=4, group=16)"), file)


def change(file, edit):
    """The file again with other tensors or another record."""
    header = tensorfile.read_header(file)
    with file.open("rb") as opened:
        tensors = {n: tensorfile.read_tensor(header, e, opened) for n, e in header.entries.items()}
    record = header.record(lora.METADATA)
    edit(tensors, record)
    tensorfile.write(file, tensors, {lora.METADATA: json.dumps(record)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, r: r.update(version=9), "version 9 is not known"),
        (lambda t, r: r["layers"]["0"].update(rank=5), r"layer '0': tensor '0.a' is .* rank 5"),
        (lambda t, r: r["layers"]["0"].update(rank="x"), "layer '0': rank must be a whole number"),
        (lambda t, r: r["layers"]["0"].update(alpha=-1), "layer '0': alpha must be positive"),
        (lambda t, r: r["layers"]["0"].update(dropout=None), "layer '0': dropout must be"),
        (lambda t, r: r["layers"]["0"].update(shape=[48, 31]), "the adapter is for"),
        (lambda t, r: r["layers"].update({"0": 3}), "layer '0': its shape"),
        (lambda t, r: r["layers"].update(x=r["layers"]["0"]), "no compressed layer 'x'"),
        (lambda t, r: r["layers"].pop("2"), "tensor '2.a' belongs to no layer"),
        (lambda t, r: t.pop("0.b"), "layer '0': tensor '0.b' is missing"),
        (lambda t, r: t["2.a"].fill_(float("nan")), "not finite"),
        (lambda t, r: r.pop("layers"), "no file of save_adapter"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence_and_changes_nothing(tmp_path, edit, message):
    file = lora.save_adapter(moved(add(packed())), tmp_path / "a.safetensors")
    change(file, edit)
    model = packed()
    with pytest.raises(ValueError, match=message) as caught:
        lora.load_adapter(model, file)
    assert "\n" not in str(caught.value)
    assert lora.adapters(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_files_that_are_no_adapters_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        lora.load_adapter(packed(), tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"junk" * 10)
    with pytest.raises(ValueError, match="not a safetensors file"):
        lora.load_adapter(packed(), tmp_path / "junk")
    with pytest.raises(ValueError, match="no adapters to save"):
        lora.save_adapter(packed(), tmp_path / "a")
    file = lora.save_adapter(moved(add(packed())), tmp_path / "a.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        lora.load_adapter(packed(), file)


def test_a_checkpoint_refuses_adapters_and_loads_under_them(tmp_path):
    model = packed()
    rs.save(model, tmp_path / "base")
    moved(add(model))
    with pytest.raises(ValueError, match="layer '0' has an adapter"):
        rs.save(model, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    x = walk.gaussian(3, 32)
    want = model(x).detach()
    model[0].codes.zero_()
    rs.load(model, tmp_path / "base")
    assert walk.same_bits(model(x).detach(), want)
    other = rs.codec("uniform(bits=4)").to_config()
    plan = [e.to_config() | {"codec": other} for e in rs.swap.plan_of(model)]
    with pytest.raises(ValueError, match="layer '0' has an adapter, made beside"):
        rs.replace(model, plan)
    assert walk.relative(rs.dequantize(model)(x), want) <= 2 * AUTO


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def models():
    return bigrams()


def test_training_adapters_brings_the_model_closer_and_changes_nothing_else(models):
    teacher, model = models
    tokens = torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(2))
    state = {n: v.clone() for n, v in model.state_dict().items()}
    before = rs.kl_divergence(model, teacher, tokens, context=12)
    report = finetune_lora(
        model, tokens, teacher, rank=4, targets=["body.*"], dropout=0.1, lr=1e-2, epochs=10,
        batch=16, progress=False,
    )  # fmt: skip
    assert rs.kl_divergence(model, teacher, tokens, context=12) < 0.7 * before
    assert list(lora.adapters(model)) == ["body.0", "body.2"]
    assert report.trained == sum(p.numel() for p in lora.lora_parameters(model))
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items() if n in state)
    assert lora.lora_bits(model) == 16 * report.trained
    assert not model.body[0].adapter.training
    again = finetune_lora(model, tokens, teacher, rank=9, lr=1e-4, progress=False)
    assert again.trained == report.trained  # the adapters there are
    with pytest.raises(ValueError, match="no batches"):
        finetune_lora(model, [], teacher)


def test_adapters_resumed_from_their_states_give_identical_losses():
    x = walk.gaussian(64, 32)
    goal = dense()(x).detach()

    def start():
        model = add(packed("uniform(bits=2, group=48)"))
        return model, torch.optim.AdamW(lora.lora_parameters(model), lr=1e-2)

    def steps(model, optimiser, count):
        losses = []
        for _ in range(count):
            loss = (model(x) - goal).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    model, optimiser = start()
    steps(model, optimiser, 5)
    state = copy.deepcopy((model.state_dict(), optimiser.state_dict()))
    want = steps(model, optimiser, 5)
    again, other = start()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert steps(again, other, 5) == want
    assert want[-1] < want[0]
