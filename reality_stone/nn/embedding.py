"""RBEEmbedding: nn.Embedding with the table as codes, of which only the rows asked for decode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from ..codecs import Codec
from ..codecs import codec as make_codec
from .compressed import Compressed
from .linear import RBELinear


class RBEEmbedding(Compressed):
    """Rows (..., embedding_dim) of a compressed table for ids (...), int32 or int64.

    Only the blocks of rows that hold the ids decode, each once. A block is one row for codecs with
    tiles of one row, such as the default; with a rotation over the rows (trellis) it is up to 128.
    The result has `dtype`, which follows `.half()` and its like.

    The row `padding_idx` gets no gradient; from scratch, and where the dense table has zeros there,
    it is exactly zero. Raises IndexError on an id that is not in the table, TypeError on ids that
    are no integers.

    >>> embedding = RBEEmbedding(1000, 64)
    >>> embedding(torch.tensor([[1, 2, 2]])).shape
    torch.Size([1, 3, 64])
    """

    kind, dense_name = "embedding", "nn.Embedding"
    kept = ()

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        codec: str | Codec = "uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ):
        super().__init__(make_codec(codec, **settings), (num_embeddings, embedding_dim), device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = torch.empty(0, dtype=dtype).dtype
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx must be a row of the table of {num_embeddings}, got {padding_idx}"
            )
        # Counted from the end where negative, as nn.Embedding does.
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.register_parameter("bias", None)
        if self.codes.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Encode a fresh table with nn.Embedding's law, Gaussian with deviation 1."""
        weight = torch.randn(self.shape)
        if self.padding_idx is not None:
            weight[self.padding_idx] = 0
        self.set_packed(self.codec.encode(weight))
        if self.padding_idx is not None:
            self._clear_padding()

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, codec: str | Codec = "uniform", **settings: Any
    ) -> RBEEmbedding:
        """Compress a dense embedding. ValueError where its forward is more than taking rows."""
        if not cls.replaces(embedding):
            raise ValueError(
                f"RBEEmbedding stands for nn.Embedding without max_norm, got {embedding}"
            )
        return cls.from_dense(embedding, make_codec(codec, **settings))

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        # A subclass with its own forward scales the rows, or shifts the ids.
        return (
            isinstance(module, nn.Embedding)
            and type(module).forward is nn.Embedding.forward
            and module.max_norm is None
        )

    @classmethod
    def blank(cls, module: nn.Module, codec: Codec) -> RBEEmbedding:
        dtype = module.dtype if isinstance(module, Compressed) else module.weight.dtype
        rows, dim = module.num_embeddings, module.embedding_dim
        return cls(rows, dim, module.padding_idx, codec, device="meta", dtype=dtype)

    @classmethod
    def from_dense(
        cls, module: nn.Module, codec: Codec, hessian: Tensor | None = None, **options: Any
    ) -> RBEEmbedding:
        layer = super().from_dense(module, codec, None, **options)  # ids have no second moment
        if layer.padding_idx is not None and not module.weight[layer.padding_idx].any():
            layer._clear_padding()
        return layer

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        rows, dim = self.shape
        dense = nn.Embedding(rows, dim, self.padding_idx, device="meta")
        dense.weight = nn.Parameter(self.weight.to(dtype or torch.float32))
        return dense.train(self.training)

    def head(self, bias: nn.Parameter | None = None) -> RBELinear:
        """The output head tied to this table: (..., embedding_dim) -> (..., num_embeddings), with
        the same codes and Parameters, and a bias of its own if one is given."""
        rows, dim = self.shape
        layer = RBELinear(dim, rows, False, self.codec, device="meta")
        layer.share(self)
        layer.bias = bias
        return layer.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
        blocks, index = self._blocks(ids.reshape(-1).long())
        # Its backward adds up repeated ids in a fixed order on every device.
        rows = functional.embedding(index, self._decode(blocks)).view(*ids.shape, self.shape[1])
        if self.padding_idx is not None:
            rows = torch.where(ids.eq(self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows.to(self.dtype)

    @property
    def rows_together(self) -> int:
        """Rows of a block: whole tiles and whole rotations."""
        parts = self.codec.parts
        return math.lcm(*(math.lcm(t.tile(self.shape).rows, self._rotation(t)) for t in parts))

    def _rotation(self, term: Codec) -> int:
        return term.blocks(self.shape)[0]

    def _blocks(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which blocks to decode, and where in them the row of each id is."""
        step = self.rows_together
        if ids.is_meta or torch.compiler.is_compiling():  # sizes must not depend on the ids
            places = torch.arange(ids.numel(), device=ids.device)
            return ids // step, places * step + ids % step
        ids, back = ids.unique(return_inverse=True)
        if ids.numel() and (ids[0] < 0 or ids[-1] >= self.shape[0]):
            wrong = ids[0] if ids[0] < 0 else ids[-1]
            raise IndexError(f"id {int(wrong)} is not in the table of {self.shape[0]} rows")
        if step == 1:
            return ids, back
        blocks, place = (ids // step).unique_consecutive(return_inverse=True)
        return blocks, (place * step + ids % step)[back]

    def _decode(self, blocks: Tensor) -> Tensor:
        """The rows of these blocks, one block after the other, float32."""
        n, step = self.shape[1], self.rows_together
        rows = blocks.numel() * step
        turned = [(t, self._rotation(t)) for t in self.codec.parts]
        if rows and any(t.blocks((rows, n))[0] != size for t, size in turned):
            # A part would be rotated in other blocks than the whole: some more rows mend that.
            rows += max(size for _, size in turned)
            blocks = torch.cat((blocks, blocks[-1:]))
        part, tile = (rows, n), self.codec.tile(self.shape)
        codes = _cut(self.codes, blocks, step // tile.rows, tile.grid(part)[0])
        params = []
        one = self.codec.params((step, n))
        for p, spec, wanted in zip(self.params, one, self.codec.params(part), strict=True):
            if spec.axis in ("out", "both"):
                p = _cut(p, blocks, spec.sizes[0], wanted.sizes[0])
            params.append(p.float() if p.is_floating_point() else p)
        return ops.decode(codes, params, self.codec.spec, part)[: blocks.numel() * step]

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """Make the row of padding_idx exactly zero by the scales that it has for itself."""
        for spec in self.codec.params(self.shape):
            if spec.axis in ("out", "both") and not spec.codes and spec.sizes[0] == self.shape[0]:
                getattr(self, spec.name)[self.padding_idx] = 0
        step = self.rows_together
        block = torch.tensor([self.padding_idx // step], device=self.codes.device)
        if self._decode(block)[self.padding_idx % step].any():
            raise ValueError(
                f"{self.codec.name} has no scale of each row, so the padding row cannot be zero: "
                "choose another codec"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RBEEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, "
        if self.padding_idx is not None:
            text += f"padding_idx={self.padding_idx}, "
        return text + self._rate()


def _cut(tensor: Tensor, blocks: Tensor, units: int, count: int) -> Tensor:
    """The `units` rows of each block, `count` in all; the last block of a tensor may be short."""
    if units == 1:
        index = blocks
    else:
        index = blocks[:, None] * units + torch.arange(units, device=blocks.device)
        index = index.flatten().clamp_max(tensor.shape[0] - 1)
    index = index[:count]
    if not tensor.is_floating_point():
        return tensor[index]
    return functional.embedding(
        index, tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    ).view(-1, *tensor.shape[1:])
