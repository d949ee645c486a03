"""Tensor parallelism: styles for torch's parallelize_module that cut the codes of a layer."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from .. import ops
from ..nn import RBELinear
from ..packed import Packed
from .slices import SIDES, Side, check_layer, cut_dimensions, piece, with_size


class Sliced:
    """What a style adds to the class of a layer that it cuts.

    Tensors that are cut are DTensors, so that torch.distributed knows the whole of them; the
    others are as they were, and their gradients are summed over the ranks. `shape` is that of the
    whole layer, `packed` and `weight` are this rank's.
    """

    style: _CodesStyle
    mesh: DeviceMesh

    @property
    def packed(self) -> Packed:
        params = [local(p.detach()) for p in self._float_params()]
        return Packed(
            self.codec,
            self._local_shape(),
            local(self.codes),
            dict(zip(self._names, params, strict=True)),
        )

    @property
    def weight(self) -> Tensor:
        return self.packed.decode()

    def _local_shape(self) -> tuple[int, int]:
        if not isinstance(self.codes, DTensor):  # inside `gathered`
            return self.shape
        at = SIDES[self.style.side]
        return with_size(self.shape, at, self.shape[at] // self.mesh.size())

    def forward(self, x: Tensor | DTensor) -> Tensor | DTensor:
        if self.adapter is not None or self.observer is not None:
            raise ValueError("a layer that is cut over ranks takes no adapter and no observer")
        style, mesh = self.style, self.mesh
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [style.input_layouts], run_check=False)
        x = x.redistribute(placements=[style.taken]).to_local(grad_placements=style.returned)
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        params = [_on_rank(p, mesh) for p in self._float_params()]
        y = ops.linear(x, local(self.codes), params, self.codec.spec, self._local_shape())
        y = DTensor.from_local(y, mesh, [style.given], run_check=False)
        y = y.redistribute(placements=[style.output_layouts])
        if self.bias is not None:
            bias = self.bias
            if not isinstance(bias, DTensor):
                bias = DTensor.from_local(bias, mesh, [Replicate()], run_check=False)
            y = y + bias.to(y.dtype)
        return y.to_local() if style.use_local_output else y


class _CodesStyle(ParallelStyle):
    side: ClassVar[Side]
    taken: ClassVar[Placement]  # how the layer wants its input,
    returned: ClassVar[list[Placement] | None]  # has the gradient of it (None: the same way)
    given: ClassVar[Placement]  # and its output,
    usual: ClassVar[Placement]  # which the default passes on like this

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__()
        self.input_layouts = input_layouts or self.taken
        self.output_layouts = output_layouts or self.usual
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_layer(module)
        if isinstance(module, Sliced):
            raise ValueError("the layer is cut over ranks already")
        if device_mesh.ndim != 1:
            raise ValueError(f"a layer is cut over a mesh of one dimension, got {device_mesh.ndim}")
        dims = cut_dimensions(module.codec, module.shape, device_mesh.size(), self.side)
        if self.side == "column" and module.bias is not None:
            dims["bias"] = 0
        for name, dim in dims.items():
            if dim is not None:
                put(module, name, distributed(getattr(module, name), device_mesh, dim))
        module.__class__ = _sliced(type(module))
        module.style, module.mesh = self, device_mesh
        return module


class ColwiseCodes(_CodesStyle):
    """torch's ColwiseParallel for an RBELinear: each rank holds a slice of out_features.

    Every rank must bring the same whole layer (or one without data, see `load`): nothing is sent.
    Layouts are as in torch; by default the input is replicated and the output this rank's.
    Raises ValueError as `slice_packed` does.
    """

    side = "column"
    taken, returned, given = Replicate(), [Partial()], Shard(-1)
    usual = Shard(-1)


class RowwiseCodes(_CodesStyle):
    """torch's RowwiseParallel for an RBELinear: each rank holds a slice of in_features, and the
    products are summed over the ranks. Otherwise as ColwiseCodes."""

    side = "row"
    taken, returned, given = Shard(-1), None, Partial()
    usual = Replicate()


@functools.cache
def _sliced(kind: type[RBELinear]) -> type[RBELinear]:
    return type(f"Sliced{kind.__name__}", (Sliced, kind), {})


def distributed(whole: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """This rank's share of a tensor that every rank has."""
    own = piece(whole, dim, mesh.get_local_rank(), mesh.size())
    return DTensor.from_local(own, mesh, [Shard(dim)], run_check=False)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, whichever it is."""
    old = module._parameters.get(name)
    if old is None:
        module._buffers[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _on_rank(param: Tensor, mesh: DeviceMesh) -> Tensor:
    """A param as this rank computes with it; the gradients of one that all have are summed."""
    if isinstance(param, DTensor) or not param.is_floating_point():
        return local(param)
    everywhere = DTensor.from_local(param, mesh, [Replicate()], run_check=False)
    return everywhere.to_local(grad_placements=[Partial()])
