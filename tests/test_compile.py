"""torch.compile, torch.export and autocast: no graph break, and the eager results.

Backend aot_eager traces forward and backward through the fake kernels and then runs torch's own
kernels: it needs no C++ compiler and changes no arithmetic, so results are compared bit for bit.
"""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import walk
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import reality_stone as rs
from reality_stone.nn import RBELinear, TrainableRBELinear

# Rotated, a sum, tables, uint8 params, and groups that cut the row.
FEW = pytest.mark.parametrize(
    "codec",
    [
        "trellis(bits=2)", "residual", "palette",
        "block_sparse", "uniform(bits=3, group=16)",
    ],
)  # fmt: skip


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def layer_of(codec, bias=True) -> RBELinear:
    packed = walk.encoded(rs.codec(codec) if isinstance(codec, str) else codec, (48, 64))
    return RBELinear.from_packed(packed, torch.linspace(-1, 1, 48) if bias else None)


def step(run, model, *args):
    """Output and every gradient of one step."""
    model.zero_grad()
    y = run(*args)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


# --- one layer ---


@FEW
def test_under_autocast_the_compiled_step_is_the_eager_one(codec):
    layer, x = layer_of(codec), walk.gaussian(5, 64)
    run = compiled(layer)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = step(layer, layer, x), step(run, layer, x)
    assert want[0].dtype == torch.bfloat16
    assert_same(got, want)


@FEW
def test_a_narrow_layer_compiles(codec):
    layer, x = layer_of(codec).half(), walk.gaussian(5, 64).half()
    want = step(layer, layer, x)
    assert want[0].dtype == torch.float16
    assert_same(step(compiled(layer), layer, x), want)


def test_empty_batches_and_strides_go_through_the_compiled_layer():
    layer = layer_of("trellis")
    run = compiled(layer)
    batch = walk.gaussian(6, 3, 128)
    inputs = [
        batch[0, :, ::2], batch[::2, 0, :64], batch[:, 1, 64:].t().contiguous().t(),
        batch[:0, 0, :64], batch[0, 0, :64],
    ]  # fmt: skip
    for x in inputs:
        assert_same(step(run, layer, x), step(layer, layer, x))


def test_many_batch_sizes_cost_two_compilations():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    layer = layer_of("trellis")
    run = torch.compile(layer, fullgraph=True, backend=counter)
    for n in (3, 5, 7, 11, 64):
        x = walk.gaussian(n, 64)
        assert walk.same_bits(run(x).detach(), layer(x).detach())
    assert counter.frame_count == 2  # one size, then any


def test_layers_of_one_kind_share_a_compilation():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    layers = [RBELinear(64, 64, codec="uniform(bits=2)") for _ in range(12)]
    x = walk.gaussian(3, 64)
    for layer in layers:
        layer.compile(fullgraph=True, backend=counter)
        layer(x)
    assert counter.frame_count == 1


def test_a_compiled_layer_is_copied_pickled_and_saved():
    layer, x = layer_of("trellis"), walk.gaussian(5, 64)
    want = layer(x).detach()
    torch._dynamo.reset()
    layer.compile(fullgraph=True, backend="aot_eager")
    assert walk.same_bits(layer(x).detach(), want)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert walk.same_bits(other(x).detach(), want)
        assert walk.same_bits(compiled(other)(x).detach(), want)
    wrapped = torch.compile(layer_of("trellis"), backend="aot_eager")
    assert walk.same_bits(copy.deepcopy(wrapped)(x).detach(), want)


def test_new_codes_and_params_are_seen_without_another_compilation():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    layer, x = layer_of("palette"), walk.gaussian(5, 64)
    run = torch.compile(layer, fullgraph=True, backend=counter)
    run(x)
    layer.set_packed(walk.encoded(layer.codec, (48, 64), seed=3))
    assert walk.same_bits(run(x).detach(), layer(x).detach())
    assert counter.frame_count == 1


def test_an_observed_layer_compiles_around_its_observer():
    layer, x = layer_of("trellis"), walk.gaussian(5, 64)
    seen = []
    layer.observer = lambda x, grad: seen.append((x.clone(), grad.clone()))
    want = step(layer, layer, x)
    torch._dynamo.reset()
    # What the observer keeps is no business of a graph: fullgraph says so and refuses.
    assert_same(step(torch.compile(layer, backend="aot_eager"), layer, x), want)
    assert len(seen) == 2
    assert_same(seen[1], seen[0])


def test_inductor_has_the_eager_results():
    model = nn.Sequential(layer_of("trellis"), nn.Tanh(), RBELinear(48, 8, codec="palette"))
    x = walk.gaussian(5, 64)
    torch._dynamo.reset()
    got = step(torch.compile(model, fullgraph=True), model, x)
    # Inductor has its own tanh and sums the loss in another order; one float32 rounding each.
    for a, b in zip(got, step(model, model, x), strict=True):
        assert walk.relative(a, b) < 1e-5


# --- layers with a master weight ---


def latent(hessian=False) -> nn.Sequential:
    torch.manual_seed(0)
    kinds = {"hessian": hessian, "requantize_every": 3}
    return nn.Sequential(
        TrainableRBELinear.from_linear(nn.Linear(64, 48), "uniform(bits=2, group=16)", **kinds),
        nn.Tanh(),
        TrainableRBELinear.from_linear(nn.Linear(48, 8), "trellis(search=fast)", **kinds),
    )


