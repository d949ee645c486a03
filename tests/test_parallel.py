"""Two ranks agree with one process: DDP, FSDP2, distributed checkpoints, tensor parallelism."""

import pytest
import torch
import walk
from ranks import (
    RANKS,
    code_bytes,
    llama,
    logits,
    packed,
    spoilt,
    tokens,
    train,
    two_layers,
    worker,
)
from torch import nn

import reality_stone as rs
from reality_stone import parallel
from reality_stone.nn import RBELinear

IMPORTS = ["reality_stone.parallel", "transformers.models.llama.modeling_llama"]
# Float32 sums of some thousand terms in another order, through two blocks and three steps.
SUMS = 1e-5


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
