"""Cutting a compressed matrix into equal slices along one side, without decoding it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ..codecs import Codec
from ..nn import RBELinear
from ..packed import Packed

Side = Literal["column", "row"]
SIDES = {"column": 0, "row": 1}  # the dimension of the weight (out, in) that is cut
FEATURES = ("out_features", "in_features")
# Param.axis -> the dimensions of the weight that the param's first dimensions run along.
AXES = {"out": (0,), "in": (1,), "both": (0, 1), "shared": ()}
FAR = 4096  # how many features of one slice away a size that works is looked for


def slice_packed(packed: Packed, rank: int, world: int, side: Side) -> Packed:
    """The `rank`th of `world` equal slices: of out_features ("column") or in_features ("row").

    decode() of the slice is the slice of decode(), bit for bit. Raises ValueError, with the nearest
    sizes that work, where a cut would fall inside a tile or a Hadamard block.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
    dims = cut_dimensions(packed.codec, packed.shape, world, side)
    at = SIDES[side]
    return Packed(
        packed.codec,
        with_size(packed.shape, at, packed.shape[at] // world),
        piece(packed.codes, dims["codes"], rank, world),
        {name: piece(p, dims[name], rank, world) for name, p in packed.params.items()},
    )


def slice_linear(layer: RBELinear, rank: int, world: int, side: Side) -> RBELinear:
    """The layer of one slice, see `slice_packed`; it shares no memory with the whole.

    The outputs of column slices follow each other, those of row slices add up to the whole
    layer's: of these, rank 0 holds the bias.

    >>> layer = RBELinear(256, 128, codec="uniform(bits=4)")
    >>> slice_linear(layer, 1, 2, "row").shape
    (128, 128)
    """
    check_layer(layer)
    packed, bias = slice_packed(layer.packed, rank, world, side), layer.bias
    if bias is not None and side == "column":
        bias = piece(bias, 0, rank, world)
    elif rank:
        bias = None
    return RBELinear.from_packed(packed, bias).train(layer.training)


def check_layer(layer: RBELinear) -> None:
    """Raise unless the layer is of a kind that can be cut."""
    if not isinstance(layer, RBELinear):
        raise TypeError(f"a layer that is cut must be RBELinear, got {type(layer).__name__}")
    if layer.adapter is not None:
        raise ValueError("a layer with an adapter cannot be cut: take the adapter off first")


def cut_dimensions(
    codec: Codec, shape: tuple[int, int], world: int, side: Side
) -> dict[str, int | None]:
    """The dimension of codes and params that `world` equal slices are cut along, None for those
    that every slice has whole. Raises ValueError where there are no such slices."""
    if side not in SIDES:
        raise ValueError(f"side must be 'column' or 'row', got {side!r}")
    at = SIDES[side]
    if not fits(codec, shape, world, at):
        raise ValueError(_refusal(codec, shape, world, at))
    return _dimensions(codec, shape, at)


def fits(codec: Codec, shape: tuple[int, int], world: int, at: int) -> bool:
    """Whether the weight's dimension `at` falls into `world` equal runs of whole tiles and blocks
    that the codec codes alike alone."""
    size, rest = divmod(shape[at], world)
    part = with_size(shape, at, size)
    if rest:
        return False
    for term in _terms(codec):
        block = term.blocks(shape)[at]
        if size % block or term.blocks(part)[at] != block:
            return False
    dims = _dimensions(codec, shape, at)
    try:
        whole, own = _sizes(codec, shape), _sizes(codec, part)
        for name, dim in dims.items():
            if whole[name] != with_size(own[name], dim, world * own[name][dim or 0]):
                return False
        # A tile (or group) starts at a feature where one more feature asks for one more of them.
        for start in range(size, shape[at], max(1, size)):
            before, after = (_sizes(codec, with_size(shape, at, n)) for n in (start, start + 1))
            if any(after[n][d] != before[n][d] + 1 for n, d in dims.items() if d is not None):
                return False
    except ValueError:  # the codec does not take such a shape
        return False
    return True


def piece(tensor: Tensor, dim: int | None, rank: int, world: int) -> Tensor:
    """A contiguous copy of the `rank`th of `world` equal pieces along `dim`, or of the whole."""
    tensor = tensor.detach()
    if dim is not None:
        tensor = tensor.chunk(world, dim)[rank] if tensor.shape[dim] else tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def with_size(sizes: tuple[int, ...], at: int | None, size: int) -> tuple[int, ...]:
    """`sizes` with another size at `at`; None changes nothing."""
    return sizes if at is None else (*sizes[:at], size, *sizes[at + 1 :])


def _dimensions(codec: Codec, shape: tuple[int, int], at: int) -> dict[str, int | None]:
    axes = {"codes": AXES["both"]} | {p.name: AXES[p.axis] for p in codec.params(shape)}
    return {name: axis.index(at) if at in axis else None for name, axis in axes.items()}


def _terms(codec: Codec) -> list[Codec]:
    """The codec and those it is the sum of."""
    settings = (getattr(codec, f.name) for f in dataclasses.fields(codec))
    return [codec, *(value for value in settings if isinstance(value, Codec))]


def _sizes(codec: Codec, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    tile = codec.tile(shape)
    codes = {"codes": (*tile.grid(shape), tile.bytes)}
    return codes | {p.name: tuple(p.sizes) for p in codec.params(shape)}


def _refusal(codec: Codec, shape: tuple[int, int], world: int, at: int) -> str:
    size = shape[at] // world
    works = []
    for sizes in (range(size, max(0, size - FAR), -1), range(size + 1, size + FAR)):
        whole = (with_size(shape, at, world * n) for n in sizes)
        works += [str(s[at]) for s in whole if fits(codec, s, world, at)][:1]
    hint = f"{' and '.join(works)} can" if works else "a tile of this codec runs along all of them"
    return (
        f"{codec.spec}: {shape[at]} {FEATURES[at]} cannot be cut into {world} slices of whole "
        f"tiles and Hadamard blocks, {hint}"
    )
