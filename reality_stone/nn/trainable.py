"""TrainableRBELinear: a float master weight that trains towards a codec's codes."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import ops
from ..codecs import Codec
from ..codecs import codec as make_codec
from ..packed import Packed
from ..quantizers import Quantizer
from .linear import RBELinear
from .stepping import begin, enrol

MEMORY = 100  # batches that the running Hessian looks back on


class TrainableRBELinear(nn.Module):
    """A linear layer that trains in full precision and knows what its codes will cost.

    `weight` is the float32 master weight; products are in x's dtype or autocast's.

    Without a quantizer the layer multiplies by weight + (Q - W), where Q was decoded from the codes
    of W, the master weight when it was last encoded: every `requantize_every` training steps. In
    between the weight's own movement counts in full. (Multiplying by Q alone until the next
    encoding leaves each step blind to those before it: on digits, at 2 bits and 100 steps, that
    ends at 20 to 60 % right, this at 93 to 98 %.) At 1 it is the straight-through estimator. Eval
    mode multiplies by Q itself, from the codes. With `hessian` the codes are those for the inputs
    seen, by a running E[x x^T].

    With a quantizer (see `reality_stone.quantizers`; it becomes part of the layer) every product is
    with its quantized weight, and codes are written by `finalize` alone, from the hard weight.
    `codec` is then by default the one that holds the levels.

    A training step has ended when the weight was changed, or its gradient taken away, since the
    last training forward: accumulation, recomputed forwards and eval mode do not count.

    torch.compile takes the layer whole, encoding included; with a quantizer, whose schedule is
    Python, the graph breaks once where training begins.

    `finalize()` turns the layer into RBELinear and drops the master weight.

    >>> layer = TrainableRBELinear(64, 32, codec="uniform(bits=4)")
    >>> layer(torch.zeros(2, 64)).shape
    torch.Size([2, 32])
    """

    in_features: int
    out_features: int
    layer: RBELinear | None  # once finalized
    codes: Tensor
    offset: Tensor
    hessian: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        codec: str | Codec | None = None,
        quantizer: Quantizer | None = None,
        *,
        requantize_every: int = 100,
        hessian: bool = False,
        device: torch.device | str | None = None,
        **settings: Any,
    ):
        super().__init__()
        if not (isinstance(requantize_every, int) and requantize_every > 0):
            raise ValueError(f"requantize_every must be 1 or more, got {requantize_every!r}")
        if not isinstance(quantizer, Quantizer | None):
            raise TypeError(
                f"quantizer must be a Quantizer or None, got {type(quantizer).__name__}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.requantize_every, self.steps, self.layer = requantize_every, 0, None
        if codec is None:
            codec = "trellis" if quantizer is None else quantizer.codec()
        self.codec = make_codec(codec, **settings)
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        self.weight = nn.Parameter(torch.empty(self.shape, device=device).uniform_(-bound, bound))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device))
            nn.init.uniform_(self.bias, -bound, bound)
        self.quantizer = quantizer
        self._names = [spec.name for spec in self.codec.params(self.shape)]
        self.gathers = bool(hessian)
        if self.gathers:
            size = (in_features, in_features)
            self.register_buffer("hessian", torch.zeros(size, device=device))
        self._forget()
        self._key = enrol(self)
        if quantizer is None:
            self._make_buffers()
        if self.weight.device.type != "meta":
            self._restart()

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear | RBELinear,
        codec: str | Codec | None = None,
        quantizer: Quantizer | None = None,
        **settings: Any,
    ) -> TrainableRBELinear:
        """Train on from a layer; its bias is shared. An RBELinear starts from its own codes, and
        keeps its codec where none is given."""
        packed = isinstance(layer, RBELinear)
        if codec is None and packed and quantizer is None:
            codec = layer.codec
        new = cls(
            layer.in_features, layer.out_features, layer.bias is not None, codec, quantizer,
            device="meta", **settings,
        )  # fmt: skip
        new.to_empty(device=layer.codes.device if packed else layer.weight.device, recurse=False)
        with torch.no_grad():
            new.weight.copy_(layer.weight)
        if layer.bias is not None:
            new.bias = layer.bias
        same = packed and quantizer is None and new.codec == layer.codec
        new._restart(layer.packed if same else None)
        return new.train(layer.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def packed(self) -> Packed:
        """The codes: final, or those of the last re-quantization; with a quantizer, those that
        `finalize` would write now."""
        if self.layer is not None:
            return self.layer.packed
        if self.quantizer is not None:
            return self._encode()
        return Packed(
            self.codec, self.shape, self.codes, {n: getattr(self, n) for n in self._names}
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is not None:
            return self.layer(x)
        if self.training:
            self._step(x)
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self.quantizer is not None:
            y = self._through_quantizer(x)
        elif self.training:
            y = linear(x, (self.weight + self.offset).to(x.dtype))
        elif torch.is_grad_enabled() and self.weight.requires_grad:
            y = linear(x, (self.packed.decode() + (self.weight - self.weight.detach())).to(x.dtype))
        else:
            y = self.packed.linear(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _through_quantizer(self, x: Tensor) -> Tensor:
        if self.quantizer.seed() is None:
            y, loss = ops.qat_linear(x, self.weight, *self.quantizer.arguments(self.weight))
        else:  # noise has no kernel
            q = self.quantizer(self.weight)
            y, loss = linear(x, q.weight.to(x.dtype)), q.loss
        self._loss = loss
        return y

    def quantization_loss(self) -> Tensor:
        """Mean squared difference of master and quantized weight, differentiable in the master (and
        the quantizer); zero once finalized."""
        if self.layer is not None:
            return self.layer.codes.new_zeros((), dtype=torch.float32)
        if self.quantizer is None:
            return (self.weight - self.packed.decode()).square().mean()
        if self._loss is None or not self._loss.requires_grad:
            return self.quantizer(self.weight).loss
        return self._loss

    # --- steps ---

    def _step(self, x: Tensor) -> None:
        if torch.compiler.is_exporting():  # a program that is exported trains no more
            return
        if torch.compiler.is_compiling() and self.quantizer is None:
            begin(x.detach(), self._key, self._written())
        else:  # breaks a graph: what a quantizer's schedule changes stands in the graph as numbers
            self._begin(x)

    def _written(self) -> list[Tensor]:
        """The buffers that `_begin` changes."""
        names = [*self._names, "codes", "offset", *(["hessian"] if self.gathers else [])]
        return [getattr(self, name) for name in names]

    @torch.compiler.disable
    def _begin(self, x: Tensor) -> None:
        """At a training forward: count the step if it is a new one, gather, encode when due."""
        weight = self.weight
        self._watch()
        if self._counted():
            return
        self._version, self._learned = weight._version, False
        if self.gathers and x.numel():
            self._gather(x.detach())
        if self.steps and self.quantizer is not None:
            self.quantizer.step()
        elif self.steps and self.steps % self.requantize_every == 0:
            self.requantize()
        self.steps += 1

    def _counted(self) -> bool:
        """Whether no step has ended since the last training forward."""
        gone = self._learned and self.weight.grad is None
        return self._version == self.weight._version and not gone

    def _watch(self) -> None:
        """Notice gradients that reach the weight: fused optimisers leave its version alone."""
        if self._watched is not None and self._watched() is self.weight:
            return
        if not self.weight.requires_grad:
            return
        me = weakref.ref(self)

        def reached(_):
            layer = me()
            if layer is not None:
                layer._learned = True

        self.weight.register_post_accumulate_grad_hook(reached)
        self._watched = weakref.ref(self.weight)

    @torch.no_grad()
    def _gather(self, x: Tensor) -> None:
        x = x.reshape(-1, self.in_features).to(self.hessian.dtype)
        share = max(1 / MEMORY, 1 / (self.steps + 1))
        with torch.autocast(x.device.type, enabled=False):  # it would narrow the product
            self.hessian.lerp_(x.t() @ x / len(x), share)

    def _forget(self) -> None:
        self._version: int | None = None  # of the weight at the last training forward
        self._learned = False  # a gradient has reached the weight since
        self._watched: weakref.ref | None = None  # the weight whose gradients are seen
        self._loss: Tensor | None = None

    # --- codes ---

    @torch.no_grad()
    def requantize(self) -> None:
        """Encode the master weight as it is now. Without effect on a quantizer's layer."""
        self._alive("requantize")
        if self.quantizer is None:
            self._take(self._encode())

    @torch.no_grad()
    def finalize(self) -> RBELinear:
        """Write the final codes and drop the master weight; the layer then computes as the
        RBELinear returned. ValueError the second time."""
        self._alive("finalize")
        layer = RBELinear.from_packed(self._encode().to(self.weight.device), self.bias)
        if self.bias is not None:
            layer.bias = self.bias
        for name in ("weight", "bias", "quantizer", "hessian", "offset", "codes", *self._names):
            if hasattr(self, name):
                delattr(self, name)
        self._forget()
        self.layer = layer.train(self.training)
        return layer

    def _encode(self) -> Packed:
        weight = self.weight.detach()
        seen = self.hessian if self.gathers and bool(self.hessian.any()) else None
        if self.quantizer is None:
            return self.codec.encode(weight, seen)
        q = self.quantizer.hard(weight)
        centers, scale = self.quantizer.centers.detach(), self.quantizer.safe_scale().detach()
        scale = scale.expand(self.out_features)
        held = self.codec.from_levels(q.codes.cpu(), centers.float().cpu(), scale.float().cpu())
        return self.codec.encode(q.weight, seen) if held is None else held

    def _take(self, packed: Packed) -> None:
        self.codes.copy_(packed.codes)
        for name, value in packed.params.items():
            getattr(self, name).copy_(value)
        self.offset.copy_(self.packed.decode() - self.weight)

    def _make_buffers(self) -> None:
        device, tile = self.weight.device, self.codec.tile(self.shape)
        size = (*tile.grid(self.shape), tile.bytes)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8, device=device))
        for spec in self.codec.params(self.shape):
            kind = torch.uint8 if spec.codes else torch.float32
            self.register_buffer(spec.name, torch.zeros(spec.sizes, dtype=kind, device=device))
        self.register_buffer("offset", torch.zeros(self.shape, device=device))

    @torch.no_grad()
    def _restart(self, packed: Packed | None = None) -> None:
        """Begin from the master weight, and from codes where they are given."""
        if self.gathers:
            self.hessian.zero_()
        if self.quantizer is not None:
            self.quantizer.to(self.weight.device).ready(self.weight)
        else:
            self._take(packed or self._encode())

    def _alive(self, what: str) -> None:
        if self.layer is not None:
            raise ValueError(
                f"cannot {what}: the layer is finalized and has no master weight any more"
            )

    # --- state ---

    def _apply(self, fn, recurse=True):
        # .half() and .bfloat16() leave the master weight and what belongs to it in float32.
        def keep(t):
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        counted = self.layer is None and self._counted()
        super()._apply(keep, recurse)
        self._version = self.weight._version if counted else None
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layer is None:
            destination[prefix + "progress"] = torch.tensor([self.steps, int(self._counted())])

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        name = prefix + "progress"
        if self.layer is None and name not in state and strict:
            missing.append(name)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if self.layer is None and name in state:
            self.steps, counted = state[name].tolist()
            self._forget()
            self._version = self.weight._version if counted else None
            if name in unexpected:
                unexpected.remove(name)

    def __getstate__(self):
        # A graph cannot be copied; a version and a watch are of this weight, not of a copy.
        counted = self.layer is None and self._counted()
        return self.__dict__ | {"_loss": None, "_watched": None, "_version": counted}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._version = self.weight._version if state["_version"] else None
        self._key = enrol(self)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        if self.layer is not None:
            return text + ", finalized"
        text += f", bias={self.bias is not None}, codec={self.codec.spec}"
        return text if self.quantizer else text + f", requantize_every={self.requantize_every}"
