"""TrainableRBELinear: trains, counts steps, encodes, resumes, and ends as RBELinear."""

import copy
import io
import pickle

import pytest
import torch
import walk
from torch import nn
from torch.utils.checkpoint import checkpoint

import reality_stone as rs
from reality_stone import training
from reality_stone.nn import RBELinear, TrainableRBELinear
from reality_stone.quantizers import SEQ, STE, Codebook, Gumbel

DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
QUANTIZERS = {
    "ste": lambda: STE(16, per_row=True),
    "gumbel": lambda: Gumbel.annealed(16, 20),
    "noise": lambda: Gumbel(4, tau=0.1, generator=torch.Generator().manual_seed(1)),
    "codebook": lambda: Codebook(8),
    "seq": lambda: SEQ(4),
}
EVERY_QUANTIZER = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)


def dense(bias=True, out=24, features=40):
    torch.manual_seed(5)
    return nn.Linear(features, out, bias)


def train(layer, steps, start=0, optimiser=None, every=0.0):
    """Losses of steps that fit a fixed other layer."""
    optimiser = optimiser or torch.optim.Adam(layer.parameters(), lr=3e-3)
    torch.manual_seed(9)
    goal, losses = nn.Linear(40, 24), []
    for i in range(start, start + steps):
        x = walk.gaussian(16, 40, seed=i)
        loss = (layer(x) - goal(x)).square().mean()
        loss = loss + every * training.quantization_loss(layer)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


# --- with the codes of a codec --------------------------------------------------------------------


@DEFAULTS
def test_every_codec_starts_at_its_codes_trains_and_ends_as_rbelinear_bit_for_bit(codec):
    linear = dense()
    layer = TrainableRBELinear.from_linear(linear, codec, requantize_every=4)
    packed = codec.encode(linear.weight)
    assert torch.equal(layer.packed.codes, packed.codes)
    x = walk.gaussian(5, 40)
    # float32 sums: weight + (Q - weight) rounds where Q does not.
    assert torch.allclose(layer(x), x @ packed.decode().t() + linear.bias, atol=1e-5)
    losses = train(layer, 12)
    assert losses[-1] < losses[0]
    weight = layer.weight.detach().clone()
    done = layer.finalize()
    want = RBELinear.from_packed(codec.encode(weight), done.bias)
    assert isinstance(done, RBELinear)
    for batch in (1, 5, 70):
        x = walk.gaussian(batch, 40, seed=batch)
        assert walk.same_bits(layer(x), want(x))
        assert walk.same_bits(done(x), want(x))
    assert torch.equal(layer.packed.codes, want.codes)
    assert not any(p.shape == weight.shape for p in layer.parameters())
    with pytest.raises(ValueError, match="the layer is finalized and has no master weight"):
        layer.finalize()
    with pytest.raises(ValueError, match="cannot requantize: the layer is finalized"):
        layer.requantize()


@DEFAULTS
def test_the_gradient_reaches_the_master_weight_straight_through(codec):
    layer = TrainableRBELinear.from_linear(dense(), codec)
    x, grad = walk.gaussian(5, 40), walk.gaussian(5, 24)
    for mode in (True, False):
        layer.train(mode).weight.grad = None
        layer(x).backward(grad)
        assert torch.allclose(layer.weight.grad, grad.t() @ x, atol=1e-5)
    with torch.no_grad():
        assert walk.same_bits(layer(x), layer.packed.linear(x) + layer.bias)


def test_the_layer_encodes_after_so_many_steps_and_follows_the_master_weight_in_between():
    layer = TrainableRBELinear.from_linear(dense(), "uniform(bits=2)", requantize_every=5)
    x = walk.gaussian(5, 40)
    for i in range(1, 13):
        before = layer.packed.codes.clone(), layer.offset.clone()
        layer(x)
        fresh = layer.codec.encode(layer.weight)
        if i in (6, 11):
            assert torch.equal(layer.packed.codes, fresh.codes)
        else:
            assert torch.equal(layer.packed.codes, before[0])
            assert torch.equal(layer.offset, before[1])
        with torch.no_grad():
            layer.weight.mul_(0.97)
    assert layer.steps == 12


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),  # leaves versions of tensors alone
    ],
    ids=["sgd", "foreach", "fused"],
)
def test_accumulation_recomputed_and_eval_forwards_are_no_steps(optimiser):
    layer = TrainableRBELinear.from_linear(dense(), "uniform(bits=4)", requantize_every=2)
    x = walk.gaussian(5, 40)
    step = optimiser(layer.parameters())
    for i in range(1, 6):
        for reentrant in (True, False):
            y = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)
            y.square().sum().backward()
        layer.eval()(x)
        layer.train()
        assert layer.steps == i
        step.step()
        step.zero_grad()


