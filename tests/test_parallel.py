"""Two ranks agree with one process: DDP, FSDP2, distributed checkpoints, tensor parallelism."""

import datetime
import os
import warnings

import pytest
import torch
import walk
from torch import distributed, nn

import reality_stone as rs
from reality_stone import parallel
from reality_stone.nn import RBELinear

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RANKS = 2
STEPS = 3
IMPORTS = ["reality_stone.parallel", "transformers.models.llama.modeling_llama"]
# Float32 sums of some thousand terms in another order, through two blocks and three steps.
SUMS = 1e-5
BLOCK = "model.layers.*."
PLAN = {
    **{f"{BLOCK}self_attn.{n}_proj": "column" for n in "qkv"},
    f"{BLOCK}self_attn.o_proj": "row",
    **{f"{BLOCK}mlp.{n}_proj": "column" for n in ("gate", "up")},
    f"{BLOCK}mlp.down_proj": "row",
}

# --- the model, the same in every process ---


def llama():
    """Two blocks, biases everywhere, so that nothing that is cut goes untested."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # zero otherwise
                p.normal_(std=0.02)
    return model


def packed(folder):
    return rs.load(llama(), f"{folder}/packed")


def tokens():
    return torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))


def train(model, batch) -> dict:
    """Losses of some steps, and the whole gradients of the first by name."""
    # SGD, as Adam would make whole steps of rounding errors.
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses, gradients = [], {}
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(loss.item())
        for name, p in model.named_parameters() if not gradients else ():
            if p.grad is not None:
                whole = getattr(p.grad, "full_tensor", p.grad.clone)()
                gradients[name.removeprefix("module.")] = whole
        optimiser.step()
        optimiser.zero_grad()
    return {"losses": losses, "gradients": gradients}


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits.clone()


def code_bytes(model) -> int:
    """Bytes of codes that are in this process now."""
    layers = [m for m in model.modules() if isinstance(m, RBELinear)]
    local = [getattr(m.codes, "to_local", lambda m=m: m.codes)() for m in layers]
    return sum(t.untyped_storage().nbytes() for t in local)


# --- what each rank does; everything that is compared comes back in a dictionary ---


def ddp(rank, folder, change=lambda model: model) -> dict:
    model = change(packed(folder))
    if rank:  # what a rank starts with is overwritten
        spoilt(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    return train(wrapped, tokens().chunk(RANKS)[rank]) | {"state": model.state_dict()}


def ddp_parameters(rank, folder) -> dict:
    return ddp(rank, folder, parallel.codes_as_parameters)


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    parallel.codes_as_parameters(model)
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def fsdp(rank, folder) -> dict:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    model = packed(folder)
    found = {"whole bytes": code_bytes(model)}
    sharded(model)
    found["bytes"] = code_bytes(model)
    if not rank:  # must not wait for the other
        found["text"] = repr(model)
        with pytest.raises(ValueError, match=r"is divided over ranks: save inside .*gathered"):
            rs.save(model, f"{folder}/divided")
    with parallel.gathered(model):
        if not rank:
            rs.save(model, f"{folder}/gathered")
    found |= train(model, tokens().chunk(RANKS)[rank])
    found["bytes after training"] = code_bytes(model)
    full = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=full)
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/dcp")
    with parallel.gathered(model):
        if not rank:
            rs.save(model, f"{folder}/trained")
        found["weight"] = model.model.layers[0].mlp.up_proj.weight
    found |= {"logits": logits(model), "state": state}

    other = spoilt(sharded(packed(folder)))
    set_model_state_dict(other, dict(state), options=full)
    found["state again"] = logits(other)
    other = spoilt(sharded(packed(folder)))
    part = get_model_state_dict(other)
    dcp.load(part, checkpoint_id=f"{folder}/dcp")
    set_model_state_dict(other, part)
    found["loaded"] = logits(other)
    return found


def spoilt(model):
    """Nothing of what is about to be loaded is there before."""
    with torch.no_grad():
        for t in model.state_dict().values():
            t.zero_()
    return model


def mixed_precision(rank, folder) -> dict:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layer = packed(folder).model.layers[0].mlp.up_proj
    rounded = packed(folder).model.layers[0].mlp.up_proj.bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(parallel.codes_as_parameters(layer), mp_policy=policy)
    x = walk.gaussian(3, 256)
    with torch.no_grad():
        return {"got": layer(x), "want": rounded(x.bfloat16())}


def styles():
    kinds = {"column": parallel.ColwiseCodes, "row": parallel.RowwiseCodes}
    return {name: kinds[side]() for name, side in PLAN.items()}


def tensor_parallel(rank, folder) -> dict:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (RANKS,))
    read = parallel.load(llama(), f"{folder}/packed", mesh, styles())
    model = parallelize_module(packed(folder), mesh, styles())
    layers = [(a, b) for a, b in zip(read.modules(), model.modules(), strict=True)]
    layers = [(a.packed, b.packed) for a, b in layers if isinstance(a, RBELinear)]
    found = {
        "bytes": code_bytes(model),
        "text": "" if rank else repr(model),
        "read": all(torch.equal(a.codes, b.codes) for a, b in layers),
        "logits": logits(model),
        "logits of read": logits(read),
    }
    with parallel.gathered(model):
        if not rank:
            rs.save(model, f"{folder}/joined")
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/dcp_cut")
    found |= train(model, tokens())
    with parallel.gathered(model):
        found["state"] = {k: v.clone() for k, v in model.state_dict().items()}
    return found


def sequence_parallel(rank, folder) -> dict:
    """Positions (dimension 1) are divided outside the two layers, features between them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    with torch.device("meta"):
        model = two_layers()
    plan = {
        "0": parallel.ColwiseCodes(input_layouts=Shard(1)),
        "2": parallel.RowwiseCodes(output_layouts=Shard(1), use_local_output=False),
    }
    parallel.load(model, f"{folder}/mlp", mesh, plan)
    x = walk.gaussian(3, 4, 128).chunk(RANKS, 1)[rank].requires_grad_()
    y = model(x)
    assert isinstance(y, DTensor)
    y.to_local().square().sum().backward()
    with parallel.gathered(model):
        table = model[0].weight
    grads = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in named(model)}
    return {"y": y.to_local().detach(), "x": x.grad, "gradients": grads, "weight": table}


