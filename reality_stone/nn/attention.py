"""RBEAttention: multi-head attention with one compressed product for queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..codecs import Codec
from ..codecs import codec as make_codec
from .ffn import fused
from .linear import RBELinear


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, each (..., kv heads, tokens, head_dim); keys turned."""

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        return self.keys.shape[-2]

    def append(self, keys: Tensor, values: Tensor) -> KVCache:
        pairs = zip(self, (keys, values), strict=True)
        return KVCache(*(torch.cat((old.to(new.dtype), new), -2) for old, new in pairs))


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., RoFormer, 2021) in Llama's order of the dimensions.

    Dimension i of the first half and i of the second turn together by position * base^(-2i/d).
    fraction: the share d / head_dim of the dimensions that turn, the first ones; scale: positions
    are divided by it.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        if not (self.base > 0 and 0 < self.fraction <= 1 and self.scale > 0):
            raise ValueError(
                "rotary: base and scale must be positive and fraction above 0 and at most 1, got "
                f"{self.base}, {self.scale} and {self.fraction}"
            )

    def turned(self, head_dim: int) -> int:
        """How many dimensions of a head turn. ValueError unless they come in pairs."""
        size = round(head_dim * self.fraction)
        if size % 2 or not size:
            raise ValueError(f"rotary: the dimensions that turn must be even, got {size}")
        return size

    def angles(self, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (..., tokens, d), float32, for positions (..., tokens)."""
        size = self.turned(head_dim)
        pair = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
        angle = (positions.float() / self.scale)[..., None] * (1.0 / self.base ** (pair / size))
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn x (..., heads, tokens, head_dim); computed in float32, returned in x's dtype."""
        size = cos.shape[-1]
        turning = x[..., :size].float()
        first, second = turning.chunk(2, -1)
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
        turning = (turning * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
        return turning if size == x.shape[-1] else torch.cat((turning, x[..., size:]), -1)


class RBEAttention(nn.Module):
    """Self-attention of x (..., tokens, embed_dim) -> the same shape.

    `qkv` is one RBELinear with the rows of the queries, of the keys and of the values; `out` is
    another. num_kv_heads below num_heads makes groups of heads share keys and values. rotary: a
    Rotary, or its base. causal: a token sees those before it and itself.

    Called with `cache` (KVCache, `empty_cache` for the first time) it returns (y, new cache), and x
    continues the tokens of the cache. mask: as scaled_dot_product_attention takes it, True where a
    key may be seen or a float to add, broadcast to (..., heads, tokens, all tokens); with `causal`
    both apply. positions: (..., tokens) for rotary, by default on from the cache. dropout: of the
    attention weights while training. Raises ValueError on sizes that do not fit.

    >>> attention = RBEAttention(64, 4, num_kv_heads=2, rotary=10_000.0, causal=True)
    >>> y, cache = attention(torch.zeros(2, 5, 64), cache=attention.empty_cache(2))
    >>> y.shape, cache.tokens
    (torch.Size([2, 5, 64]), 5)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        rotary: Rotary | float | None = None,
        causal: bool = False,
        bias: bool = True,
        *,
        head_dim: int | None = None,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        codec: str | Codec = "trellis",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ):
        super().__init__()
        kv = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv < 1 or num_heads % kv:
            raise ValueError(f"{num_heads} heads cannot share keys and values in {kv} groups")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of {num_heads} heads")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv
        self.head_dim = head_dim or embed_dim // num_heads
        self.rotary = Rotary(float(rotary)) if isinstance(rotary, (int, float)) else rotary
        if not isinstance(self.rotary, Rotary | None):
            raise TypeError(f"rotary must be a Rotary or its base, got {type(rotary).__name__}")
        if self.rotary is not None:
            self.rotary.turned(self.head_dim)
        self.causal, self.dropout = causal, dropout
        made = make_codec(codec, **settings)
        self.sizes = [n * self.head_dim for n in (num_heads, kv, kv)]
        self.qkv = RBELinear(embed_dim, sum(self.sizes), bias, made, device, dtype)
        out_bias = bias if out_bias is None else out_bias
        self.out = RBELinear(self.sizes[0], embed_dim, out_bias, made, device, dtype)

    @classmethod
    def from_linears(
        cls,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        out: nn.Linear,
        num_heads: int,
        rotary: Rotary | float | None = None,
        causal: bool = False,
        *,
        dropout: float = 0.0,
        codec: str | Codec = "trellis",
        **settings: Any,
    ) -> RBEAttention:
        """Compress dense projections; the width of k says how many heads share keys and values."""
        inputs, width = q.in_features, q.out_features
        head = width // num_heads if num_heads > 0 else 0
        if not head or width % num_heads or k.out_features % head:
            raise ValueError(
                f"{num_heads} heads do not fit queries of {width} and keys of {k.out_features}"
            )
        if v.out_features != k.out_features or (out.in_features, out.out_features) != (
            width, inputs
        ):  # fmt: skip
            raise ValueError(
                f"v must be as wide as k and out {width} -> {inputs}, got {v.out_features} and "
                f"{out.in_features} -> {out.out_features}"
            )
        made = make_codec(codec, **settings)
        layer = cls(
            inputs, num_heads, k.out_features // head, rotary, causal, head_dim=head,
            dropout=dropout, codec=made, device="meta",
        )  # fmt: skip
        layer.qkv = RBELinear.from_linear(fused([q, k, v]), made)
        layer.out = RBELinear.from_linear(out, made)
        return layer.train(q.training)

    @classmethod
    def from_multihead(
        cls,
        attention: nn.MultiheadAttention,
        causal: bool = False,
        codec: str | Codec = "trellis",
        **settings: Any,
    ) -> RBEAttention:
        """Compress nn.MultiheadAttention used on itself; x is batch first whatever it was there.

        ValueError where keys or values have widths or biases of their own, or zeros are added.
        """
        own = attention.in_proj_weight is None or attention.bias_k is not None
        if own or attention.add_zero_attn:
            raise ValueError(
                "RBEAttention stands for nn.MultiheadAttention with one width and without bias_k, "
                "bias_v and add_zero_attn"
            )
        e, biased = attention.embed_dim, attention.in_proj_bias is not None
        projections = []
        for i in range(3):
            linear = nn.Linear(e, e, biased, device="meta")
            linear.weight = nn.Parameter(attention.in_proj_weight.detach()[i * e : (i + 1) * e])
            if biased:
                linear.bias = nn.Parameter(attention.in_proj_bias.detach()[i * e : (i + 1) * e])
            projections.append(linear)
        layer = cls.from_linears(
            *projections, attention.out_proj, attention.num_heads, causal=causal,
            dropout=attention.dropout, codec=codec, **settings,
        )  # fmt: skip
        return layer.train(attention.training)

    def empty_cache(self, *batch: int) -> KVCache:
        """A cache without tokens for x (*batch, tokens, embed_dim)."""
        device = next(self.qkv.parameters()).device
        empty = torch.empty(*batch, self.num_kv_heads, 0, self.head_dim, device=device)
        return KVCache(empty, empty)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KVCache]:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
            for part in self.qkv(x).split(self.sizes, -1)
        )
        past, new = 0 if cache is None else cache.tokens, x.shape[-2]
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(past, past + new, device=x.device)
            cos, sin = self.rotary.angles(positions, self.head_dim)
            q, k = self.rotary.apply(q, cos, sin), self.rotary.apply(k, cos, sin)
        if cache is not None:
            cache = cache.append(k, v)
            k, v = cache
        y = functional.scaled_dot_product_attention(
            q, k, v, self._mask(mask, past, q),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None and not past,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )  # fmt: skip
        y = self.out(y.transpose(-3, -2).flatten(-2))
        return y if cache is None else (y, cache)

    def _mask(self, mask: Tensor | None, past: int, q: Tensor) -> Tensor | None:
        """The caller's mask and the causal one together; None where `is_causal` says it."""
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        new = q.shape[-2]
        if not self.causal or (mask is None and (not past or new == 1)):
            return mask
        seen = torch.ones(new, past + new, dtype=torch.bool, device=q.device).tril(past)
        if mask is None:
            return seen
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, heads={self.num_heads}, kv_heads={self.num_kv_heads}"
        return text + f", rotary={self.rotary}, causal={self.causal}"
