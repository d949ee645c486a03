"""RBEEmbedding: rows as nn.Embedding gives them, few decoded, tied heads, files."""

import copy
import io
import json
import pickle

import pytest
import torch
import walk
from torch import nn
from torch.nn import functional

import reality_stone as rs
from reality_stone import ops, tensorfile
from reality_stone.checkpoint import WEIGHTS
from reality_stone.inspection import inspect
from reality_stone.nn import RBEEmbedding, RBELinear

CODEC = "uniform(bits=4, group=32)"
DEFAULTS = pytest.mark.parametrize("codec", walk.DEFAULTS, ids=walk.spec)
# Blocks of one row, of a tile, of a rotation; the last one short; rotations below a tile.
SHAPES = [(1, 1), (17, 5), (33, 50), (24, 48), (96, 40), (130, 64), (256, 16)]


def layer_of(packed) -> RBEEmbedding:
    layer = RBEEmbedding(*packed.shape, codec=packed.codec, device="meta").to_empty(device="cpu")
    layer.set_packed(packed)
    return layer


@pytest.mark.parametrize("codec", walk.ALL, ids=walk.spec)
def test_rows_are_those_of_the_decoded_table_to_the_bit(codec):
    for seed, shape in enumerate(SHAPES):
        layer = layer_of(walk.random_layer(codec, shape, seed))
        table, rows = layer.weight, shape[0]
        for ids in (
            torch.randint(0, rows, (3, 2)), torch.arange(rows), torch.tensor(rows - 1),
            torch.zeros(0, 2, dtype=torch.long), torch.randint(0, rows, (2, 6))[:, ::2].int(),
        ):  # fmt: skip
            assert walk.same_bits(layer(ids).detach(), table[ids.long()]), (shape, ids)


@DEFAULTS
def test_gradients_are_those_of_looking_up_in_the_whole_decoded_table(codec):
    layer = layer_of(walk.encoded(codec, (96, 40)))
    ids = torch.tensor([[3, 3, 90], [17, 0, 3]])
    grad = walk.gaussian(2, 3, 40)
    layer(ids).backward(grad)
    params = [p.detach().clone().requires_grad_(p.is_floating_point()) for p in layer.params]
    table = ops.decode(layer.codes, params, layer.codec.spec, layer.shape)
    functional.embedding(ids, table).backward(grad)
    for own, p in zip(layer.params, params, strict=True):
        if p.requires_grad:  # the same sums in another order
            assert walk.relative(own.grad, p.grad) < 1e-5


def test_only_the_rows_asked_for_are_decoded_and_each_once(monkeypatch):
    shapes = []
    decode = ops.decode

    def spy(codes, params, codec, shape):
        shapes.append(tuple(shape))
        return decode(codes, params, codec, shape)

    layer = RBEEmbedding(512, 64, codec=CODEC)
    rotated = RBEEmbedding(512, 64, codec="trellis(bits=2, search=fast)")
    monkeypatch.setattr(ops, "decode", spy)
    layer(torch.tensor([[7, 7, 500], [7, 7, 3]])).sum().backward()
    assert shapes == [(3, 64)]
    rotated(torch.tensor([0, 5, 127, 300, 7])).sum().backward()
    assert shapes[1:] == [(256, 64)]  # two blocks of 128 rows


def test_an_embedding_from_nothing_starts_with_the_law_of_nn_embedding():
    layer = RBEEmbedding(512, 64, padding_idx=-1)
    assert layer.padding_idx == 511
    assert 0.9 < layer.weight[:511].std() < 1.1
    assert not layer.weight[511].any()
    assert "padding_idx=511" in repr(layer)
    assert "4.500 bits/weight" in repr(layer)


@pytest.mark.parametrize("codec", [c for c in walk.DEFAULTS if c.name != "seed64"], ids=walk.spec)
def test_the_padding_row_is_exactly_zero_and_gets_no_gradient(codec):
    dense = nn.Embedding(48, 64, padding_idx=5)
    layer = RBEEmbedding.from_embedding(dense, codec)
    ids = torch.tensor([[5, 1], [2, 5]])
    rows = layer(ids)
    assert not rows[0, 0].any()
    assert not rows[1, 1].any()
    assert not layer.weight[5].any()
    assert not layer.head()(torch.ones(64))[5]
    layer(torch.tensor([5, 5])).sum().backward()
    for p in layer.parameters():
        assert p.grad is None or not p.grad.any()


def test_a_padding_row_that_is_not_zero_keeps_its_values():
    dense = nn.Embedding(48, 64, padding_idx=5)
    with torch.no_grad():
        dense.weight[5] = torch.linspace(-1, 1, 64)
    layer = RBEEmbedding.from_embedding(dense, "uniform(bits=8)")
    row = layer(torch.tensor([5]))
    assert walk.relative(row, dense.weight[5][None]) < 0.01  # 8 bits over two groups
    row.sum().backward()
    assert not layer.scale.grad.any()


