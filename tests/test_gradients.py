"""Gradients of whole layers against float64, and training that stops, goes on and is compiled.

Finite differences of every codec's reference are in test_ops.py.
"""

import copy
import io

import pytest
import torch
import walk
from torch import nn
from torch.utils.checkpoint import checkpoint

from reality_stone import ops, reference
from reality_stone.nn import RBELinear

DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)


def leaves(packed, dtype):
    """Params to differentiate by, in `dtype`; codes as they are."""
    return [
        p.to(dtype, copy=True).requires_grad_() if p.is_floating_point() else p
        for p in walk.values(packed)
    ]


def by_decode(packed, x, grad, dtype):
    """[dX, *dparams] of the dense computation in `dtype`; its weight is decoded in float32, as it
    would be loaded, but for the truth in float64."""
    params = leaves(packed, torch.float64 if dtype == torch.float64 else torch.float32)
    w = reference.decode(packed.codes, params, packed.codec.spec, packed.shape)
    x = x.to(dtype, copy=True).requires_grad_()
    (x @ w.to(dtype).t()).backward(grad.to(dtype))
    return [x.grad, *(p.grad for p in params if p.is_floating_point())]


def by_kernel(packed, x, grad):
    params = leaves(packed, torch.float32)
    x = x.clone().requires_grad_()
    ops.linear(x, packed.codes, params, packed.codec.spec, packed.shape).backward(grad)
    return [x.grad, *(p.grad for p in params if p.is_floating_point())]


@DEFAULTS
@pytest.mark.parametrize("isa", walk.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_within_twice_the_error_of_the_dense_computation(codec, isa, dtype):
    packed = walk.trained(walk.encoded(codec, (128, 256)))
    squares = []  # of four trials together: (kernel, dense) for x and each float param
    for seed in range(4):
        # Values exact in bfloat16, so that the truth has the same inputs.
        x = walk.gaussian(96, 256, seed=seed).bfloat16().to(dtype)
        grad = walk.gaussian(96, 128, seed=seed + 9).bfloat16().to(dtype)
        truth = by_decode(packed, x, grad, torch.float64)
        dense = by_decode(packed, x, grad, dtype)
        with ops.use_isa(isa), ops.accuracy("auto" if dtype == torch.bfloat16 else "exact"):
            got = by_kernel(packed, x, grad)
        assert [g.dtype for g in got] == [d.dtype for d in dense]
        squares.append(
            [[(a.double() - t).square().sum() for a, t in zip(found, truth, strict=True)]
             for found in (got, dense)]
        )  # fmt: skip
    kernel, dense = torch.tensor(squares).sum(0).sqrt()
    names = ["x", *(n for n, p in packed.params.items() if p.is_floating_point())]
    for name, a, b in zip(names, kernel, dense, strict=True):
        assert a <= 2 * b, (name, (a / b).item())


@DEFAULTS
def test_training_resumed_from_its_states_gives_identical_losses(codec):
    x = walk.gaussian(64, 64)
    torch.manual_seed(3)
    goal = nn.Linear(64, 48)(x).detach()

    def start():
        layer = RBELinear.from_packed(walk.encoded(codec, (48, 64)), torch.zeros(48))
        return layer, torch.optim.Adam(layer.parameters(), lr=1e-3)

    def steps(layer, optimiser, count):
        losses = []
        for _ in range(count):
            loss = (layer(x) - goal).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    layer, optimiser = start()
    steps(layer, optimiser, 4)
    file = io.BytesIO()
    torch.save({"model": layer.state_dict(), "optimiser": optimiser.state_dict()}, file)
    want = steps(layer, optimiser, 4)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, other = start()
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimiser"])
    assert steps(again, other, 4) == want
    assert len(set(want)) == 4


def block(codec) -> nn.Sequential:
    """Two layers, so that the first one's input gradient and params both matter."""
    torch.manual_seed(5)
    first = RBELinear.from_packed(walk.encoded(codec, (48, 64)), torch.randn(48))
    second = RBELinear.from_packed(walk.encoded(codec, (32, 48)))
    return nn.Sequential(first, nn.GELU(), second)


def grads(run, model, x):
    x = x.clone().requires_grad_()
    run(model, x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


@DEFAULTS
def test_a_compiled_forward_and_backward_has_the_gradients_of_the_eager_one(codec):
    model = block(codec)
    x = walk.gaussian(5, 64)
    want = grads(lambda m, x: m(x), copy.deepcopy(model), x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = grads(lambda _, x: compiled(x), model, x)
    for a, b in zip(got, want, strict=True):
        assert walk.same_bits(a, b)


@DEFAULTS
def test_reentrant_checkpoints_have_the_gradients_of_a_plain_pass(codec):
    model = block(codec)
    x = walk.gaussian(5, 64)
    want = grads(lambda m, x: m(x), copy.deepcopy(model), x)
    got = grads(lambda m, x: checkpoint(m, x, use_reentrant=True), model, x)
    for a, b in zip(got, want, strict=True):
        assert walk.same_bits(a, b)
