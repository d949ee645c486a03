"""Changes of codes that a quadratic model of the loss says are worth trying.

For a change D of the weight the model is <G, D> + c/2 tr F D H D^T: G the gradient of the weight,
H = E[x x^T] of the inputs, F the second moment of a token's gradient at the output, c what trials
have shown the curvature to be. Codes made of fields move by one step of one field; codes without
fields are tiles, re-encoded towards the Newton step of each tile's own block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import ops
from ..codecs import Codec
from ..derivative import Move, moves
from ..feedback import Hessian
from ..packed import Packed

# The model's gradient is taken anew between them: codes that move the same outputs see each other.
ROUNDS = 4
SPARE = 2  # tiles encoded for each that is wanted: not every goal is near a code


@dataclass
class Quadratic:
    """The model of one layer. gradient (out, in), inputs (in, in), outputs (out, out) or its
    diagonal (out,), all of the same device; damping of inputs and outputs, by mean diagonals."""

    gradient: Tensor
    inputs: Tensor
    outputs: Tensor
    damping: tuple[float, float]
    curvature: float = 1.0

    def __post_init__(self):
        self.h = Hessian(self.inputs, self.damping[0]).damped()
        if self.outputs.dim() == 1:
            self.f = self.outputs + self.damping[1] * self.outputs.mean()
        else:
            self.f = Hessian(self.outputs, self.damping[1]).damped()

    @property
    def usable(self) -> bool:
        """Whether there is a gradient, and curvature on both sides, in finite numbers."""
        sizes = torch.stack(
            [self.gradient.abs().sum(), self.inputs.trace(), self.f.sum() if self.f.dim() == 1
             else self.f.trace(), self.f.abs().max(), self.h.abs().max()]
        )  # fmt: skip
        return bool((sizes.isfinite() & (sizes > 0)).all())

    def bend(self, change: Tensor) -> Tensor:
        """F D H (out, in): the change of the gradient, but for c."""
        dh = change @ self.h
        return self.f[:, None] * dh if self.f.dim() == 1 else self.f @ dh

    def own_outputs(self) -> Tensor:
        """Diagonal of F (out,)."""
        return self.f if self.f.dim() == 1 else self.f.diagonal()


@dataclass(frozen=True)
class Proposal:
    """codes: with `count` changes made; linear, quadratic: <G, D> and tr F D H D^T / 2 of it."""

    codes: Tensor
    count: int
    linear: float
    quadratic: float


# What the best changes are, best first: apply(k) gives the codes with the first k of them made.
Ranked = tuple[int, Callable[[int], Tensor]]


def changeable(codec: Codec, shape: tuple[int, int]) -> bool:
    """Whether there are changes to propose for the codec's codes."""
    return bool(codec.fields(shape)) or codec.plain