def test_a_codec_without_scales_of_rows_is_refused_for_a_padding_row():
    with pytest.raises(ValueError, match="the padding row cannot be zero"):
        RBEEmbedding(48, 64, padding_idx=5, codec="seed64")


def test_bad_ids_and_settings_are_refused_in_one_sentence():
    layer = RBEEmbedding(17, 8, codec="trellis(bits=2, search=fast)")
    for wrong in (17, 31, -1):
        with pytest.raises(IndexError, match=f"id {wrong} is not in the table of 17 rows"):
            layer(torch.tensor([0, wrong]))
    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch.float32"):
        layer(torch.zeros(2))
    with pytest.raises(ValueError, match="padding_idx must be a row of the table of 17, got 17"):
        RBEEmbedding(17, 8, padding_idx=17)
    with pytest.raises(ValueError, match="without max_norm"):
        RBEEmbedding.from_embedding(nn.Embedding(17, 8, max_norm=1.0))
    with pytest.raises(ValueError, match="cannot share the codes"):
        RBELinear(8, 16, codec=layer.codec).share(layer)


def test_a_subclass_that_changes_the_rows_is_not_replaced():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 8 * super().forward(ids)

    assert RBEEmbedding.replaces(nn.Embedding(17, 8))
    assert not RBEEmbedding.replaces(Scaled(17, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_rows_follows_the_dense_table_and_conversions(dtype):
    dense = nn.Embedding(40, 64, dtype=dtype)
    layer = RBEEmbedding.from_embedding(dense, CODEC)
    ids = torch.tensor([1, 39])
    assert layer(ids).dtype == dtype
    assert layer.scale.dtype == torch.float32
    assert layer.to_dense(dtype).weight.dtype == dtype
    assert layer.float()(ids).dtype == torch.float32
    rows = layer.to(dtype)(ids)
    assert rows.dtype == dtype
    rows.sum().backward()
    assert layer.scale.grad.dtype == dtype
    assert copy.deepcopy(layer)(ids).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert RBEEmbedding(40, 64)(ids).dtype == torch.float32  # as nn.Embedding


def test_it_travels_as_nn_embedding_does():
    layer, ids = RBEEmbedding(40, 64, 3, codec=CODEC), torch.tensor([[1, 3, 39]])
    want = layer(ids)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(ids), want)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = RBEEmbedding(40, 64, 3, codec=CODEC)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(ids), want)
    meta = RBEEmbedding(40, 64, 3, codec=CODEC, device="meta")
    assert meta(ids.to("meta")).shape == (1, 3, 64)
    assert "bits/weight" not in repr(meta)
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(ids), want)


@pytest.mark.parametrize("codec", [CODEC, "trellis(bits=2, search=fast)"])
def test_it_compiles_without_a_graph_break(codec):
    layer, ids = RBEEmbedding(40, 64, 3, codec=codec), torch.tensor([[1, 3, 1], [39, 0, 3]])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    rows = compiled(ids)
    assert torch.equal(rows, layer(ids))
    rows.sum().backward()
    ours = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(ids).sum().backward()
    for a, p in zip(ours, layer.parameters(), strict=True):  # repeated ids: sums in another order
        assert walk.relative(a, p.grad) < 1e-5


# --- tied heads ---


class Tied(nn.Module):
    """A language model of one layer, its head tied to its table."""

    def __init__(self, tie: bool = True):
        super().__init__()
        self.embed = nn.Embedding(96, 64, padding_idx=0)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)).tanh())


def tied(codec: str = CODEC) -> Tied:
    torch.manual_seed(0)
    model = Tied().eval()
    rs.compress(model, codec=CODEC, plan=[("embed", codec)], progress=False)
    return model


def are_tied(model: Tied) -> bool:
    a, b = model.embed, model.head
    return a.codes is b.codes and all(x is y for x, y in zip(a.params, b.params, strict=True))


IDS = torch.tensor([[0, 5, 7, 95]])


@pytest.mark.parametrize("codec", [CODEC, "trellis(bits=2, search=fast)"])
def test_a_plan_that_names_a_tied_table_compresses_it_and_ties_the_head(codec):
    torch.manual_seed(0)
    model = Tied().eval()
    report = rs.compress(model, codec=CODEC, plan=[("embed", codec)], progress=False)
    assert [layer.name for layer in report.layers] == ["embed", "body"]
    assert not report.skipped
    assert isinstance(model.embed, RBEEmbedding)
    assert isinstance(model.head, RBELinear)
    assert are_tied(model)
    table = model.embed.weight
    want = functional.linear(model.body(table[IDS]).tanh(), table)
    assert walk.relative(model(IDS), want) < 3e-3  # the promise of one product
    model(IDS).pow(2).sum().backward()
    assert model.embed.params[-1].grad.any()


