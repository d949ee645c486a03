"""PEFT's LoRA on compressed layers. Importing this module is all it takes:

>>> import reality_stone.peft
>>> from peft import LoraConfig, get_peft_model
>>> model = get_peft_model(model, LoraConfig(target_modules="all-linear"))  # doctest: +SKIP

From then on every LoraConfig, also one that PeftModel.from_pretrained reads from a file, accepts
RBELinear beside nn.Linear. Codes, tables, scales and biases freeze, adapters train. rsLoRA, DoRA,
several adapters, mixed batches and `lora_bias` work as for a dense layer; DoRA decodes the weight
in every forward pass. What needs to write into a dense weight (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA,
KaSA) is refused, before any change, as are variants that nothing here tests.

Merging encodes the sum anew, and refuses where codes cannot hold it: see `LoraRBELinear.merge`.
PEFT is told through its registry of tuners and LoraConfig's table of custom layers; nothing in it
is overwritten but the one entry.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .nn import RBELinear
from .nn.lora import encode_sum
from .packed import Packed

try:
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftType
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import (
        BaseTunerLayer,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
    )
    from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
except ImportError as error:
    raise ImportError(f"this needs peft ({error}): pip install reality-stone[peft]") from None

INITS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base weight alone
VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip


class LoraRBELinear(Linear):
    """PEFT's LoRA layer around an RBELinear. PEFT makes it; the arguments are those of lora.Linear.

    Its name holds "Linear" because "all-linear" finds layers that have an adapter by that.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any):
        super().__init__(base_layer, adapter_name, **kwargs)
        self._before: tuple[Packed, Tensor | None] | None = None  # codes and bias without adapters
        self._ready: tuple[Packed, Tensor | None] | None = None  # what the next merge will take

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Encode the weight with its adapters anew in the layer's codec; `unmerge` brings the
        codes before it back, bit for bit.

        Raises ValueError, the layer being as it was, where new codes would be no closer to the sum
        than the old ones without the adapters, and on adapters that are no plain sum (DoRA).
        """
        check_adapters_to_merge(self, adapter_names)  # for its errors and warnings
        names = self._waiting(adapter_names)
        if not names:
            return
        base = self.get_base_layer()
        packed, bias = self._ready or self.encode(adapter_names)
        if self._before is None:
            kept = None if base.bias is None else base.bias.detach().clone()
            self._before = copy.deepcopy(base.packed), kept
        self._take(packed, bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        if self._before is None:
            super().unmerge()  # says that there is nothing to do
            return
        self._take(*self._before)
        self._before = None
        self.merged_adapters.clear()

    def encode(self, adapter_names: list[str] | None = None) -> tuple[Packed, Tensor | None] | None:
        """Codes and bias that `merge` would take; None where nothing is left to merge."""
        names, base = self._waiting(adapter_names), self.get_base_layer()
        if not names:
            return None
        for name in names:
            if name in self.lora_variant:
                kind = "DoRA" if self.use_dora.get(name) else type(self.lora_variant[name]).__name__
                raise ValueError(f"adapter {name!r} is {kind}, which codes cannot take in: keep it")
        biased = [name for name in names if self.lora_bias.get(name)]
        if biased and base.bias is None:
            raise ValueError(
                f"adapter {biased[0]!r} has a bias and the layer has none to add it to: keep it"
            )
        with torch.no_grad():
            term = sum(self.get_delta_weight(n).float() for n in names)
            # Adapters that were never trained add nothing: the codes hold that sum already.
            packed = encode_sum(base, term)[0] if term.any() else copy.deepcopy(base.packed)
            bias = base.bias
            for name in biased:
                bias = bias + self.lora_B[name].bias * self.scaling[name]
        return packed, bias

    def _waiting(self, adapter_names: list[str] | None) -> list[str]:
        """Adapters to merge that this layer has and that are not merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in names if n in self.lora_A and n not in self.merged_adapters]

    @torch.no_grad()
    def _take(self, packed: Packed, bias: Tensor | None) -> None:
        base = self.get_base_layer()
        base.set_packed(packed)
        if bias is not None:
            base.bias.copy_(bias)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # The inherited one asks the weight for its device, and so decodes it.
        device = device or self.get_base_layer().codes.device
        for held in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in held and not any(p.is_meta for p in held.parameters()):
                held[adapter_name] = held[adapter_name].to(device)


class CompressedLoraModel(LoraModel):
    """LoraModel that also knows RBELinear."""

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        # The first thing PEFT does with a new adapter, before it touches a layer.
        super()._prepare_model(peft_config, model)
        peft_config._register_custom_module({RBELinear: LoraRBELinear})
        if str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _include_all_linear(peft_config, model)
        for name, module in model.named_modules():
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if not isinstance(layer, RBELinear):
                continue
            if self._check_target_module_exists(peft_config, name):
                _check(peft_config, name, layer)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # The inherited one asks the weight for its device; the adapter is there already.
        if isinstance(new_module, LoraRBELinear):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False):
        """As in PEFT; where one compressed layer refuses, nothing is merged."""
        self._check_merge_allowed()
        with self._encoded(adapter_names):
            super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if not merge:
            return super()._unload_and_optionally_merge(False, progressbar)
        self._check_merge_allowed()
        with self._encoded(adapter_names):
            return super()._unload_and_optionally_merge(
                True, progressbar, safe_merge, adapter_names
            )

    @contextmanager
    def _encoded(self, adapter_names: list[str] | None) -> Iterator[None]:
        """Encode every compressed layer first: a refusal then comes before any change."""
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, LoraRBELinear)}
        ready = {}
        for name, layer in layers.items():
            try:
                ready[name] = layer.encode(adapter_names)
            except ValueError as error:
                raise ValueError(f"layer {name!r} cannot be merged: {error}") from None
        try:
            for name, layer in layers.items():
                layer._ready = ready[name]
            yield
        finally:
            for layer in layers.values():
                layer._ready = None


def _include_all_linear(config: LoraConfig, model: nn.Module) -> None:
    """Let "all-linear" stand for compressed layers too, but the output head, as in PEFT."""
    _maybe_include_all_linear_layers(config, model)  # into the names of dense and adapted layers
    heads = [getattr(model, n, None) for n in SEQ_CLS_HEAD_NAMES if config.task_type == "SEQ_CLS"]
    if hasattr(model, "get_output_embeddings"):
        heads.append(model.get_output_embeddings())
    tuned = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    for name, module in model.named_modules():
        if isinstance(module, RBELinear) and not any(module is head for head in heads):
            config.target_modules |= {name} if not name.startswith(tuned) else set()


def _check(config: LoraConfig, name: str, layer: RBELinear) -> None:
    """ValueError on what a compressed layer cannot do."""
    if layer.adapter is not None:
        raise ValueError(
            f"layer {name!r} has an adapter of nn.lora: take it off with nn.lora.remove_lora first"
        )
    init = config.init_lora_weights
    if init not in INITS:
        raise ValueError(
            f"layer {name!r} is compressed: init_lora_weights={init!r} would write its weight; "
            f"use one of {', '.join(map(repr, INITS))}"
        )
    for variant in VARIANTS:
        if getattr(config, variant, None):
            raise ValueError(f"layer {name!r} is compressed, and {variant} is not supported there")
    if config.fan_in_fan_out:
        raise ValueError(
            f"layer {name!r} is compressed and keeps its weight as (out, in): leave out "
            "fan_in_fan_out, PEFT sets it itself for layers that need it"
        )


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = CompressedLoraModel