def units(codec: Codec, shape: tuple[int, int]) -> int:
    """How many changes can be made at once."""
    found = moves(codec, shape)
    rows, cols = _unit(found) if found else (codec.tile(shape).rows, codec.tile(shape).cols)
    return -(-shape[0] // rows) * -(-shape[1] // cols)


def propose(packed: Packed, model: Quadratic, count: int) -> Proposal | None:
    """At most `count` changes whose joint value in the model is negative; None where none is found.

    Each round ranks changes by their own predicted value and halves its set until the whole change
    is better than before the round.
    """
    if not model.usable:
        return None
    rank = _fields if packed.codec.fields(packed.shape) else _tiles
    start = packed.decode()
    codes, bend = packed.codes, torch.zeros_like(start)
    made, best, parts = 0, 0.0, (0.0, 0.0)
    for turn in range(min(ROUNDS, count)):
        wanted = -(-(count - made) // (min(ROUNDS, count) - turn))
        now = replace(packed, codes=codes)
        found, apply = rank(now, model, model.gradient + model.curvature * bend, wanted)
        while found:
            tried = apply(found)
            new = replace(packed, codes=tried).decode() - start
            bent = model.bend(new)
            linear, quadratic = _dot(model.gradient, new), 0.5 * _dot(bent, new)
            value = linear + model.curvature * quadratic
            if value < best:
                break
            found //= 2
        if not found:
            break
        codes, bend, best = tried, bent, value
        made, parts = made + found, (linear, quadratic)
    return Proposal(codes, made, *parts) if made else None


def _dot(a: Tensor, b: Tensor) -> float:
    return (a.double() * b).sum().item()


# --- fields ---


def _unit(found: list[Move]) -> tuple[int, int]:
    """Rows and columns within which at most one code moves: fields can overlap."""
    return math.lcm(*(m.rows for m in found)), math.lcm(*(m.cols for m in found))


def _fields(packed: Packed, model: Quadratic, gradient: Tensor, wanted: int) -> Ranked:
    """The best move in each unit, valued with all of H under a code's columns and F's diagonal."""
    found = moves(packed.codec, packed.shape)
    unit = _unit(found)
    weight = packed.decode()
    best = which = at = None
    for number, move in enumerate(found):
        change = replace(packed, codes=move.apply(packed.codes)).decode() - weight
        value = _by_code(move, change, packed.codes, model, gradient)
        down, across = unit[0] // move.rows, unit[1] // move.cols
        value = _folded(value, down, across)
        value, place = value.min(-1)
        if best is None:
            best, which, at = value, torch.zeros_like(place), place
            continue
        less = value < best
        best = torch.where(less, value, best)
        which, at = which.masked_fill(less, number), torch.where(less, place, at)
    values, order = (-best.flatten()).topk(min(wanted, best.numel()))

    def apply(k: int) -> Tensor:
        codes, top = packed.codes, torch.zeros_like(best, dtype=torch.bool)
        top.view(-1)[order[:k]] = True
        for number, move in enumerate(found):
            mine = top & (which == number)
            if bool(mine.any()):
                down, across = unit[0] // move.rows, unit[1] // move.cols
                codes = move.apply(codes, _unfolded(mine, at, down, across, move.grid(codes)))
        return codes

    return int((values > 0).sum()), apply


def _by_code(
    move: Move, change: Tensor, codes: Tensor, model: Quadratic, gradient: Tensor
) -> Tensor:
    """Predicted value (grid) of the move of each code alone."""
    linear = move.sums(gradient * change, codes)
    if move.cols == 1:
        bent = change * model.h.diagonal()
    else:
        (out, n), across = change.shape, move.grid(codes)[1]
        wide = pad(change, (0, across * move.cols - n)).view(out, across, move.cols)
        blocks = _diagonal_blocks(pad(model.h, (0, across * move.cols - n) * 2), move.cols)
        bent = torch.einsum("oac,acd->oad", wide, blocks).reshape(out, -1)[:, :n]
    bent = bent * change * model.own_outputs()[:, None]
    return linear + 0.5 * model.curvature * move.sums(bent, codes)


def _folded(values: Tensor, down: int, across: int) -> Tensor:
    """(grid) -> (units down, units across, codes in a unit), infinite where there is no code."""
    rows, cols = values.shape
    values = pad(values, (0, -cols % across, 0, -rows % down), value=math.inf)
    values = values.view(-1, down, values.shape[1] // across, across)
    return values.transpose(1, 2).flatten(2)


def _unfolded(mine: Tensor, at: Tensor, down: int, across: int, grid: tuple[int, int]) -> Tensor:
    """Bool (grid): the code `at` this place in each unit that is `mine`."""
    chosen = torch.zeros((*mine.shape, down * across), dtype=torch.bool, device=mine.device)
    chosen.scatter_(2, at[..., None], mine[..., None])
    chosen = chosen.view(*mine.shape, down, across).transpose(1, 2)
    chosen = chosen.reshape(mine.shape[0] * down, mine.shape[1] * across)
    return chosen[: grid[0], : grid[1]]


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """(n, n) -> the n / size square blocks on its diagonal."""
    n = matrix.shape[0] // size
    return matrix.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


# --- tiles ---


def _tiles(packed: Packed, model: Quadratic, gradient: Tensor, wanted: int) -> Ranked:
    """Tiles of T encoded anew where that helps by their own blocks of F and H."""
    codec, (out, n) = packed.codec, packed.shape
    tile = codec.tile(packed.shape)
    r, c = tile.rows, tile.cols
    down, across = tile.grid(packed.shape)
    f, h = _inner_blocks(packed, model, down, across)
    g = _inner_gradient(packed, gradient, down * r, across * c)
    g = g.view(down, r, across, c).transpose(1, 2)
    step = _inverse(f)[:, None] @ g @ _inverse(h) / model.curvature
    promise = (step * g).sum((2, 3)).flatten()
    order = promise.topk(min(SPARE * wanted, len(promise)))[1]
    i, j = order // across, order % across
    place = i.to(packed.codes.device), j.to(packed.codes.device)
    params = _tile_params(packed, *place)
    size = (len(order) * r, c)
    spec = codec.inner().spec
    old = ops.decode(packed.codes[place][:, None].contiguous(), params, spec, size)
    goal = old - step[i, j].reshape(size)
    # The encoder's params are those of the layer: what it would fit to a tile is not taken.
    new = ops.encode(goal.contiguous(), None, params, spec)[0]
    change = (ops.decode(new, params, spec, size) - old).view(-1, r, c)
    device = change.device
    inside = (i[:, None] * r + torch.arange(r, device=device) < out)[:, :, None]
    inside = inside & (j[:, None] * c + torch.arange(c, device=device) < n)[:, None]
    change = change * inside
    value = (change * (g[i, j] + 0.5 * model.curvature * (f[i] @ change @ h[j]))).sum((1, 2))
    best, chosen = (-value).topk(min(wanted, len(value)))

    def apply(k: int) -> Tensor:
        codes, top = packed.codes.clone(), chosen[:k]
        codes[i[top], j[top]] = new[top, 0]
        return codes

    return int((best > 0).sum()), apply


def _inner_gradient(packed: Packed, gradient: Tensor, rows: int, cols: int) -> Tensor:
    """dLoss/dT for dLoss/dW, zero in the padding."""
    out_block, in_block = packed.codec.blocks(packed.shape)
    if "out_scale" in packed.params:
        gradient = gradient * packed.params["out_scale"][:, None]
    if "in_scale" in packed.params:
        gradient = gradient * packed.params["in_scale"]
    turned = ops.hadamard(gradient.contiguous(), in_block).t().contiguous()
    turned = ops.hadamard(turned, out_block).t()
    return pad(turned, (0, cols - turned.shape[1], 0, rows - turned.shape[0])).contiguous()


def _inner_blocks(
    packed: Packed, model: Quadratic, down: int, across: int
) -> tuple[Tensor, Tensor]:
    """F (down, rows, rows) and H (across, cols, cols) of T, the blocks of its tiles, damped."""
    tile, (out_block, in_block) = packed.codec.tile(packed.shape), packed.codec.blocks(packed.shape)
    h = Hessian(model.inputs, model.damping[0])
    h = h.rotated(packed.params.get("in_scale"), in_block, across * tile.cols)
    scale = packed.params.get("out_scale")
    outputs = model.outputs
    if outputs.dim() == 1:  # rotated, the diagonal is the mean of each Hadamard block
        if scale is not None:
            outputs = outputs * scale * scale
        outputs = outputs.view(-1, out_block).mean(1).repeat_interleave(out_block)
        mean = outputs.mean()
        outputs = outputs + model.damping[1] * mean
        outputs = torch.cat((outputs, mean.expand(down * tile.rows - len(outputs))))
        f = outputs.view(down, tile.rows).diag_embed()
    else:
        f = Hessian(outputs, model.damping[1]).rotated(scale, out_block, down * tile.rows)
        f = _diagonal_blocks(f, tile.rows)
    return f, _diagonal_blocks(h, tile.cols)


def _inverse(blocks: Tensor) -> Tensor:
    """Of positive blocks, in float64, each with a floor under its diagonal."""
    blocks = blocks.double()
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1)
    floor = 1e-6 * mean.clamp_min(1e-6 * mean.max())
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    return torch.linalg.inv(blocks + floor[:, None, None] * eye).float()


def _tile_params(packed: Packed, i: Tensor, j: Tensor) -> list[Tensor]:
    """The params of tiles (i, j), one below the other, in the frame of T: its scales are one."""
    tile = packed.codec.tile(packed.shape)
    own = []
    for spec in packed.codec.params(packed.shape):
        p = packed.params[spec.name]
        if spec.name in ("out_scale", "in_scale"):
            p = p.new_ones(len(i) * tile.rows if spec.name == "out_scale" else tile.cols)
        elif spec.axis == "out":
            missing = -len(p) % tile.rows
            p = pad(p, (0, 0) * (p.dim() - 1) + (0, missing))
            p = p.view(-1, tile.rows, *p.shape[1:])[i].flatten(0, 1)
        elif spec.axis == "both":
            p = p[i, j][:, None]
        own.append(p.contiguous())
    return own