def train(run, model, steps, start=0, fused=False) -> list[float]:
    """Losses of steps of which every second accumulates two batches."""
    optimiser = torch.optim.Adam(model.parameters(), 1e-2, fused=fused)
    losses = []
    for i in range(start, start + steps):
        for part in range(1 + i % 2):
            loss = (run(walk.gaussian(16, 64, seed=2 * i + part)) - 1).square().mean()
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize(("backend", "fused"), [("eager", True), ("aot_eager", False)])
def test_a_master_weight_trains_and_encodes_in_one_graph_as_in_eager(backend, fused):
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    plain, model = latent(hessian=True), latent(hessian=True)
    first = model[0].codes.clone()
    run = torch.compile(model, fullgraph=True, backend=counter)
    assert train(run, model, 8, fused=fused) == train(plain, plain, 8, fused=fused)
    assert [model[0].steps, model[2].steps] == [8, 8]
    assert not torch.equal(model[0].codes, first)
    assert counter.frame_count == 1
    assert_same_state(model, plain)
    assert_same([run(walk.gaussian(5, 64)).detach()], [model(walk.gaussian(5, 64)).detach()])


def test_copies_of_a_compiled_latent_layer_count_for_themselves():
    model = latent()
    run = compiled(model)
    train(run, model, 2)
    other = copy.deepcopy(model)
    again = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert train(again, other, 3, start=2) == train(run, model, 3, start=2)
    assert_same_state(other, model)
    loaded = pickle.loads(pickle.dumps(model))
    train(torch.compile(loaded, fullgraph=True, backend="aot_eager"), loaded, 1)
    assert [loaded[0].steps, model[0].steps] == [6, 5]


def test_a_latent_layer_compiles_in_eval_mode_and_once_finalized():
    model, x = latent(), walk.gaussian(5, 64)
    train(model, model, 2)
    model.eval()
    assert_same([compiled(model)(x).detach()], [model(x).detach()])
    for i in (0, 2):
        model[i].finalize()
    assert_same(step(compiled(model), model, x), step(model, model, x))


def test_a_latent_layer_is_exported_without_its_training():
    model, x = latent(), walk.gaussian(5, 64)
    program = torch.export.export(model, (x,))
    assert "begin" not in program.graph_module.code
    assert [model[0].steps, model[2].steps] == [0, 0]
    assert_same([program.module()(x).detach()], [model(x).detach()])


# --- export ---


@FEW
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "traced"])
def test_an_exported_layer_takes_any_batch_and_travels_as_a_file(codec, strict):
    layer = layer_of(codec)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(
        layer, (walk.gaussian(5, 3, 64),), dynamic_shapes=shapes, strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (0, 1, 2, 9):
        x = walk.gaussian(n, 3, 64)
        want = layer(x).detach()
        assert walk.same_bits(program.module()(x).detach(), want)
        assert walk.same_bits(loaded(x).detach(), want)


@pytest.mark.parametrize("recoded", [False, True], ids=["made", "recoded"])
def test_a_layer_is_exported_before_anything_has_asked_for_its_codec_as_text(recoded):
    packed = walk.encoded(rs.codec("uniform"), (48, 64))
    packed = dataclasses.replace(packed, codec=rs.codec("uniform"))  # equal, and never yet used
    assert "spec" not in vars(packed.codec)
    layer = layer_of("palette", bias=False) if recoded else RBELinear.from_packed(packed)
    if recoded:
        layer.recode(packed)
    x = walk.gaussian(5, 64)
    program = torch.export.export(layer, (x,), strict=True)
    assert walk.same_bits(program.module()(x).detach(), layer(x).detach())


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "traced"])
def test_a_layer_exported_under_autocast_computes_as_under_autocast(strict):
    layer, x = layer_of("trellis"), walk.gaussian(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x).detach()
        program = torch.export.export(layer, (x,), strict=strict)
    got = program.module()(x).detach()
    assert got.dtype == torch.bfloat16
    assert walk.same_bits(got, want)


# --- a whole model ---


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    plan = [
        ("*q_proj", "uniform(bits=4, group=32)"), ("*k_proj", "palette"), ("*v_proj", "residual"),
        ("*o_proj", "block_sparse"), ("*mlp*", "trellis(bits=2)"),
    ]  # fmt: skip
    rs.compress(model, plan=plan, progress=False)
    assert sum(isinstance(m, RBELinear) for m in model.modules()) == 7
    return model


TOKENS = torch.arange(24).reshape(2, 12) % 96


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "autocast"])
def test_a_whole_llama_is_one_graph_with_the_eager_results(llama, narrow):
    torch._dynamo.reset()
    run = torch.compile(llama, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        assert_same([run(input_ids=TOKENS).logits], [llama(input_ids=TOKENS).logits])


def test_a_compiled_llama_trains_its_tables_as_the_eager_one(llama):
    def logits(run):
        return lambda: run(input_ids=TOKENS).logits

    want = step(logits(llama), llama)
    assert len(want) > 1 + 7
    assert_same(step(logits(compiled(llama)), llama), want)