def test_embeddings_stay_dense_unless_a_pattern_is_about_them():
    for plan in ([], [("*", CODEC)], [("*d*", CODEC)]):  # "*d*" matches embed, body and head
        model = Tied(tie=False)
        rs.compress(model, codec=CODEC, plan=plan, progress=False)
        assert type(model.embed) is nn.Embedding
    model = Tied(tie=False)
    rs.compress(model, codec=CODEC, plan=[("*embed*", CODEC)], progress=False)
    assert type(model.embed) is RBEEmbedding
    assert not are_tied(model)
    model = Tied()
    plan = [("embed", CODEC), ("head", "uniform(bits=8)")]
    rs.compress(model, codec=CODEC, plan=plan, progress=False)
    assert model.head.codec.bits == 8


def test_calibration_sees_the_compressed_table():
    model = Tied(tie=False).eval()
    report = rs.compress(
        model, codec=CODEC, calibration=torch.randint(0, 96, (8, 16)), batch=4,
        plan=[("embed", CODEC)], progress=False,
    )  # fmt: skip
    assert [layer.name for layer in report.layers] == ["embed", "body", "head"]
    assert report.layers[0].hessian_error is None
    assert all(layer.hessian_error is not None for layer in report.layers[1:])


@pytest.mark.parametrize("codec", [CODEC, "trellis(bits=2, search=fast)"])
def test_tied_layers_are_stored_once_and_tied_again_after_loading(tmp_path, codec):
    model = tied(codec)
    rs.save(model, tmp_path / "m")
    stored = tensorfile.read_header(tmp_path / "m" / WEIGHTS).entries
    assert "embed.codes" in stored
    assert not [name for name in stored if name.startswith("head.")]
    for other in (Tied(), Tied(tie=False), tied(codec), Tied().to("meta")):
        loaded = rs.load(other.eval(), tmp_path / "m")
        assert are_tied(loaded)
        assert torch.equal(loaded(IDS), model(IDS))
        assert loaded.embed.padding_idx == 0
    again = rs.save(loaded, tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (tmp_path / "m" / WEIGHTS).read_bytes()
    plan = json.loads((again / "config.json").read_text())["quantization_config"]["plan"]
    assert [entry.get("kind", "linear") for entry in plan] == ["embedding", "linear", "linear"]


def test_a_tied_head_adds_nothing_to_the_rate_of_a_checkpoint(tmp_path):
    model = tied()
    rs.save(model, tmp_path / "m")
    rate = 4 + 32 / 32  # codes; scale and zero in float16 for each group of 32
    assert inspect(tmp_path / "m", progress=False).bits_per_weight == pytest.approx(rate)
    assert "5.000 bits per weight" in (tmp_path / "m" / "README.md").read_text()


def test_fine_tuning_tables_trains_those_of_an_embedding(tmp_path):
    model, batches = tied(), torch.randint(1, 96, (8, 16))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rs.finetune(model, batches, state=tmp_path / "state", progress=False)
    assert not torch.equal(model.embed.scale, before["embed.scale"])
    assert are_tied(model)
    again = tied()  # the finished run gives its result again
    rs.finetune(again, batches, state=tmp_path / "state", progress=False)
    assert torch.equal(again.embed.scale, model.embed.scale)
    assert torch.equal(again(IDS), model(IDS))


def test_a_tie_to_a_tensor_of_another_size_is_refused(tmp_path):
    path = rs.save(tied(), tmp_path / "m") / WEIGHTS
    header = tensorfile.read_header(path)
    with path.open("rb") as file:
        tensors = {n: tensorfile.read_tensor(header, e, file) for n, e in header.entries.items()}
    metadata = {k: v for k, v in header.metadata.items() if k not in ("format", "sha256")}
    ties = json.loads(metadata["tied"]) | {"head.scale": "body.scale"}
    tensorfile.write(path, tensors, metadata | {"tied": json.dumps(ties)})
    with pytest.raises(ValueError, match=r"'head\.scale' is F\d+ \[64, 2\]"):
        rs.load(Tied(), tmp_path / "m")


def test_tied_layers_stay_one_through_copies_conversions_and_going_back():
    model = tied()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), tied().half().float()):
        assert are_tied(other)
    # A conversion that makes new tensors: both must hold the same new one.
    moved = tied()._apply(lambda t: t.clone())
    assert moved.embed.codes is moved.head.codes
    assert tied().to("meta").embed.codes.is_meta
    dense = rs.dequantize(copy.deepcopy(model))
    assert type(dense.embed) is nn.Embedding
    assert dense.embed.weight is dense.head.weight
    assert torch.equal(dense.embed.weight, model.embed.weight)
    assert len(list(model.parameters())) == len(list(tied().parameters()))


def test_a_table_and_its_head_are_trained_together():
    torch.manual_seed(0)
    model, ids = tied(), torch.randint(1, 96, (16, 8))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert are_tied(model)
