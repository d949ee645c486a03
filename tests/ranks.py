"""What each of two ranks does for test_parallel.py, and the models that they do it with."""

import datetime
import warnings

import pytest
import torch
import walk
from torch import distributed, nn

import reality_stone as rs
from reality_stone import parallel
from reality_stone.nn import RBELinear

RANKS = 2
STEPS = 3
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