def test_recomputed_forwards_see_the_noise_of_the_first():
    x = walk.gaussian(5, 40).requires_grad_()
    found = []
    for again in (False, True):
        layer = TrainableRBELinear.from_linear(dense(), quantizer=QUANTIZERS["noise"]())
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        found.append(torch.autograd.grad(y.square().sum(), layer.weight)[0])
    assert torch.equal(*found)


def test_codes_follow_the_inputs_seen_with_a_hessian():
    few = walk.gaussian(4000, 6, seed=2) @ walk.gaussian(6, 40, seed=1)
    x = few + 0.3 * walk.gaussian(4000, 40, seed=3)
    linear, errors = dense(), []
    for hessian in (False, True):
        layer = TrainableRBELinear.from_linear(
            linear, "palette(bits=2)", hessian=hessian, requantize_every=3
        )
        for part in x.split(100)[:30]:
            layer(part)
            with torch.no_grad():
                layer.weight.add_(0)
        errors.append((layer.packed.linear(x) - x @ linear.weight.t()).square().mean())
    assert errors[1] < 0.8 * errors[0]
    want = x[:3000].t() @ x[:3000] / 3000
    assert walk.relative(layer.hessian, want) < 0.05  # the mean of all batches while they are few


def test_the_moment_of_inputs_is_gathered_in_float32_under_autocast():
    layer = TrainableRBELinear.from_linear(dense(), "trellis(bits=2)", hessian=True)
    x = walk.gaussian(50, 40)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert walk.relative(layer.hessian, x.t() @ x / 50) < 1e-6  # float32 sums


def test_the_quantization_loss_is_the_mean_squared_difference_and_pulls_weights_to_codes():
    model = nn.Sequential(dense(), nn.Tanh(), nn.Linear(24, 10))
    training.latent(model, "uniform(bits=2)")
    layers = [model[0], model[2]]
    want = [(m.weight - m.packed.decode()).square().mean() for m in layers]
    assert torch.allclose(training.quantization_loss(model), sum(want) / 2)
    assert torch.allclose(training.quantization_loss(model, "sum"), sum(want))
    training.quantization_loss(model).backward()
    difference = layers[0].weight - layers[0].packed.decode()
    assert torch.allclose(layers[0].weight.grad, difference / layers[0].weight.numel(), atol=1e-7)
    with pytest.raises(ValueError, match="reduction must be mean or sum"):
        training.quantization_loss(model, "max")


# --- with a quantizer -----------------------------------------------------------------------------


@EVERY_QUANTIZER
def test_a_quantizers_layer_is_the_product_with_its_weight_and_lands_on_its_levels(make):
    layer = TrainableRBELinear.from_linear(dense(), quantizer=make())
    x = walk.gaussian(6, 40)
    q = layer.quantizer(layer.weight)
    assert torch.allclose(layer(x), x @ q.weight.t() + layer.bias, atol=1e-5)
    assert torch.allclose(training.quantization_loss(layer), q.loss, rtol=1e-5)
    losses = train(layer, 20, every=0.1)
    assert losses[-1] < losses[0]
    layer.eval()
    hard = layer.quantizer(layer.weight).weight
    soft = layer(x)
    done = layer.finalize()
    assert done.codec.name == "palette"
    # Levels and scales are held in float16: 2^-11 of a weight each.
    assert walk.relative(done.weight, hard) <= 2.0**-10
    assert walk.relative(done(x), soft) <= 2.0**-8 + 3e-3  # and the promise of one product
    assert all(p.grad is None for p in layer.layer.params)


