"""RBELayerNorm and RBERMSNorm against the dense norms with the decoded weights."""

import copy
import io
import pickle

import pytest
import torch
import walk
from torch import nn

import reality_stone as rs
from reality_stone.nn import RBELayerNorm, RBERMSNorm

N = 1100  # not a multiple of the group of 64
ROUNDING = 1e-6  # float32's, over the few operations of a norm


class LlamaNorm(nn.Module):
    """As transformers writes it."""

    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class GemmaNorm(nn.Module):
    """One more than its weight: no RMS norm of that weight."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))
        self.eps = 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def shuffled(norm: nn.Module) -> nn.Module:
    """Values that are not those of a fresh norm."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return norm


MAKES = {
    "layer norm": lambda n: (nn.LayerNorm(n), RBELayerNorm),
    "layer norm without bias": lambda n: (nn.LayerNorm(n, bias=False), RBELayerNorm),
    "layer norm of two dimensions": lambda n: (nn.LayerNorm((n // 4, 4), eps=1e-3), RBELayerNorm),
    "rms norm": lambda n: (nn.RMSNorm(n), RBERMSNorm),
    "llama norm": lambda n: (LlamaNorm(n), RBERMSNorm),
}
EACH = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def pair(make, n=N, **options):
    dense, kind = make(n)
    dense = shuffled(dense).eval()
    return dense, kind.from_norm(dense, **options)


def like(layer, *batch):
    return walk.gaussian(*batch, *layer.normalized_shape)


@EACH
def test_a_compressed_norm_computes_as_the_dense_one_with_its_decoded_weights(make):
    dense, layer = pair(make)
    assert layer.codec.bits == 8
    assert not layer.training
    back = layer.to_dense()
    assert torch.equal(back.weight, layer.weight)
    for x in (like(layer, 3), like(layer, 2, 6)[:, ::2], like(layer, 0), like(layer, 2, 0)):
        got = layer(x)
        assert got.shape == x.shape
        assert walk.relative(got, back(x)) <= ROUNDING
        assert walk.relative(got, dense(x)) < 0.005  # 8 bits of a range of about +-0.6 around 1
    # 18 groups of 64 codes, the last one padded, with scale and zero in float16.
    assert layer.bits_per_weight == pytest.approx(18 * (64 + 4) * 8 / N)


@EACH
def test_gradients_of_input_and_scales_are_those_through_the_decoded_weight(make):
    _, layer = pair(make)
    x, grad = like(layer, 5).requires_grad_(), like(layer, 5) + 1
    layer(x).backward(grad)
    back = layer.to_dense()
    twin = x.detach().clone().requires_grad_()
    back(twin).backward(grad)
    assert walk.relative(x.grad, twin.grad) <= ROUNDING
    dense_grad = torch.stack([p.grad.flatten() for p in back.parameters()])
    want = rs.ops.decode_grad_params(
        dense_grad, layer.codes, [p.detach() for p in layer.params], layer.codec.spec, layer.shape
    )
    for p, g in zip(layer.params, want, strict=True):
        assert p.grad.any()
        assert walk.relative(p.grad, g) <= 1e-5  # sums over a group of 64


@EACH
def test_a_norm_below_1024_elements_is_plain(make):
    dense, layer = pair(make, 1020)
    assert layer.codec is None
    assert "plain" in repr(layer)
    assert set(layer.state_dict()) == set(dense.state_dict())
    x = like(layer, 3)
    assert walk.relative(layer(x), dense(x)) <= ROUNDING
    layer.load_state_dict(dense.state_dict())
    layer(x).sum().backward()
    assert layer.weight.grad.any()
    assert walk.relative(layer.to_dense()(x), dense(x)) <= ROUNDING
    assert pair(make, 1020, smallest=512)[1].codec is not None
    assert pair(make, 2048, smallest=4096)[1].codec is None


@pytest.mark.parametrize("kind", [RBELayerNorm, RBERMSNorm])
@pytest.mark.parametrize("n", [64, N])
def test_a_norm_from_nothing_starts_as_torch_starts_it(kind, n):
    dense = {RBELayerNorm: nn.LayerNorm, RBERMSNorm: nn.RMSNorm}[kind](n)
    layer = kind(n)
    x = walk.gaussian(4, n)
    # The last, padded group of ones is off by a rounding of its scale to float16.
    assert walk.relative(layer(x), dense(x)) <= 1e-4
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.03)
    goal, losses = 0.5 * dense(x).detach(), []
    for _ in range(40):
        loss = (layer(x) - goal).pow(2).sum() / n
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert kind(n, elementwise_affine=False)(x).shape == x.shape


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_and_autocast_give_the_dtype_that_the_dense_norm_gives(make, dtype):
    dense, layer = pair(make)
    x = like(layer, 3)
    narrow = copy.deepcopy(layer).to(dtype)
    assert narrow(x.to(dtype)).dtype == dtype
    eps = torch.finfo(dtype).eps
    assert walk.relative(narrow(x.to(dtype)).float(), narrow.to_dense()(x)) <= 4 * eps
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            assert layer(given).dtype == layer.to_dense()(given).dtype
    assert dense(x).dtype == layer(x).dtype


@EACH
@pytest.mark.parametrize("n", [64, N])
def test_norms_travel_as_torch_norms_do(make, n):
    _, layer = pair(make, n)
    x = like(layer, 3)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = type(layer)._like(layer, layer.codec or "uniform", device="meta")
    assert fresh(x.to("meta")).shape == x.shape
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(fresh(x), want)
    moved = layer.to("meta")
    assert moved(x.to("meta")).is_meta


def test_a_norm_of_another_law_is_not_taken_for_an_rms_norm():
    class Gated(LlamaNorm):
        def forward(self, x, gate=None):
            return super().forward(x)

    assert RBERMSNorm.replaces(shuffled(LlamaNorm(8)))
    assert RBERMSNorm.replaces(LlamaNorm(8).to("meta"))
    for other in (
        GemmaNorm(8),
        GemmaNorm(8).to("meta"),
        Gated(8),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
    ):
        assert not RBERMSNorm.replaces(other)
    assert not RBELayerNorm.replaces(nn.LayerNorm(8, elementwise_affine=False))
    with pytest.raises(ValueError, match=r"RBELayerNorm stands for nn\.LayerNorm, got"):
        RBELayerNorm.from_norm(nn.RMSNorm(8))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(N, 64)
        self.norms = nn.ModuleList([nn.LayerNorm(N), LlamaNorm(N), nn.LayerNorm(64)])

    def forward(self, x):
        return self.norms[2](self.body(self.norms[1](self.norms[0](x))))


def test_a_plan_compresses_long_norms_and_a_checkpoint_brings_them_back(tmp_path):
    torch.manual_seed(0)
    model = shuffled(Model()).eval()
    dense = copy.deepcopy(model)
    plan = [("norms.*", "uniform(bits=8)"), ("body", None)]
    report = rs.compress(model, plan=plan, progress=False)
    assert [(layer.name, layer.shape) for layer in report.layers] == [
        ("norms.0", (2, N)), ("norms.1", (1, N))
    ]  # fmt: skip
    assert report.layers[0].error < 1e-4
    assert type(model.norms[0]) is RBELayerNorm
    assert type(model.norms[1]) is RBERMSNorm
    assert type(model.norms[2]) is nn.LayerNorm
    x = walk.gaussian(3, N)
    assert walk.relative(model(x), dense(x)) < 0.01
    rs.save(model, tmp_path / "m")
    again = rs.load(copy.deepcopy(dense), tmp_path / "m")
    assert torch.equal(again(x), model(x))
    assert again.norms[1].eps == 1e-6
    back = rs.dequantize(again)
    assert type(back.norms[1]) is nn.RMSNorm
    assert walk.relative(back(x), model(x)) <= ROUNDING


def test_plain_norms_are_no_part_of_a_plan(tmp_path):
    model = nn.Sequential(RBELayerNorm(16), RBERMSNorm(N))
    with torch.no_grad():
        model[0].weight.mul_(2)
    rs.save(model, tmp_path / "m")
    other = rs.load(nn.Sequential(RBELayerNorm(16), nn.RMSNorm(N)), tmp_path / "m")
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[1].codes, model[1].codes)
