"""RBELinear, from a layer, from nothing or a file, computes, trains and travels as nn.Linear."""

import copy
import io
import pickle

import pytest
import torch
import walk
from torch import nn

from reality_stone.nn import RBELinear

DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
AUTO = 3e-3  # the promise of one product


def dense(n=64, out=48, bias=True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(n, out, bias)


def layer_of(codec, bias=True) -> RBELinear:
    packed = walk.encoded(codec, (48, 64))
    return RBELinear.from_packed(packed, torch.linspace(-1, 1, 48) if bias else None)


@DEFAULTS
@pytest.mark.parametrize("bias", [True, False])
def test_a_compressed_layer_computes_what_its_dense_layer_computes(codec, bias):
    linear = dense(bias=bias)
    layer = RBELinear.from_linear(linear, codec)
    x = walk.gaussian(2, 3, 64)
    back = layer.to_linear()
    assert torch.equal(back.weight, layer.weight)
    assert (back.bias is None) == (not bias)
    assert walk.relative(layer(x), back(x)) <= AUTO
    assert layer(x).shape == (2, 3, 48)
    assert walk.relative(layer.weight, linear.weight) < 1.0
    assert torch.equal(layer.packed.decode(), layer.weight)


@DEFAULTS
def test_training_mode_and_dtype_of_the_bias_follow_the_dense_layer(codec):
    linear = dense().eval().to(torch.bfloat16)
    layer = RBELinear.from_linear(linear, codec)
    assert not layer.training
    assert torch.equal(layer.bias, linear.bias)
    assert layer.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16


@DEFAULTS
def test_a_layer_from_nothing_starts_with_the_law_of_nn_linear(codec):
    layer = RBELinear(64, 48, codec=codec)
    assert layer(walk.gaussian(5, 64)).isfinite().all()
    assert layer.bias.abs().max() <= 1 / 8
    assert RBELinear(64, 48, bias=False, codec=codec).bias is None
    for n, out in [(0, 16), (16, 0), (1, 1), (17, 1000)]:
        assert RBELinear(n, out, codec=codec)(torch.zeros(2, n)).shape == (2, out)


def test_a_layer_takes_a_codec_by_name_by_text_and_with_settings():
    assert RBELinear(8, 4, codec="uniform", bits=3).codec.bits == 3
    assert RBELinear(8, 4, codec="uniform(bits=3, group=8)").codec.group == 8
    assert "bits/weight" in repr(RBELinear(8, 4, codec="uniform"))


@DEFAULTS
def test_any_batch_shape_works_empty_ones_too(codec):
    layer = layer_of(codec)
    for size in [(), (1,), (0,), (2, 0), (7,), (2, 3, 4)]:
        y = layer(torch.zeros(*size, 64))
        assert y.shape == (*size, 48)
        assert torch.equal(y, layer.bias.expand(y.shape))


@DEFAULTS
def test_a_state_dict_brings_a_fresh_layer_to_the_same_bits(codec):
    layer = layer_of(codec)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"codes", "bias", *layer.packed.params}
    x = walk.gaussian(3, 64)
    fresh = RBELinear(64, 48, codec=codec)
    fresh.load_state_dict(state)
    assert walk.same_bits(fresh(x), layer(x))
    with torch.device("meta"):
        meta = RBELinear(64, 48, codec=codec)
    assert meta.codes.device.type == "meta"
    meta.load_state_dict(state, assign=True)
    assert walk.same_bits(meta(x), layer(x))


@DEFAULTS
def test_copies_and_pickles_are_equal_and_independent(codec):
    layer, x = layer_of(codec), walk.gaussian(3, 64)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.codec == layer.codec
        assert walk.same_bits(other(x), want)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
            other.codes.zero_()
        assert walk.same_bits(layer(x), want)


@DEFAULTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrowed_layer_still_computes_and_trains(codec, dtype):
    layer = copy.deepcopy(layer_of(codec)).to(dtype)
    assert layer.codes.dtype == torch.uint8
    x = walk.gaussian(3, 64).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    want = x.float() @ layer.weight.t() + layer.bias.float()
    # The product's promise, and the result and the sum with the bias rounded to dtype.
    assert walk.relative(y, want) <= AUTO + 2 * torch.finfo(dtype).eps
    y.sum().backward()
    assert x.grad.dtype == dtype
    for p in layer.parameters():
        assert p.grad.dtype == dtype


@DEFAULTS
def test_autocast_computes_in_its_dtype_and_leaves_float32_gradients(codec):
    layer = copy.deepcopy(layer_of(codec))
    x = walk.gaussian(3, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


@DEFAULTS
def test_a_layer_can_be_planned_on_the_meta_device(codec):
    layer = RBELinear(64, 48, codec=codec, device="meta")
    assert all(p.device.type == "meta" for p in layer.parameters())
    assert layer(torch.empty(2, 5, 64, device="meta")).shape == (2, 5, 48)
    assert "bits/weight" not in repr(layer)
    real = layer.to_empty(device="cpu")
    real.set_packed(walk.encoded(codec, (48, 64)))
    assert torch.equal(real.weight, walk.encoded(codec, (48, 64)).decode())


@DEFAULTS
def test_training_the_params_lowers_a_loss_and_leaves_the_codes(codec):
    layer, target = copy.deepcopy(layer_of(codec)), dense()
    codes = {n: b.clone() for n, b in layer.named_buffers()}
    x = walk.gaussian(256, 64)
    goal = (1.3 * layer(x) + 0.1 * target(x)).detach()
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (layer(x) - goal).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, codes[name])
    layer.packed.check()


@DEFAULTS
def test_activation_checkpointing_gives_the_same_gradients(codec):
    from torch.utils.checkpoint import checkpoint

    grads = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        layer = copy.deepcopy(layer_of(codec))
        x = walk.gaussian(9, 64).requires_grad_()
        run(layer, x).pow(2).sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*grads, strict=True):
        assert walk.same_bits(a, b)


@DEFAULTS
def test_the_whole_layer_compiles_without_a_graph_break(codec):
    layer = copy.deepcopy(layer_of(codec))
    torch._dynamo.reset()  # one program, compiled for more codecs than it keeps versions of
    # aot_eager traces forward and backward through the fake kernels; it needs no C++ compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):
        x = walk.gaussian(batch, 64).requires_grad_()
        y = compiled(x)
        assert walk.same_bits(y.detach(), layer(x).detach())
        y.sum().backward()
        assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_model_with_a_compressed_layer_runs_under_the_default_compiler():
    model = nn.Sequential(layer_of(walk.DEFAULTS[-1]), nn.GELU(), nn.Linear(48, 8))
    x = walk.gaussian(4, 64)
    got = torch.compile(model, fullgraph=True)(x)
    assert walk.relative(got, model(x)) <= 1e-5  # the rest of the model is fused by the compiler


@DEFAULTS
def test_packed_weights_of_another_codec_or_shape_are_refused(codec):
    layer = copy.deepcopy(layer_of(codec))
    with pytest.raises(ValueError, match=r"expected .* of shape"):
        layer.set_packed(walk.random_layer(codec, (48, 32)))
    others = [c for c in walk.DEFAULTS if c != codec]
    with pytest.raises(ValueError, match=r"expected .* of shape"):
        layer.set_packed(walk.random_layer(others[0], (48, 64)))
    with pytest.raises(ValueError, match="features"):
        layer(torch.zeros(2, 63))
