"""RBEAttention and RBEFFN against dense modules with the decoded weights."""

import copy
import io
import math
import pickle
from pathlib import Path

import pytest
import torch
import walk
from torch import nn
from torch.nn import functional

import reality_stone as rs
from reality_stone import hf, training
from reality_stone.nn import RBEFFN, KVCache, RBEAttention, RBELinear, Rotary, TrainableRBELinear

CODEC = "uniform(bits=4, group=32)"
E, H = 64, 4
EXACT = 1e-5  # float32 sums in another order


@pytest.fixture(autouse=True)
def _exact():
    with rs.ops.accuracy("exact"):
        yield


def attention(**options) -> RBEAttention:
    torch.manual_seed(0)
    return RBEAttention(E, H, **{"codec": CODEC} | options)


def plain_attention(layer: RBEAttention, x, mask=None):
    """The formula, one token and one head at a time, with the decoded weights."""
    qkv = functional.linear(x, layer.qkv.weight, layer.qkv.bias)
    d, group = layer.head_dim, layer.num_heads // layer.num_kv_heads
    q, k, v = (t.split(d, -1) for t in qkv.split(layer.sizes, -1))
    tokens = x.shape[-2]
    angle = None
    if layer.rotary is not None:
        steps = torch.arange(0, d, 2) / d
        angle = torch.arange(tokens)[:, None] / layer.rotary.base**steps

    def turn(t):
        if angle is None:
            return t
        pairs = torch.complex(t[..., : d // 2], t[..., d // 2 :]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat((pairs.real, pairs.imag), -1)

    heads = []
    for h in range(layer.num_heads):
        scores = turn(q[h]) @ turn(k[h // group]).transpose(-1, -2) / math.sqrt(d)
        if layer.causal:
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        heads.append(scores.softmax(-1) @ v[h // group])
    return functional.linear(torch.cat(heads, -1), layer.out.weight, layer.out.bias)


SETTINGS = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"num_kv_heads": 2},
    "one group": {"num_kv_heads": 1, "causal": True},
    "rotary": {"rotary": 10_000.0, "causal": True},
    "all, without bias": {
        "num_kv_heads": 2, "rotary": Rotary(500.0), "causal": True, "bias": False,
    },
    "wider heads": {"head_dim": 32, "num_kv_heads": 2, "out_bias": False},
}  # fmt: skip
EACH = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@EACH
def test_attention_is_the_formula_with_the_decoded_weights(options):
    layer = attention(**options)
    for batch in [(), (2,), (2, 3)]:
        x = walk.gaussian(*batch, 7, E)
        assert walk.relative(layer(x), plain_attention(layer, x)) <= EXACT
    assert layer.qkv.out_features == (H + 2 * layer.num_kv_heads) * layer.head_dim


@EACH
def test_step_by_step_with_the_cache_is_the_full_pass(options):
    layer, x = attention(**options | {"causal": True}), walk.gaussian(2, 9, E)
    want = layer(x)
    for cuts in ([1] * 9, [4, 1, 3, 1], [9], [0, 5, 4]):
        cache, parts = layer.empty_cache(2), []
        for piece in x.split(cuts, 1):
            y, cache = layer(piece, cache=cache)
            parts.append(y)
        assert walk.relative(torch.cat(parts, 1), want) <= EXACT, cuts
        assert isinstance(cache, KVCache)
        assert cache.tokens == 9
        assert cache.keys.shape == (2, layer.num_kv_heads, 9, layer.head_dim)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_truth_and_of_numbers_hide_keys(causal):
    layer, x = attention(causal=causal), walk.gaussian(2, 6, E)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, :, :, 3] = False
    mask[1, :, 2:, 0] = False
    want = torch.stack([plain_attention(layer, x[i], mask[i, 0]) for i in range(2)])
    numbers = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for given in (mask, numbers, numbers.bfloat16()):
        assert walk.relative(layer(x, mask=given), want) <= EXACT
    _, cache = layer(x[:, :4], mask=mask[:, :, :4, :4], cache=layer.empty_cache(2))
    y, _ = layer(x[:, 4:], mask=mask[:, :, 4:], cache=cache)
    if causal:
        assert walk.relative(y, want[:, 4:]) <= EXACT


def test_positions_move_the_rotation():
    layer, x = attention(rotary=100.0), walk.gaussian(2, 5, E)
    want = layer(x)
    # Only differences of positions count.
    assert walk.relative(layer(x, positions=torch.arange(3, 8)), want) <= EXACT
    each = torch.stack([torch.arange(5), torch.arange(0, 10, 2)])
    got = layer(x, positions=each)
    assert walk.relative(got[0], want[0]) <= EXACT
    assert walk.relative(got[1], want[1]) > 1e-3
    half = attention(rotary=Rotary(100.0, scale=2))
    assert walk.relative(half(x, positions=each), layer(x, positions=each / 2)) <= EXACT


def test_a_part_of_the_dimensions_can_turn():
    q = walk.gaussian(2, 5, 16)
    rotary = Rotary(100.0, fraction=0.5)
    cos, sin = rotary.angles(torch.arange(5), 16)
    assert cos.shape == (5, 8)
    turned = rotary.apply(q, cos, sin)
    assert torch.equal(turned[..., 8:], q[..., 8:])
    assert walk.relative(turned[..., :8], Rotary(100.0).apply(q[..., :8], cos, sin)) == 0
    assert walk.relative(turned.norm(dim=-1), q.norm(dim=-1)) <= EXACT


@pytest.mark.parametrize("bias", [True, False])
def test_attention_from_nn_multihead_attention_computes_the_same(bias):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(E, H, bias=bias, batch_first=True).eval()
    if bias:
        nn.init.normal_(dense.in_proj_bias)
    x = walk.gaussian(3, 5, E)
    layer = RBEAttention.from_multihead(dense, codec="uniform(bits=8, group=32)")
    assert not layer.training
    assert walk.relative(layer(x), dense(x, x, x)[0]) < 0.02  # 8 bits
    with torch.no_grad():
        dense.in_proj_weight.copy_(layer.qkv.weight)
        dense.out_proj.weight.copy_(layer.out.weight)
    assert walk.relative(layer(x), dense(x, x, x)[0]) <= EXACT
    causal = RBEAttention.from_multihead(dense, causal=True, codec=CODEC)
    for p, name in ((causal.qkv, "in_proj_weight"), (causal.out, "out_proj.weight")):
        dense.get_parameter(name).data.copy_(p.weight)
    hidden = nn.Transformer.generate_square_subsequent_mask(5)
    want = dense(x, x, x, attn_mask=hidden, is_causal=True)[0]
    assert walk.relative(causal(x), want) <= EXACT


def test_attention_from_its_linear_layers_has_their_weights():
    torch.manual_seed(0)
    q, k, v, o = nn.Linear(E, 96), nn.Linear(E, 48), nn.Linear(E, 48), nn.Linear(96, E, bias=False)
    layer = RBEAttention.from_linears(q, k, v, o, 6, rotary=10_000.0, causal=True, codec=CODEC)
    assert (layer.num_kv_heads, layer.head_dim) == (3, 16)
    assert layer.out.bias is None
    # `uniform` encodes row by row: fused or apart is the same.
    apart = torch.cat([RBELinear.from_linear(m, CODEC).weight for m in (q, k, v)])
    assert torch.equal(layer.qkv.weight, apart)
    assert torch.equal(layer.qkv.bias, torch.cat((q.bias, k.bias, v.bias)))


def test_dropout_acts_in_training_alone():
    layer, x = attention(dropout=0.5), walk.gaussian(5, E)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# --- feed-forward ---

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_feed_forward_block_is_the_formula_with_the_decoded_weights(name, gated, bias):
    torch.manual_seed(0)
    up, down = nn.Linear(E, 80, bias), nn.Linear(80, E, bias)
    gate = nn.Linear(E, 80, bias) if gated else None
    layer = RBEFFN.from_linears(up, down, gate, name, CODEC)
    dense = rs.dequantize(copy.deepcopy(layer))
    act, x = ACTIVATIONS[name], walk.gaussian(2, 3, E)
    if gated:
        left, right = dense.up(x).chunk(2, -1)
        want = dense.down(act(left) * right)
        apart = torch.cat([RBELinear.from_linear(m, CODEC).weight for m in (gate, up)])
        assert torch.equal(layer.up.weight, apart)
    else:
        want = dense.down(act(dense.up(x)))
    assert walk.relative(layer(x), want) <= EXACT
    scratch = RBEFFN(E, 80, name, gated, bias, CODEC)
    assert scratch(x).shape == x.shape
    assert (scratch.up.bias is None) == (not bias)


# --- both ---

MODULES = {
    "attention": lambda **o: attention(num_kv_heads=2, rotary=1e4, causal=True, **o),
    "feed-forward": lambda **o: RBEFFN(E, 96, "silu", gated=True, **{"codec": CODEC} | o),
}
BOTH = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@BOTH
def test_any_batch_works_empty_and_gapped_ones_too(make):
    layer = make()
    for size in [(0, E), (0, 5, E), (2, 0, E), (3, 0, 5, E)]:
        x = torch.zeros(size, requires_grad=True)
        y = layer(x)
        assert y.shape == size
        y.sum().backward()
    x = walk.gaussian(2, E, 10).transpose(1, 2)[:, ::2]
    assert walk.relative(layer(x), layer(x.contiguous())) <= EXACT


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_and_autocast_compute_and_train(make, dtype):
    layer, x = make(), walk.gaussian(2, 5, E)
    want = layer(x)
    # Half a dozen roundings to dtype.
    rounding = 6 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert walk.relative(y, want) <= rounding
    narrow = copy.deepcopy(layer).to(dtype)
    y = narrow(x.to(dtype))
    assert y.dtype == dtype
    assert walk.relative(y, want) <= rounding
    y.float().sum().backward()
    assert all(p.grad is not None for p in narrow.parameters())


@BOTH
def test_blocks_travel_as_modules_do(make):
    layer, x = make(), walk.gaussian(2, 5, E)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    meta = make(device="meta")
    assert meta(x.to("meta")).shape == x.shape
    meta.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(meta(x), want)
    assert layer.to("meta")(x.to("meta")).is_meta
    assert "bits/weight" in repr(make())


@BOTH
def test_blocks_compile_without_a_graph_break(make):
    layer, x = make(), walk.gaussian(2, 5, E)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert walk.relative(compiled(x), layer(x)) <= EXACT
    compiled(x).sum().backward()


@BOTH
def test_a_checkpoint_names_the_inner_layers(make, tmp_path):
    model = nn.ModuleDict({"block": make()})
    rs.save(model, tmp_path / "m")
    names = {entry.name for entry in rs.swap.plan_of(model)}
    assert names == {f"block.{n}" for n, _ in model.block.named_children()}
    fresh = nn.ModuleDict({"block": make(codec="uniform(bits=2, group=16)")})
    other = rs.load(fresh, tmp_path / "m")
    x = walk.gaussian(5, E)
    assert torch.equal(other.block(x), model.block(x))


@BOTH
def test_from_scratch_it_trains_in_latent_mode_as_with_dense_layers(make):
    x = walk.gaussian(64, 6, E)
    goal = walk.gaussian(E, E, seed=1) / 8
    goal = (x.cumsum(1) / torch.arange(1, 7)[:, None]) @ goal  # causal means, mixed
    losses = {}
    for kind in ("latent", "dense"):
        model = nn.Sequential(make())
        if kind == "latent":
            training.latent(model, requantize_every=10)
            assert all(isinstance(m, TrainableRBELinear) for m in model[0].children())
        else:
            rs.dequantize(model)
        optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(80):
            loss = (model(x) - goal).pow(2).mean() / goal.pow(2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if kind == "latent":
            training.finalize(model)
        losses[kind] = ((model(x) - goal).pow(2).mean() / goal.pow(2).mean()).item()
    assert losses["latent"] < 0.3
    assert losses["latent"] < losses["dense"] + 0.05  # what 4 bits leave


def test_bad_arguments_are_refused_in_one_sentence():
    def linear(n, out, bias=True):
        return nn.Linear(n, out, bias)

    cases = {
        "4 heads cannot share keys and values in 3 groups": lambda: attention(num_kv_heads=3),
        "embed_dim 65 must be a multiple of 4 heads": lambda: RBEAttention(65, 4),
        "dropout must be at least 0 and below 1, got 1": lambda: attention(dropout=1),
        "base and scale must be positive": lambda: Rotary(-1.0),
        "the dimensions that turn must be even, got 5": lambda: attention(rotary=1.0, head_dim=5),
        "rotary must be a Rotary or its base, got str": lambda: attention(rotary="llama"),
        "5 heads do not fit queries of 64": lambda: RBEAttention.from_linears(
            *[linear(E, E)] * 4, num_heads=5
        ),
        "v must be as wide as k and out 64 -> 64, got 32": lambda: RBEAttention.from_linears(
            linear(E, E), linear(E, E), linear(E, 32), linear(E, E), num_heads=4
        ),
        "all or none with bias": lambda: RBEAttention.from_linears(
            linear(E, E), linear(E, E, False), linear(E, E), linear(E, E), num_heads=4
        ),
        "with one width and without bias_k": lambda: RBEAttention.from_multihead(
            nn.MultiheadAttention(E, H, kdim=32)
        ),
        "activation must be one of gelu, gelu_tanh, silu, relu, got 'elu'": lambda: RBEFFN(
            E, E, "elu"
        ),
        "down must be 80 -> 64, got 64 -> 80": lambda: RBEFFN.from_linears(
            linear(E, 80), linear(E, 80)
        ),
        "the layers must be nn.Linear, got RBELinear": lambda: RBEFFN.from_linears(
            RBELinear(E, E, codec=CODEC), linear(E, E)
        ),
        "features": lambda: attention()(torch.zeros(3, 60)),
    }
    for message, call in cases.items():
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# --- the examples ---


def test_the_mini_llama_gives_the_logits_of_the_compressed_transformers_model(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    from mini_llama import CONFIG, DATA, Llama

    # Fused or apart, `uniform` gives the same codes; the embedding and its tied head too.
    body, table = "uniform(bits=4, group=64)", "uniform(bits=8, group=64)"
    mine = Llama(body, table).eval()
    other = hf.from_pretrained(DATA / "novels_lm")
    rs.compress(other, codec=body, plan=[("*embed_tokens", table)], progress=False)
    assert other.lm_head.codes is other.model.embed_tokens.codes
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 24))
    with torch.no_grad():
        want = other(ids).logits
        assert walk.relative(mine(ids), want) <= EXACT
        caches = [block.attention.empty_cache(2) for block in mine.blocks]
        steps = torch.cat([mine(part, caches) for part in ids.split([10, 1, 13], 1)], 1)
    assert walk.relative(steps, want) <= EXACT
