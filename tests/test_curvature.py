"""Compressing with the curvature at the outputs of layers: gain, bounds, refusals, interrupts."""

import copy

import pytest
import torch
from models import Stack
from torch import nn

import reality_stone as rs
from reality_stone import curvature
from reality_stone.blocks import Call, calls_from
from reality_stone.codecs import Uniform
from reality_stone.curvature import OutputSide, output_curvature, some_rows
from reality_stone.nn import RBELinear

CODEC = "uniform(bits=2, group=32)"


def chain(rows: int, seed: int) -> torch.Tensor:
    """(rows, 32) tokens, each of three likely ones after the last."""
    g = torch.Generator().manual_seed(seed)
    after = torch.randint(32, (32, 3), generator=torch.Generator().manual_seed(0))
    tokens = [torch.randint(32, (rows,), generator=g)]
    for _ in range(31):
        tokens.append(after[tokens[-1], torch.randint(3, (rows,), generator=g)])
    return torch.stack(tokens, 1)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model, tokens = Stack(2), chain(64, 1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(100):
        logits = model(tokens[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 1.5  # of log 3 at best: it has learned what there is to weigh
    return model.eval()


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


TOKENS = chain(64, 2)
OPTIONS = {"calibration": TOKENS, "codec": CODEC, "skip": ["head"], "progress": False}


def codes(model):
    return {n: m.codes for n, m in model.named_modules() if isinstance(m, RBELinear)}


@pytest.mark.parametrize("codec", [CODEC, "trellis(bits=2)", "residual"])
def test_curvature_brings_a_trained_model_closer_to_the_dense_one(trained, codec):
    kl = {}
    for curved in (False, True):
        model = copy.deepcopy(trained)
        report = rs.compress(model, **OPTIONS | {"codec": codec}, curvature=curved)
        assert len(report.layers) == 4
        kl[curved] = rs.kl_divergence(model, trained, chain(32, 3), context=32)
    assert kl[True] < 0.9 * kl[False]


def test_every_codec_takes_the_curvature(model):
    block = model.blocks[0].up
    h, f = (torch.eye(n, dtype=torch.float64) for n in (64, 128))
    for name in rs.codecs():
        packed = rs.codec(name).encode(block.weight, h, f)
        assert packed.shape == (128, 64), name


def test_results_are_the_same_on_any_number_of_threads(model):
    other, before = copy.deepcopy(model), torch.get_num_threads()
    try:
        for threads, one in ((1, model), (2, other)):
            torch.set_num_threads(threads)
            few = OPTIONS | {"calibration": TOKENS[:8], "skip": ["head", "blocks.1.*"]}
            rs.compress(one, **few, curvature=True)
    finally:
        torch.set_num_threads(before)
    again = codes(other)
    assert all(torch.equal(c, again[n]) for n, c in codes(model).items())


def measured(monkeypatch) -> list[list[str]]:
    """The layers of each pass from here on."""
    passes = []

    def seen(model, calls, names, **options):
        passes.append(list(names))
        return output_curvature(model, calls, names, **options)

    monkeypatch.setattr(curvature, "output_curvature", seen)
    return passes


def test_moments_are_measured_a_few_at_a_time_and_let_go(model, monkeypatch):
    passes = measured(monkeypatch)
    monkeypatch.setattr(curvature, "HELD", 4 * (128**2 + 64**2))
    side = OutputSide(model, {n: len(m.weight) for n, m in layers(model)}, calls(), progress=False)
    for name, layer in layers(model):
        moment = side.take(name)
        assert moment.shape == (len(layer.weight), len(layer.weight))
        assert sum(4 * f.numel() for f in side.found.values()) <= 4 * 64**2
    assert passes == [["blocks.0.up", "blocks.0.down"], ["blocks.1.up", "blocks.1.down"]]
    assert side.take("blocks.0.up") is None


def layers(model):
    return [(n, m) for n, m in model.named_modules() if n.endswith(("up", "down"))]


def calls():
    return calls_from(TOKENS, 16)


def test_layers_of_many_outputs_and_of_no_input_are_encoded_without(model, monkeypatch):
    monkeypatch.setattr(curvature, "LARGEST", 64)
    model.blocks[0].unused = nn.Linear(64, 64)
    passes, plain = measured(monkeypatch), copy.deepcopy(model)
    with pytest.warns(UserWarning, match="no calibration input reaches 1"):
        rs.compress(model, **OPTIONS, curvature=True)
    assert [sorted(names) for names in passes] == [
        ["blocks.0.down", "blocks.0.unused", "blocks.1.down"]
    ]
    with pytest.warns(UserWarning, match="no calibration input reaches 1"):
        rs.compress(plain, **OPTIONS)
    mine, theirs = codes(model), codes(plain)
    same = {n for n in mine if torch.equal(mine[n], theirs[n])}
    assert {"blocks.0.up", "blocks.0.unused"} <= same
    assert "blocks.0.down" not in same


def test_experts_of_a_mixture_are_encoded_without(monkeypatch):
    t = pytest.importorskip("transformers")
    config = t.MixtralConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model, passes = t.MixtralForCausalLM(config).eval(), measured(monkeypatch)
    report = rs.compress(model, calibration=TOKENS, codec=CODEC, curvature=True, progress=False)
    attention = [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    assert passes == [attention]
    assert len(report.layers) == 4 + 2 * 2


def test_rows_come_from_all_of_the_calibration_one_a_call():
    tokens = torch.arange(96).view(24, 4)
    masks = torch.ones(24, 4)
    masks[:, 3:] = 0
    for data in (tokens, [{"input_ids": tokens, "attention_mask": masks}]):
        rows = some_rows(calls_from(data, 8), 32)
        first = [next(iter((*r.args, *r.kwargs.values()))) for r in rows]
        assert torch.equal(torch.cat(first), tokens[::3])
    assert all(r.mask.tolist() == [[True] * 3 + [False]] for r in rows)
    whole = Call((tokens, "a word"))
    assert some_rows([whole], 32) == [whole]
    assert len(some_rows([Call((tokens,))], 10**6)) == 24


def test_padding_is_no_part_of_the_curvature(model):
    tokens = chain(16, 4)
    found = output_curvature(model, [Call((tokens[:, :20],))], ["blocks.0.up"], progress=False)
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[:, :20] = True
    nothing = Call((tokens[:1],), {}, torch.zeros(1, 32, dtype=torch.bool))
    masked = output_curvature(
        model, [nothing, Call((tokens,), {}, mask)], ["blocks.0.up"], progress=False
    )
    # The same labels are drawn; sums over other batches round differently.
    assert torch.allclose(found["blocks.0.up"], masked["blocks.0.up"], rtol=1e-4, atol=1e-7)


def test_what_has_no_likelihood_is_refused_before_anything_changes(model):
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    with pytest.raises(ValueError, match="curvature is of a language model's likelihood"):
        rs.compress(net, calibration=torch.randn(64, 64), curvature=True, progress=False)
    assert isinstance(net[0], nn.Linear)

    class Encoder(Stack):
        def forward(self, tokens):
            return (super().forward(tokens),)

    encoder = Encoder(2)
    with pytest.raises(ValueError, match="curvature is of a language model's likelihood"):
        rs.compress(encoder, **OPTIONS, plan=[("embed", CODEC)], curvature=True)
    assert isinstance(encoder.embed, nn.Embedding)
    with pytest.raises(ValueError, match="calibration data"):
        rs.compress(model, curvature=True, progress=False)
    assert not codes(model)


def test_logits_that_are_no_numbers_warn_by_layer_and_still_encode(model):
    with torch.no_grad():
        model.head.weight[3, 5] = torch.nan
    with pytest.warns(UserWarning, match=r"blocks\.0\.up, output side: the Hessian holds values"):
        rs.compress(model, **OPTIONS, curvature=True)
    assert len(codes(model)) == 4


@pytest.mark.parametrize("what", ["encoding", "measuring"])
def test_an_interrupt_leaves_every_layer_dense_or_compressed(model, monkeypatch, what):
    done = []
    place = (Uniform, "encode") if what == "encoding" else (curvature, "output_curvature")
    original = getattr(*place)

    def interrupted(*args, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(curvature, "HELD", 1)
    monkeypatch.setattr(*place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        rs.compress(model.train(), **OPTIONS, curvature=True)
    assert len(codes(model)) == 2
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert bool(model(TOKENS).isfinite().all())
