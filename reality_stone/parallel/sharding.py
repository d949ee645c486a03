"""Models whose parameters are divided over ranks: codes for FSDP2, gathering, loading slices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from .. import checkpoint as files
from .. import swap, tensorfile
from ..nn import Compressed
from .slices import piece
from .styles import Sliced


def codes_as_parameters(model: nn.Module) -> nn.Module:
    """Make the codes of all compressed layers frozen uint8 parameters, in place; returns the model.

    Call it before `fully_shard` or DistributedDataParallel. `fully_shard` then divides the codes by
    rows of tiles and gathers them as bytes for each pass, whatever its mixed precision; DDP sends
    them once, not with every pass. Let one `fully_shard` hold all layers that share a table
    (`ultra(codebook=model)`): two would each train a table of their own. The state dict keeps its
    names and values; the layers take no other codec (`recode`) any more.
    """
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for module in model.modules():
        if not isinstance(module, Compressed):
            continue
        for name, codes in list(module._buffers.items()):
            if codes is None or codes.dtype != torch.uint8:
                continue
            if id(codes) not in made:
                made[id(codes)] = codes, nn.Parameter(codes, requires_grad=False)
            del module._buffers[name]
            module.register_parameter(name, made[id(codes)][1])
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """The model with every divided tensor whole, for reading: to save it, to decode a weight.

    All ranks enter together and each has the whole model meanwhile, so there must be room for it.
    No forward pass inside; changes to tensors that were divided are lost.

    >>> with gathered(model):  # doctest: +SKIP
    ...     if torch.distributed.get_rank() == 0:
    ...         reality_stone.save(model, "packed")
    """
    whole: dict[int, Tensor] = {}
    places = [
        (own, name, tensor)
        for module in model.modules()
        for own in (module._parameters, module._buffers)
        for name, tensor in own.items()
        if isinstance(tensor, DTensor)
    ]
    try:
        for own, name, tensor in places:
            if id(tensor) not in whole:
                full = tensor.detach().full_tensor()
                if isinstance(tensor, nn.Parameter):
                    full = nn.Parameter(full, requires_grad=tensor.requires_grad)
                whole[id(tensor)] = full
            own[name] = whole[id(tensor)]
        yield model
    finally:
        for own, name, tensor in places:
            own[name] = tensor


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    mesh: DeviceMesh,
    plan: Mapping[str, ParallelStyle],
) -> nn.Module:
    """Load a checkpoint with the layers that `plan` names cut over `mesh`; returns the model.

    plan: as in `parallelize_module`, of ColwiseCodes and RowwiseCodes. Each rank reads the file by
    itself, a cut layer at a time, and keeps its slices. `model` is whole, dense or without data.
    Raises as `reality_stone.load` does, and ValueError where a layer cannot be cut.
    """
    checkpoint = files.open_checkpoint(directory)
    header, entries = checkpoint.header, checkpoint.plan
    names = files._match(model, checkpoint)
    devices = {entry.name: files._device(swap.find_layer(model, entry)) for entry in entries}
    swap.replace(model, entries)
    parallelize_module(model, mesh, dict(plan))
    tensors: dict[str, Tensor] = {}
    with header.path.open("rb") as file, torch.no_grad():

        def read(name: str) -> Tensor:
            return tensorfile.read_tensor(header, header.entries[name], file)

        for entry in entries:
            layer, device = model.get_submodule(entry.name), devices[entry.name]
            if any(t.is_meta for t in (layer.codes, *layer.params)):
                layer.to_empty(device="cpu" if device.type == "meta" else device)
            own = {name: read(name) for name in files.stored_names(header, entry).values()}
            packed = files.check_layer(header, entry, own)
            if not isinstance(layer, Sliced):
                tensors |= own
                continue
            whole = {"codes": packed.codes, **packed.params}
            if entry.bias:
                whole["bias"] = read(names[f"{entry.prefix}bias"])
            _fill(layer, whole)
        cut = tuple(
            f"{name}." if name else ""
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, Sliced)
        )
        rest = {name: stored for name, stored in names.items() if not name.startswith(cut)}
        tensors |= {name: read(name) for name in {*rest.values()} - {*tensors}}
        files._check_ties(header.path, rest, tensors, model.state_dict(keep_vars=True))
        files._assign(model, rest, tensors)
        files._tie_common(model, checkpoint)
    return model


def _fill(layer: Sliced, whole: Mapping[str, Tensor]) -> None:
    """Give a cut layer its slices of whole tensors."""
    for name, value in whole.items():
        target = getattr(layer, name)
        if isinstance(target, DTensor):
            dim = target.placements[0].dim
            target.to_local().copy_(
                piece(value, dim, layer.mesh.get_local_rank(), layer.mesh.size())
            )
        else:
            target.copy_(value)