@pytest.mark.parametrize(
    ("quantizer", "codec", "lands"),
    [
        (STE(16), "uniform(bits=4, group=32)", True),
        (STE(16), "uniform(bits=4, group=7, symmetric=True)", True),
        (STE(3), "uniform(bits=2, group=40, symmetric=True)", True),
        (SEQ(4), "uniform(bits=2, group=16)", True),
        (SEQ(3), "uniform(bits=2, group=16)", True),
        (STE(200, per_row=True), None, True),
        (Gumbel(4), "uniform(bits=2, group=40)", True),  # before its levels have learned
        (Gumbel(16), "palette(bits=4, group=10)", True),
        (Codebook(8, per_row=True), "palette(layout=words)", True),
        (Codebook(5), "palette(bits=3)", True),
        (SEQ(4), "uniform(bits=2, group=16, symmetric=True)", False),
        (Codebook(8), "uniform(bits=3)", False),
        (STE(16), "palette(bits=2)", False),
        (STE(4), "trellis(bits=2)", False),
    ],
    ids=lambda v: v.replace(" ", "") if isinstance(v, str) else None,
)  # fmt: skip
def test_levels_land_in_codecs_that_hold_them_and_are_encoded_in_others(quantizer, codec, lands):
    layer = TrainableRBELinear.from_linear(dense(), codec, quantizer=copy.deepcopy(quantizer))
    hard = layer.quantizer.hard(layer.weight).weight
    packed = layer.packed
    packed.check()
    error = walk.relative(packed.decode(), hard)
    assert error <= 2.0**-10 if lands else error > 2.0**-10
    assert walk.same_bits(layer.finalize().weight, packed.decode())


def test_a_finite_master_weight_is_asked_for():
    layer = TrainableRBELinear.from_linear(dense(), quantizer=STE(4))
    with torch.no_grad():
        layer.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"the weight is not finite at \(3, 4\)"):
        layer(torch.zeros(2, 40))
    layer = TrainableRBELinear.from_linear(dense(), "uniform(bits=4)")
    with torch.no_grad():
        layer.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"the weight is not finite at \(3, 4\)"):
        layer.finalize()
    layer.requantize_every = 1
    assert layer.layer is None  # nothing was lost


# --- state ----------------------------------------------------------------------------------------


def makers():
    for codec in ("trellis(bits=2)", "uniform(bits=3)", "palette(bits=2)"):
        yield (
            codec,
            lambda codec=codec: TrainableRBELinear.from_linear(
                dense(), codec, requantize_every=4, hessian=True
            ),
        )
    for name, make in QUANTIZERS.items():
        yield name, lambda make=make: TrainableRBELinear.from_linear(dense(), quantizer=make())


@pytest.mark.parametrize("make", [m for _, m in makers()], ids=[n for n, _ in makers()])
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_training_resumes_to_identical_losses(make, way):
    layer = make()
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-3)
    train(layer, 6, optimiser=optimiser, every=0.1)
    moments = copy.deepcopy(optimiser.state_dict())
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            other = make()
            other.weight.mul_(2)
        other.load_state_dict(torch.load(file))
    else:
        other = pickle.loads(pickle.dumps(layer)) if way == "pickle" else copy.deepcopy(layer)
    again = torch.optim.Adam(other.parameters(), lr=3e-3)
    again.load_state_dict(moments)
    want = train(layer, 6, start=6, optimiser=optimiser, every=0.1)
    assert train(other, 6, start=6, optimiser=again, every=0.1) == want
    assert layer.steps == other.steps == 12
    assert torch.equal(layer.finalize().codes, other.finalize().codes)


def test_a_state_of_another_codec_or_without_progress_is_refused():
    layer = TrainableRBELinear.from_linear(dense(), "uniform(bits=4)")
    other = TrainableRBELinear.from_linear(dense(), "palette(bits=4)")
    with pytest.raises(RuntimeError, match="codebook"):
        layer.load_state_dict(other.state_dict())
    state = layer.state_dict()
    del state["progress"]
    with pytest.raises(RuntimeError, match="progress"):
        layer.load_state_dict(state)


