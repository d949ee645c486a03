"""Error feedback from a Hessian: less error where the input lives, a right result from any."""

import math
import warnings

import pytest
import torch
import walk

EVERY = pytest.mark.parametrize("codec", walk.FEW, ids=walk.spec)
DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)


def inputs(features: int, rank: int, samples: int = 2048) -> torch.Tensor:
    """Correlated activations, a few directions much stronger than the others."""
    mix = walk.gaussian(rank, features, seed=3) * torch.logspace(1, -1, rank)[:, None]
    return walk.gaussian(samples, rank, seed=4) @ mix


def loss(packed, weight, hessian) -> float:
    """What the encoder minimises: tr (W-Q) H (W-Q)^T."""
    miss = packed.decode().double() - weight.double()
    return torch.einsum("ij,jk,ik->", miss, hessian.double(), miss).item()


def lowered(packed, plain, weight, hessian) -> bool:
    """Whether the Hessian helped: in its metric, or where one tile is a whole row (which leaves
    nothing to feed back) at least in that of its diagonal."""
    metrics = [hessian]
    if packed.codec.tile(packed.shape).cols >= packed.shape[1]:
        metrics.append(hessian.diagonal().diag())
    return any(loss(packed, weight, h) <= loss(plain, weight, h) for h in metrics)


@EVERY
def test_a_hessian_lowers_the_error_of_the_output(codec):
    weight, x = walk.gaussian(32, 128), inputs(128, 128)
    hessian = x.t() @ x / len(x)
    plain, fed = codec.encode(weight), codec.encode(weight, hessian)
    fed.check()
    assert lowered(fed, plain, weight, hessian)


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_feedback_never_leaves_a_weight_undecoded(codec):
    # Few columns: whole-row tiles, blocks that do not fill, padding.
    for shape in [(8, 5), (8, 16), (8, 33)]:
        x = inputs(shape[1], shape[1])
        weight = walk.gaussian(*shape)
        packed = codec.encode(weight, x.t() @ x / len(x))
        packed.check()
        # Less than leaving it out would lose, in the metric of the weight or of the input.
        metrics = [torch.eye(shape[1]), x.t() @ x / len(x)]
        zero = [(weight.double() @ h.double() * weight.double()).sum() for h in metrics]
        assert any(loss(packed, weight, h) < z for h, z in zip(metrics, zero, strict=True)), shape


@DEFAULTS
def test_encoding_with_feedback_is_deterministic(codec):
    weight, x = walk.gaussian(32, 64), inputs(64, 64)
    hessian = x.t() @ x
    with walk.threads(1):
        one = codec.encode(weight, hessian)
    with walk.threads(2):
        two = codec.encode(weight, hessian)
    assert torch.equal(one.codes, two.codes)


@DEFAULTS
def test_the_hessian_and_the_weight_are_left_alone(codec):
    weight, x = walk.gaussian(32, 64), inputs(64, 64)
    for dtype in (torch.float32, torch.float64):
        hessian = (x.t() @ x).to(dtype)
        kept = weight.clone(), hessian.clone()
        codec.encode(weight, hessian)
        assert torch.equal(weight, kept[0])
        assert torch.equal(hessian, kept[1])


@EVERY
@pytest.mark.parametrize("rank", [1, 8])
def test_a_singular_hessian_still_helps(codec, rank):
    weight, x = walk.gaussian(32, 128), inputs(128, rank)
    hessian = x.t() @ x / len(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = codec.encode(weight, hessian)
    if codec.tile((32, 128)).cols < 128:  # one free to leave out most of a row may go farther
        # Error moves to where the input is not.
        assert walk.relative(packed.decode(), weight) < 1.5
    assert lowered(packed, codec.encode(weight), weight, hessian)


@EVERY
@pytest.mark.parametrize("size", [1e-60, 1e-30, 1e30, 1e60])
def test_the_size_of_the_hessian_does_not_matter(codec, size):
    weight, x = walk.gaussian(16, 64), inputs(64, 64)
    hessian = (x.t() @ x / len(x)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = codec.encode(weight, hessian * size)
    # Powers of ten round: codes may differ here and there.
    want = loss(codec.encode(weight, hessian), weight, hessian)
    assert loss(packed, weight, hessian) <= 1.1 * want


@EVERY
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_useless_hessian_gives_a_warning_that_names_the_layer_and_a_plain_encode(codec, value):
    weight = walk.gaussian(16, 64)
    hessian = torch.eye(64) if value else torch.zeros(64, 64)
    hessian[3, 3] = value
    with pytest.warns(UserWarning, match=r"model\.layers\.7\.up_proj"):
        packed = codec.encode(weight, hessian, label="model.layers.7.up_proj")
    assert torch.equal(packed.codes, codec.encode(weight).codes)


@EVERY
def test_an_indefinite_hessian_never_breaks_the_encode(codec):
    weight = walk.gaussian(16, 64)
    x = walk.gaussian(64, 64)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        packed = codec.encode(weight, x + x.t() + torch.eye(64))
    packed.check()
    assert packed.decode().isfinite().all()


@DEFAULTS
@pytest.mark.parametrize("size", [(63, 63), (64, 63), (64,), (1, 64, 64)])
def test_a_hessian_of_another_shape_is_refused(codec, size):
    with pytest.raises(ValueError, match=r"hessian must be \(64, 64\)"):
        codec.encode(walk.gaussian(16, 64), torch.ones(size))


@DEFAULTS
def test_an_empty_weight_takes_a_hessian(codec):
    for shape in [(0, 16), (16, 0)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed = codec.encode(torch.zeros(shape), torch.eye(shape[1]))
        assert packed.decode().shape == shape
