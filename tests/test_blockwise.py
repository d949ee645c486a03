"""Curvature at the outputs, feedback along both sides, and training block by block."""

import copy

import pytest
import torch
from models import Stack
from torch import nn

import reality_stone as rs
from reality_stone.blocks import Call
from reality_stone.codecs import Codec
from reality_stone.curvature import output_curvature
from reality_stone.nn import RBELinear
from reality_stone.packed import storage_dtype
from reality_stone.training import reconstruct


def moment(n: int, seed: int) -> torch.Tensor:
    """A second moment whose eigenvalues fall as those of real activations do."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.arange(1, n + 1, dtype=torch.float64) ** -1.5) @ basis.t()


def cost(error: torch.Tensor, h: torch.Tensor, f: torch.Tensor) -> float:
    error = error.double()
    return torch.trace(f @ error @ h @ error.t()).item()


@pytest.mark.parametrize(
    "codec", ["trellis(bits=2)", "uniform(bits=3, group=32)", "palette", "cyclic", "bitfield"]
)
def test_errors_fed_back_along_both_sides_cost_less(codec):
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    h, f = moment(160, 1), moment(96, 2)
    codec = rs.codec(codec)
    one, both = codec.encode(weight, h), codec.encode(weight, h, f)
    assert cost(both.decode() - weight, h, f) < 0.9 * cost(one.decode() - weight, h, f)
    rs.ops.check_codes(both.codes, list(both.params.values()), codec.spec, (96, 160))


def test_outputs_that_blocks_do_not_cover_are_left_out():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    codec = rs.codec("uniform(bits=2, group=32)")
    one, both = (
        codec.encode(weight, moment(64, 1)),
        codec.encode(weight, moment(64, 1), moment(24, 2)),
    )
    assert torch.equal(one.codes, both.codes)


def test_a_moment_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(32, 32\)"):
        rs.codec("trellis").encode(torch.randn(32, 64), moment(64, 1), moment(64, 2))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 16), nn.Linear(16, 8)

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_curvature_at_logits_is_the_covariance_of_the_labels():
    torch.manual_seed(0)
    model = Head().eval()
    tokens = torch.randint(8, (64, 512))
    found = output_curvature(model, [Call((t,)) for t in tokens.split(8)], ["head"], progress=False)
    p = model(tokens).softmax(-1).flatten(0, 1)
    want = torch.diag(p.mean(0)) - p.t() @ p / len(p)
    # 32,768 draws: a deviation of about 1/sqrt(32768) of the largest entry, times three.
    assert torch.allclose(found["head"], want, atol=3 * 32768**-0.5 * want.abs().max().item())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.fixture
def models():
    torch.manual_seed(0)
    dense = Stack(3).eval()
    packed = copy.deepcopy(dense)
    rs.compress(packed, bits=2, progress=False, skip=["head"])
    return dense, packed


@pytest.fixture
def tokens():
    return torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(2))


def codes_of(model):
    return {n: m.codes.clone() for n, m in model.named_modules() if isinstance(m, RBELinear)}


@pytest.mark.parametrize("codes", [False, True])
def test_blocks_come_closer_to_the_dense_model(models, tokens, codes):
    dense, packed = models
    before, first = rs.kl_divergence(packed, dense, tokens, context=16), codes_of(packed)
    size = [m.bits_per_weight for m in packed.modules() if isinstance(m, RBELinear)]
    done = []
    report = reconstruct(
        packed, dense, tokens, codes=codes, steps=30, progress=False, after=done.append
    )
    assert rs.kl_divergence(packed, dense, tokens, context=16) < 0.8 * before
    same = [torch.equal(c, first[n]) for n, c in codes_of(packed).items()]
    assert not any(same) if codes else all(same)
    assert done == ["blocks.0", "blocks.1", "blocks.2"] == [b.name for b in report.blocks]
    assert all(b.accepted and b.after < b.before for b in report.blocks)
    assert [m.bits_per_weight for m in packed.modules() if isinstance(m, RBELinear)] == size
    params = [p for m in packed.modules() if isinstance(m, RBELinear) for p in m.params]
    assert all(storage_dtype(p.detach()) == torch.float16 for p in params)


def test_a_run_that_skips_the_blocks_of_an_earlier_one_ends_the_same(models, tokens):
    dense, packed = models
    whole, parts = copy.deepcopy(packed), packed
    reconstruct(whole, dense, tokens, steps=5, progress=False)

    class Stop(Exception):
        pass

    def stop(name):
        if name == "blocks.1":
            raise Stop

    with pytest.raises(Stop):
        reconstruct(parts, dense, tokens, steps=5, progress=False, after=stop)
    skip = ["blocks.0", "blocks.1"]
    reconstruct(parts, dense, tokens, steps=5, progress=False, skip=skip)
    assert all(torch.equal(c, codes_of(whole)[n]) for n, c in codes_of(parts).items())


def test_an_interrupt_inside_a_block_leaves_it_as_it_was(models, tokens, monkeypatch):
    dense, packed = models
    first, original, calls = codes_of(packed), Codec.encode, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Codec, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(packed, dense, tokens, steps=2, progress=False)
    assert all(torch.equal(c, first[n]) for n, c in codes_of(packed).items())


def test_a_block_that_gains_nothing_is_put_back(models, tokens):
    _, packed = models
    # The packed model's own decoded weights: nothing can be better than no error.
    teacher = rs.dequantize(copy.deepcopy(packed))
    first = codes_of(packed)
    report = reconstruct(packed, teacher, tokens, steps=2, precision="float32", progress=False)
    assert not any(b.accepted for b in report.blocks)
    assert all(torch.equal(c, first[n]) for n, c in codes_of(packed).items())


def test_a_teacher_with_other_layers_is_refused(models, tokens):
    _, packed = models
    with pytest.raises(ValueError, match="blocks"):
        reconstruct(packed, Head(), tokens, progress=False)
    with pytest.raises(ValueError, match="no compressed layers"):
        reconstruct(Stack(3), Stack(3), tokens, progress=False)
    with pytest.raises(ValueError, match="steps"):
        reconstruct(packed, packed, tokens, steps=0, progress=False)
    with pytest.raises(ValueError, match="precision"):
        reconstruct(packed, packed, tokens, precision="half", progress=False)
