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
# Float32 sums in another order, over a few steps: each differs by some 1e-7 of its size.
SUMS = 2e-5
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


def train(model, batch) -> list[float]:
    # Rates that move every table by about a tenth; SGD, as Adam makes steps of rounding errors.
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits.clone()


def code_bytes(model) -> int:
    """Bytes of codes that are in this process now."""
    layers = [m for m in model.modules() if isinstance(m, RBELinear)]
    local = [getattr(m.codes, "to_local", lambda m=m: m.codes)() for m in layers]
    return sum(t.untyped_storage().nbytes() for t in local)


# --- what each rank does; everything that is compared comes back in a dictionary ---


def ddp(rank, folder) -> dict:
    model = packed(folder)
    if rank:  # what a rank starts with is overwritten
        for layer in model.modules():
            if isinstance(layer, RBELinear):
                layer.codes.zero_()
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    losses = train(wrapped, tokens().chunk(RANKS)[rank])
    return {"losses": losses, "state": model.state_dict()}


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    parallel.shard_codes(model)
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
    found["text"] = repr(model)  # must not wait for the other rank
    with parallel.gathered(model):
        if not rank:
            rs.save(model, f"{folder}/gathered")
    found["losses"] = train(model, tokens().chunk(RANKS)[rank])
    found["bytes after training"] = code_bytes(model)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=full)
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/dcp")
    with parallel.gathered(model):
        if not rank:
            rs.save(model, f"{folder}/trained")
        found["weight"] = model.model.layers[0].mlp.up_proj.weight
    found |= {"logits": logits(model), "state": state}

    other = spoilt(sharded(packed(folder)))
    set_model_state_dict(other, state if not rank else {}, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))  # fmt: skip
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
        for p in model.parameters():
            p.zero_()
    return model


def mixed_precision(rank, folder) -> dict:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layer = packed(folder).model.layers[0].mlp.up_proj
    rounded = packed(folder).model.layers[0].mlp.up_proj.bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(parallel.shard_codes(layer), mp_policy=policy)
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
    with torch.device("meta"):
        empty = llama()
    read = parallel.load(llama(), f"{folder}/packed", mesh, styles())
    model = parallelize_module(packed(folder), mesh, styles())
    layers = [(a, b) for a, b in zip(read.modules(), model.modules(), strict=True)]
    layers = [(a.packed, b.packed) for a, b in layers if isinstance(a, RBELinear)]
    found = {
        "bytes": code_bytes(model),
        "text": repr(model),
        "read": all(torch.equal(a.codes, b.codes) for a, b in layers),
        "logits": logits(model),
        "logits of read": logits(read),
        "meta": empty.device.type,
    }
    with parallel.gathered(model):
        if not rank:
            rs.save(model, f"{folder}/joined")
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/dcp_cut")
    found["losses"] = train(model, tokens())
    with parallel.gathered(model):
        found["state"] = {k: v.clone() for k, v in model.state_dict().items()}
    return found


CHECKS = (ddp, fsdp, mixed_precision, tensor_parallel)


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
    model = packed(folder)
    with rs.accuracy("exact"):
        found = {"folder": folder, "logits": logits(model), "bytes": code_bytes(model)}
        found["before"] = {k: v.clone() for k, v in model.state_dict().items()}
        found["losses"] = train(model, tokens())
    return found | {"state": model.state_dict()}


@pytest.fixture(scope="module")
def ranks(one):
    folder = one["folder"]
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_trained_alike(got: dict, one: dict) -> None:
    assert got.keys() == one["state"].keys()
    for name, want in one["state"].items():
        if want.dtype == torch.uint8:
            assert torch.equal(got[name], want), name
            continue
        moved = (want - one["before"][name]).norm()
        assert moved > 0, name
        assert (got[name] - want).norm() <= SUMS * want.norm() + 1e-3 * moved, name