def named(model):
    return list(model.named_parameters())


def two_layers():
    return nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128))


CHECKS = (ddp, ddp_parameters, fsdp, mixed_precision, tensor_parallel, sequence_parallel)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    with rs.accuracy("exact"):
        found = {check.__name__: check(rank, folder) for check in CHECKS}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


# --- one process, and what is compared ---


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of the whole batch; the checkpoint that the ranks start from."""
    folder = tmp_path_factory.mktemp("ranks")
    model = llama()
    mlp = [("*.mlp.*", "trellis(bits=2, search=fast)")]
    rs.compress(model, codec="uniform(bits=4, group=64)", plan=mlp, progress=False)
    rs.save(model, folder / "packed")
    torch.manual_seed(0)
    small = two_layers()
    rs.compress(small, codec="uniform(bits=4, group=64)", progress=False)
    rs.save(small, folder / "mlp")
    model = packed(folder)
    with rs.accuracy("exact"):
        found = {"folder": folder, "logits": logits(model), "bytes": code_bytes(model)}
        found |= train(model, tokens())
    return found | {"state": model.state_dict()}


@pytest.fixture(scope="module")
def ranks(one):
    folder = one["folder"]
    # One process imports for both ranks: that is most of their time.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTS)
    torch.multiprocessing.start_processes(
        worker, (str(folder),), nprocs=RANKS, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_trained_alike(got: dict, one: dict) -> None:
    for part in ("gradients", "state"):
        assert got[part].keys() == one[part].keys()
        for name, want in one[part].items():
            if want.dtype == torch.uint8:
                assert torch.equal(got[part][name], want), name
            else:
                assert walk.relative(got[part][name], want) < SUMS, (part, name)


def mean_losses(ranks, check: str) -> torch.Tensor:
    return torch.tensor([r[check]["losses"] for r in ranks]).mean(0)


def same_files(a, b) -> bool:
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


@pytest.mark.parametrize("check", ["ddp", "ddp_parameters", "fsdp", "tensor_parallel"])
def test_two_ranks_train_as_one_process_does(one, ranks, check):
    for rank in ranks:
        assert_trained_alike(rank[check], one)
    torch.testing.assert_close(
        mean_losses(ranks, check), torch.tensor(one["losses"]), rtol=SUMS, atol=0
    )


def test_fully_shard_holds_half_of_the_codes_on_each_of_two_ranks(one, ranks):
    for rank in ranks:
        assert rank["fsdp"]["whole bytes"] == one["bytes"]
        assert rank["fsdp"]["bytes"] == rank["fsdp"]["bytes after training"] == one["bytes"] // 2
        assert rank["tensor_parallel"]["bytes"] == one["bytes"] // 2


def test_what_is_gathered_is_saved_as_the_bytes_that_one_process_saves(one, ranks):
    assert same_files(one["folder"] / "gathered", one["folder"] / "packed")
    assert same_files(one["folder"] / "joined", one["folder"] / "packed")
    model = packed(one["folder"])
    model.load_state_dict(ranks[0]["fsdp"]["state"])
    rs.save(model, one["folder"] / "by_one")
    assert same_files(one["folder"] / "trained", one["folder"] / "by_one")
    assert not same_files(one["folder"] / "trained", one["folder"] / "packed")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert all(walk.same_bits(rank["fsdp"]["weight"], weight) for rank in ranks)


@pytest.mark.parametrize("name", ["state again", "loaded"])
def test_two_ranks_load_what_two_ranks_saved(ranks, name):
    for rank in ranks:
        assert walk.same_bits(rank["fsdp"][name], rank["fsdp"]["logits"])
    assert not torch.equal(ranks[0]["fsdp"]["logits"], ranks[0]["tensor_parallel"]["logits"])


@pytest.mark.parametrize("saved", ["dcp", "dcp_cut"])
def test_one_process_loads_the_distributed_checkpoint_of_two_ranks(one, ranks, saved):
    from torch.distributed import checkpoint as dcp

    model = spoilt(packed(one["folder"]))
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(one["folder"] / saved), no_dist=True)
    model.load_state_dict(state)
    with rs.accuracy("exact"):
        got = logits(model)
    assert walk.same_bits(got, ranks[0]["fsdp"]["logits"] if saved == "dcp" else one["logits"])


def test_mixed_precision_rounds_the_tables_and_leaves_the_codes(ranks):
    for rank in ranks:
        got, want = rank["mixed_precision"]["got"], rank["mixed_precision"]["want"]
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)


def test_tensor_parallel_ranks_compute_what_one_process_does(one, ranks):
    for rank in ranks:
        assert walk.relative(rank["tensor_parallel"]["logits"], one["logits"]) < SUMS


def test_layouts_other_than_the_usual_give_the_same_values_and_gradients(one, ranks):
    model = rs.load(two_layers(), one["folder"] / "mlp")
    x = walk.gaussian(3, 4, 128).requires_grad_()
    with rs.accuracy("exact"):
        y = model(x)
        y.square().sum().backward()
    for number, rank in enumerate(ranks):
        found = rank["sequence_parallel"]
        assert walk.relative(found["y"], y.detach().chunk(RANKS, 1)[number]) < SUMS
        assert walk.relative(found["x"], x.grad.chunk(RANKS, 1)[number]) < SUMS
        assert walk.same_bits(found["weight"], model[0].weight)
        for name, p in model.named_parameters():
            assert walk.relative(found["gradients"][name], p.grad) < SUMS, name


def test_ranks_that_load_their_slices_have_what_slicing_a_loaded_model_gives(ranks):
    for rank in ranks:
        found = rank["tensor_parallel"]
        assert found["read"]
        assert walk.same_bits(found["logits of read"], found["logits"])


def test_a_divided_model_is_printed_without_asking_the_other_ranks(ranks):
    assert "codec=trellis(bits=2" in ranks[0]["fsdp"]["text"]
    assert "SlicedRBELinear" in ranks[0]["tensor_parallel"]["text"]


def test_codes_that_are_parameters_keep_names_values_ties_and_training():
    codec = rs.codec("residual(base=uniform(bits=4), rest=sparse(percent=1))")
    model = nn.Sequential(*(RBELinear.from_packed(walk.encoded(codec, (64, 128))) for _ in "ab"))
    model[1].codes = model[0].codes
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = walk.gaussian(2, 128)
    want = model[0](x)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert parallel.codes_as_parameters(model) is model
    assert model[1].codes is model[0].codes
    assert {m.codes.dtype for m in model} == {torch.uint8}
    assert not dict(model.named_buffers())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert walk.same_bits(model[0](x), want)
