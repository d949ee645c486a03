"""What every codec is in Python: a frozen configuration with a fitting rule and a reference decode.

The same name, tile and params as its C++ header (csrc/codecs/<name>.h); a test compares them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..feedback import OUTPUT_DAMPING, Hessian, encode_with_feedback, refit_scales
from ..fitting import alternate, gain
from ..metrics import squared_error
from ..packed import Packed, round_to_half
from .fields import Field
from .slopes import Slopes

PASSES = 4  # more encodes of the whole weight, at most
WORTH = 2e-3  # the share of the error that another must promise to save


@dataclass(frozen=True)
class Tile:
    """The smallest rectangle that decodes on its own, and its bytes."""

    rows: int
    cols: int
    bytes: int

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Tiles down and across, the last ones padded."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.cols)


@dataclass(frozen=True)
class Param:
    """One tensor beside the codes. axis: out, in, both or shared: how it is cut with the codes."""

    name: str
    sizes: tuple[int, ...]
    axis: str
    codes: bool = False  # uint8, never trained


def hadamard_block(n: int) -> int:
    """Largest power of two up to 128 that divides n."""
    return min(128, n & -n) if n else 1


@dataclass(frozen=True)
class Codec(ABC):
    """One weight format with its settings; hashable, JSON round trip by to_config/from_config."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    # Settings by their nominal bits per weight, for codecs that have no setting `bits`.
    rates: ClassVar[dict[float, dict[str, Any]]] = {}
    # Shared params that encode refits in turns with the codes: every weight is linear in one entry.
    refits: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def tile(self, shape: tuple[int, int]) -> Tile: ...

    @abstractmethod
    def params(self, shape: tuple[int, int]) -> tuple[Param, ...]: ...

    @abstractmethod
    def decode_tiles(
        self, codes: Tensor, params: dict[str, Tensor], shape: tuple[int, int]
    ) -> Tensor:
        """Reference decode of the inner matrix T, padded to tiles, in plain torch."""

    @abstractmethod
    def initial_params(
        self, weight: Tensor, seed: int, feedback: bool = False, importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Params to start the encoder from; `feedback`: errors are fed back into the targets,
        `importance` (in,): positive weights of the columns."""

    @abstractmethod
    def encode_reference(
        self, target: Tensor, importance: Tensor | None, params: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Plain-torch encoder of the padded inner matrix; what the C++ encoder is judged by."""

    def fields(self, shape: tuple[int, int]) -> tuple[Field, ...]:
        """What can change alone in the codes of T; () where a code is not made of such numbers."""
        return ()

    def slopes(
        self, codes: Tensor, params: dict[str, Tensor], shape: tuple[int, int]
    ) -> Slopes | None:
        """Derivatives of T by the fields of its codes, or None. For frames without rotation."""
        return None

    @property
    def plain(self) -> bool:
        """Whether the codec is one term, not the sum of two."""
        return True

    @property
    def parts(self) -> tuple[Codec, ...]:
        """The codecs whose decoded matrices are added; itself where there is one term."""
        return (self,)

    @property
    def common(self) -> tuple[str, ...]:
        """Shared params of which a model holds one tensor for all its layers of this codec."""
        return ()

    def fit_common(self, weights: Sequence[Tensor], seed: int = 0) -> dict[str, Tensor]:
        """The `common` params for these weights together."""
        return {}

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Hadamard block sizes (out, in) of the frame; 1 for none."""
        return 1, 1

    def inner(self) -> Codec:
        """The codec of T alone, without the frame."""
        return self

    @classmethod
    def at_bits(cls, bits: float) -> Codec:
        """The codec's usual settings at this many bits per weight. ValueError where it has none."""
        if not cls.rates:
            return cls(bits=bits)
        if bits not in cls.rates:
            known = ", ".join(f"{rate:g}" for rate in sorted(cls.rates))
            raise ValueError(f"{cls.name}: bits must be one of {known}, got {bits!r}")
        return cls(**cls.rates[bits])

    # --- text ---

    @cached_property
    def spec(self) -> str:
        """Canonical text, name(key=value, ...): the `codec` argument of the ops."""
        values = ", ".join(
            f"{f.name}={_text(getattr(self, f.name))}" for f in dataclasses.fields(self)
        )
        return f"{self.name}({values})"

    def to_config(self) -> dict[str, Any]:
        config = {"name": self.name, "version": self.version}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            config[f.name] = value.to_config() if isinstance(value, Codec) else value
        return config

    # --- encoding ---

    def encode(
        self,
        weight: Tensor,
        hessian: Tensor | Hessian | None = None,
        outputs: Tensor | Hessian | None = None,
        *,
        seed: int = 0,
        label: str = "",
        given: Mapping[str, Tensor] | None = None,
    ) -> Packed:
        """Compress `weight` (out, in).

        `hessian` (in, in) is E[x x^T] of the layer's input: with it, errors are fed back block by
        block of columns and scales are fitted in its metric. `outputs` (out, out) is E[g g^T] of
        the loss's gradients at the layer's output (see curvature.py): with it too, errors are fed
        back along both sides. `label` names the layer in warnings.
        Shared params in `given` are used as they are. A weight on a GPU is searched there where
        the codec has kernels for it; the result is on the CPU and the same.
        """
        device = getattr(weight, "device", torch.device("cpu"))
        weight = check_weight(weight, self.name)
        with ops.searching_on(device):
            return self._encode(weight, hessian, outputs, seed, label, given)

    def _encode(
        self,
        weight: Tensor,
        hessian: Tensor | Hessian | None,
        outputs: Tensor | Hessian | None,
        seed: int,
        label: str,
        given: Mapping[str, Tensor] | None,
    ) -> Packed:
        shape = (weight.shape[0], weight.shape[1])
        prepared = Hessian.prepare(hessian, shape[1], label)
        several = self.tile(shape).grid(shape)[1] > 1
        feedback = (
            prepared is not None and several and self.tile(shape).cols <= max(16, shape[1] // 2)
        )
        importance = None if prepared is None else prepared.diagonal()
        curved = None
        if feedback:
            side = f"{label or 'a layer'}, output side"
            curved = Hessian.prepare(outputs, shape[0], side, OUTPUT_DAMPING)
        check_finite(weight, self.name)
        params = self.initial_params(weight, seed, feedback, importance)
        params |= given or {}
        fitted = [name for name in self.refits if name not in (given or {})]
        if fitted and weight.numel():
            params = alternate(self, weight, params, importance, fitted)
        if feedback:
            codes, params = encode_with_feedback(self, weight, params, prepared, curved)
            packed = Packed(self, shape, codes, params)
        else:
            packed = self._plain(weight, importance, params)
        if "out_scale" not in params or not weight.numel():
            return packed
        packed.params |= refit_scales(packed, weight, prepared, curved)
        # Codes for the scales that the last codes asked for, as long as that is worth its time.
        for _ in range(PASSES if self.refits and not feedback else 0):
            if gain(self, weight, params, packed.params, importance) < WORTH:
                break
            params, again = packed.params, self._plain(weight, importance, packed.params)
            again.params |= refit_scales(again, weight, prepared)
            packed = min(packed, again, key=lambda p: squared_error(p.decode(), weight, importance))
        return packed

    def from_levels(self, codes: Tensor, levels: Tensor, scale: Tensor) -> Packed | None:
        """The codes of a weight that is already quantized: scale (out,) * levels[codes].

        codes (out, in) index `levels` (any number of them). Held to float16 values where that loses
        nothing of note, so a weight is off by 2^-10 of itself at most. None where the codec does
        not hold such a weight.
        """
        return None

    def _plain(self, weight, importance, params: dict[str, Tensor]) -> Packed:
        codes, fitted = ops.encode(weight, importance, list(params.values()), self.spec)
        shape = (weight.shape[0], weight.shape[1])
        return Packed(self, shape, codes, dict(zip(params, fitted, strict=True)))

    def decode_reference(
        self, codes: Tensor, params: dict[str, Tensor], shape: tuple[int, int]
    ) -> Tensor:
        """decode in plain torch, in the dtype of the params; float32 gives the kernels' bits."""
        out, n = shape
        out_block, in_block = self.blocks(shape)
        w = hadamard(self.decode_tiles(codes, params, shape)[:, :n], in_block)
        w = hadamard(w[:out].t(), out_block).t()
        if "out_scale" in params:
            w = w * params["out_scale"][:, None]
        if "in_scale" in params:
            w = w * params["in_scale"]
        return w


def hadamard(x: Tensor, block: int) -> Tensor:
    """Reference of ops.hadamard: stages of a + b, a - b in rising stride, then one product."""
    if block == 1:
        return x
    shape, step = x.shape, 1
    while step < block:
        a, b = x.reshape(-1, 2, step).unbind(1)
        x = torch.stack((a + b, a - b), 1)
        step *= 2
    return x.reshape(shape) * torch.tensor(block**-0.5, dtype=x.dtype, device=x.device)


def check_weight(weight: Tensor, name: str) -> Tensor:
    """A contiguous float32 matrix, or one sentence on what is wrong with it."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(
            f"{name}: weight must have two dimensions, got shape {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"{name}: weight must be floating point, got {weight.dtype}")
    return weight.detach().to("cpu", torch.float32).contiguous()


def check_finite(weight: Tensor, name: str) -> None:
    """ValueError at the first NaN or infinity, naming where it is."""
    finite = weight.isfinite()
    if not bool(finite.all()):
        at = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(f"{name}: the weight is not finite at {at}: {weight[at].item()}")


def row_scale(weight: Tensor) -> Tensor:
    """Root mean square of each row (out,), held to float16 values: a usual first out_scale."""
    if not weight.numel():
        return weight.new_zeros(weight.shape[0])
    peak = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return round_to_half(((weight / peak).pow(2).mean(1, keepdim=True).sqrt() * peak)[:, 0])


def one_of(*choices: str) -> Any:
    """A field that holds one of these words, the first by default; see check_words."""
    return dataclasses.field(default=choices[0], metadata={"choices": choices})


def check_words(codec: Codec) -> None:
    """ValueError when a field made by one_of holds another word."""
    for f in dataclasses.fields(codec):
        choices, value = f.metadata.get("choices"), getattr(codec, f.name)
        if choices and value not in choices:
            words = ", ".join(choices[:-1]) + " or " + choices[-1]
            raise ValueError(f"{codec.name}: {f.name} must be {words}, got {value!r}")


def whole_number(value: Any, low: int, high: int, what: str) -> int:
    """A setting as an int; `what` names the codec and the setting."""
    if isinstance(value, (int, float)) and low <= value <= high and value == int(value):
        return int(value)
    raise ValueError(f"{what} must be a whole number from {low} to {high}, got {value!r}")


def flag(value: Any, what: str) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{what} must be True or False, got {value!r}")


def _text(value: Any) -> str:
    if isinstance(value, Codec):
        return value.spec
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