def test_half_precision_and_autocast_keep_the_master_weight_in_float32():
    for quantizer in (None, STE(16)):
        layer = TrainableRBELinear.from_linear(
            dense(), "uniform(bits=4)", quantizer=copy.deepcopy(quantizer)
        )
        x = walk.gaussian(5, 40)
        want = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert walk.relative(y, want) < 3 * 2.0**-8  # x, weight and y rounded to bfloat16
        y.float().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        weight = layer.weight.detach().clone()
        layer.to(torch.bfloat16)
        assert torch.equal(layer.weight, weight)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        assert layer.finalize()(x.bfloat16()).dtype == torch.bfloat16


def test_leading_sizes_empty_batches_and_no_bias():
    for quantizer in (None, Gumbel(4)):
        layer = TrainableRBELinear(40, 24, False, "uniform(bits=4)", copy.deepcopy(quantizer))
        x = walk.gaussian(2, 3, 40)
        for _ in ("latent", "final"):
            assert layer(x).shape == (2, 3, 24)
            assert layer(x[:, :0]).shape == (2, 0, 24)
            assert layer.eval()(x[0, 0]).shape == (24,)
            layer.train()
            if layer.layer is None:
                layer.finalize()


def test_the_forward_pass_compiles():
    for quantizer in (None, STE(16)):
        layer = TrainableRBELinear.from_linear(
            dense(), "uniform(bits=4)", quantizer=copy.deepcopy(quantizer)
        )
        x = walk.gaussian(5, 40)
        want = layer(x)
        compiled = torch.compile(layer, backend="aot_eager")
        assert torch.allclose(compiled(x), want, atol=1e-6)
        compiled(x).sum().backward()
        assert layer.weight.grad is not None


# --- models ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mid, self.head = nn.Linear(40, 24), nn.Linear(24, 24), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(torch.tanh(self.mid(torch.tanh(self.mid(torch.tanh(self.first(x)))))))


@pytest.mark.parametrize("quantizer", [None, SEQ(4), lambda name: STE(16)])
def test_a_model_goes_into_training_and_comes_out_as_packed_layers(quantizer, tmp_path):
    model = Net()
    bias = model.first.bias
    training.latent(model, None if quantizer else "uniform(bits=4)", quantizer, skip=["head"])
    assert isinstance(model.first, TrainableRBELinear)
    assert isinstance(model.head, nn.Linear)
    assert model.first.bias is bias
    x = walk.gaussian(5, 40)
    model(x).sum().backward()
    training.finalize(model)
    assert isinstance(model.first, RBELinear)
    assert [e.name for e in rs.swap.plan_of(model)] == ["first", "mid"]
    rs.save(model, tmp_path)
    other = Net()
    rs.load(other, tmp_path)
    assert walk.same_bits(other.eval()(x), model.eval()(x))
    for call in (training.finalize, training.quantization_loss):
        with pytest.raises(ValueError, match="the model has no trainable layers"):
            call(model)


def test_packed_layers_train_on_from_their_own_codes():
    model = nn.Sequential(RBELinear.from_linear(dense(), "trellis(bits=2)"), nn.ReLU())
    before = model[0].packed
    training.latent(model)
    assert model[0].codec == before.codec
    assert torch.equal(model[0].packed.codes, before.codes)
    assert not model[0].offset.any()
    training.finalize(model)
    # Encoding what the codes decode to finds them, or as good ones.
    assert walk.nmse(model[0].weight, before.decode()) < 0.02


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: TrainableRBELinear(4, 4, requantize_every=0), ValueError, "requantize_every must"),
        (lambda: TrainableRBELinear(4, 4, quantizer=3), TypeError, "quantizer must be a Quantizer"),
        (lambda: TrainableRBELinear(4, 4, codec="none"), ValueError, "unknown codec 'none'"),
        (lambda: training.latent(nn.Sequential(nn.ReLU())), ValueError, "no linear layers"),
        (lambda: training.latent(nn.Linear(3, 3)), ValueError, "itself the layer"),
        (lambda: training.latent(Net(), skip=["*"]), ValueError, "no linear layers"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_a_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()
