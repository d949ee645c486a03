"""RBELayerNorm and RBERMSNorm: norms whose weight and bias are codes where they are long."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from ..codecs import Codec
from ..codecs import codec as make_codec
from .compressed import Compressed

DEFAULT = "uniform(bits=8, group=64)"


class _Norm(Compressed):
    """Weight, and bias under it, as one matrix (1 or 2, elements) of codes.

    A short norm is plain: its codec is None, `weight` and `bias` are Parameters as in torch.
    """

    kept = ()
    smallest = 1024
    codec: Codec | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        rows: int,
        codec: str | Codec,
        smallest: int | None,
        device: torch.device | str | None,
        **settings: Any,
    ):
        sizes = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        sizes, made = tuple(sizes), make_codec(codec, **settings)
        count = math.prod(sizes)
        if rows and count >= (self.smallest if smallest is None else smallest):
            super().__init__(made, (rows, count), device)
        else:
            nn.Module.__init__(self)
            self.codec, self.shape, self._names = None, (rows, count), []
            for name in ("weight", "bias")[:rows]:
                # By hand: `weight` and `bias` are properties too, which read them.
                self._parameters[name] = nn.Parameter(torch.empty(sizes, device=device))
        self.normalized_shape, self.eps = sizes, eps
        if not any(t.is_meta for t in (*self.parameters(), *self.buffers())):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones for the weight and zeros for the bias, exactly."""
        fresh = torch.zeros(self.shape)
        fresh[:1] = 1
        self._fill(fresh)

    def _fill(self, values: Tensor, **options: Any) -> None:
        """Take the matrix of weight and bias."""
        if self.codec is not None:
            self.set_packed(self.codec.encode(values, **options))
            return
        with torch.no_grad():
            for p, row in zip(self._parameters.values(), values, strict=True):
                p.copy_(row.view(self.normalized_shape))

    @classmethod
    def dense_weight(cls, module: nn.Module) -> Tensor:
        rows = [t for t in (module.weight, getattr(module, "bias", None)) if t is not None]
        return torch.stack([t.detach().flatten() for t in rows])

    @classmethod
    def blank(cls, module: nn.Module, codec: Codec) -> _Norm:
        return cls._like(module, codec, smallest=0, device="meta")

    @classmethod
    def _like(cls, module: nn.Module, codec: str | Codec, **options: Any) -> _Norm:
        raise NotImplementedError

    @classmethod
    def from_dense(
        cls, module: nn.Module, codec: Codec, hessian: Tensor | None = None, **options: Any
    ) -> _Norm:
        return super().from_dense(module, codec, None, **options)  # it has no input columns

    @classmethod
    def from_norm(
        cls,
        norm: nn.Module,
        codec: str | Codec = DEFAULT,
        smallest: int | None = None,
        **settings: Any,
    ) -> _Norm:
        """From a dense norm, plain below `smallest` elements. ValueError on another module."""
        if not cls.replaces(norm):
            raise ValueError(f"{cls.__name__} stands for {cls.dense_name}, got {norm}")
        device = norm.weight.device
        layer = cls._like(norm, make_codec(codec, **settings), smallest=smallest, device=device)
        layer._fill(cls.dense_weight(norm))
        if layer.codec is None:  # a plain norm stays in the dtype it has
            layer.to(norm.weight.dtype)
        return layer.train(norm.training)

    @property
    def weight(self) -> Tensor:
        """normalized_shape; decoded (float32, detached), or the plain norm's own Parameter."""
        return self._row(0)

    @property
    def bias(self) -> Tensor | None:
        """As `weight`; None where there is none."""
        return self._row(1)

    def _row(self, row: int) -> Tensor | None:
        if row >= self.shape[0]:
            return None
        if self.codec is None:
            return self._parameters[("weight", "bias")[row]]
        return self.packed.decode()[row].view(self.normalized_shape)

    def _values(self, x: Tensor) -> list[Tensor | None]:
        """Weight and bias with their gradients, in the dtype that x is computed in."""
        if self.codec is None:
            rows = list(self._parameters.values())
        else:
            matrix = ops.decode(self.codes, self._float_params(), self.codec.spec, self.shape)
            rows = [row.view(self.normalized_shape) for row in matrix]
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not autocast:  # which chooses a dtype by itself
            rows = [row.to(x.dtype) for row in rows]
        return [*rows, None, None][:2]

    def extra_repr(self) -> str:
        text = f"{self.normalized_shape}, eps={self.eps}, "
        return text + ("plain" if self.codec is None else self._rate())


class RBELayerNorm(_Norm):
    """nn.LayerNorm with weight and bias as codes where they have 1024 elements or more.

    `smallest` is another number of elements to compress from. A shorter norm is plain, with
    nn.LayerNorm's Parameters. Trained, the scales of the codes move. From scratch the codes are all
    alike, and a group of weights moves together.

    >>> RBELayerNorm(2048)(torch.zeros(2, 3, 2048)).shape
    torch.Size([2, 3, 2048])
    """

    kind, dense_name = "layer_norm", "nn.LayerNorm"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        codec: str | Codec = DEFAULT,
        smallest: int | None = None,
        device: torch.device | str | None = None,
        **settings: Any,
    ):
        rows = (2 if bias else 1) if elementwise_affine else 0
        super().__init__(normalized_shape, eps, rows, codec, smallest, device, **settings)

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        return type(module) is nn.LayerNorm and module.weight is not None

    @classmethod
    def _like(cls, module: nn.Module, codec: str | Codec, **options: Any) -> RBELayerNorm:
        bias = module.bias is not None
        return cls(module.normalized_shape, module.eps, True, bias, codec, **options)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.LayerNorm:
        rows = self.shape[0]
        dense = nn.LayerNorm(self.normalized_shape, self.eps, rows > 0, rows > 1, device="meta")
        for name in ("weight", "bias")[:rows]:
            value = getattr(self, name).detach().to(dtype or torch.float32, copy=True)
            setattr(dense, name, nn.Parameter(value))
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._values(x)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RBERMSNorm(_Norm):
    """nn.RMSNorm with the weight as codes where it has 1024 elements or more, else plain.

    Stands for modules that compute as LlamaRMSNorm does too: one vector `weight`, and
    `variance_epsilon` or `eps`. `smallest` and training as in RBELayerNorm.

    >>> RBERMSNorm(2048)(torch.zeros(2, 3, 2048)).shape
    torch.Size([2, 3, 2048])
    """

    kind, dense_name = "rms_norm", "nn.RMSNorm"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        codec: str | Codec = DEFAULT,
        smallest: int | None = None,
        device: torch.device | str | None = None,
        **settings: Any,
    ):
        rows = int(elementwise_affine)
        super().__init__(normalized_shape, eps, rows, codec, smallest, device, **settings)

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        if type(module) is nn.RMSNorm:
            return module.weight is not None
        return not isinstance(module, Compressed) and _computes_rms_norm(module)

    @classmethod
    def _like(cls, module: nn.Module, codec: str | Codec, **options: Any) -> RBERMSNorm:
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        sizes = getattr(module, "normalized_shape", None) or tuple(module.weight.shape)
        return cls(sizes, eps, True, codec, **options)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.RMSNorm:
        rows = self.shape[0]
        dense = nn.RMSNorm(self.normalized_shape, self.eps, rows > 0, device="meta")
        if rows:
            value = self.weight.detach().to(dtype or torch.float32, copy=True)
            dense.weight = nn.Parameter(value)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self._values(x)[0], self.eps)


def _computes_rms_norm(module: nn.Module) -> bool:
    """Whether a module of another package is an RMS norm times its `weight`, by trying it."""
    state = dict(module.named_parameters())
    weight = state.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = (
        set(state) == {"weight"} and weight.dim() == 1 and not any(True for _ in module.children())
    )
    if not alone or not isinstance(eps, float):
        return False
    if len(inspect.signature(type(module).forward).parameters) != 2:  # self and x: no gate
        return False
    if weight.is_meta:  # without values to try it with: the attribute is Llama's own
        return hasattr(module, "variance_epsilon")
    with torch.no_grad():
        # Other norms multiply by 1 + weight, or subtract the mean.
        x = torch.linspace(-1, 3, weight.numel(), device=weight.device)[None].to(weight.dtype)
        want = functional.rms_norm(x, weight.shape, weight, eps)
        rounding = 4 * torch.finfo(weight.dtype).eps
        return torch.allclose(module(x), want, rtol=rounding, atol=0)
