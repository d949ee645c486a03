"""The quantization method `reality_stone` of transformers: load packed, compress, save, train.

Written for transformers 5.17 to 5.23. Importing it registers the method; registration.py does that
when transformers is there.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import checkpoint, ops, tensorfile
from .checkpoint import METHOD
from .codecs import Codec
from .compress import compress
from .nn import Compressed
from .swap import WRONG, PlanEntry, dequantize, listeners, plan_entries, plan_of, replace
from .tensorfile import Header


class RealityStoneConfig(QuantizationConfigMixin):
    """How `from_pretrained` compresses a dense model; after that, what is in the packed one.

    bits, codec, plan, skip, seed, progress: as in `reality_stone.compress`.
    calibration: None (weights only), token ids (n, length) or a list of batches of them.
    modules_to_not_convert: names of modules, or the ends of names, that stay dense with all that is
        inside them; `skip` does the same by pattern.

    Once there are packed layers, `entries` is their plan, and only that is written to config.json.

    >>> AutoModelForCausalLM.from_pretrained(d, quantization_config=RealityStoneConfig(bits=3))
    """

    def __init__(
        self,
        bits: float = 2.5,
        codec: str | Codec = "trellis",
        *,
        calibration: Any = None,
        plan: Sequence[tuple[str, str | Codec | None]] = (),
        skip: Sequence[str] = (),
        modules_to_not_convert: Sequence[str] | None = None,
        seed: int = 0,
        progress: bool = True,
    ):
        self.quant_method = METHOD
        self.bits, self.codec, self.calibration, self.plan = bits, codec, calibration, plan
        self.skip, self.seed, self.progress = tuple(skip), seed, progress
        self.modules_to_not_convert = tuple(modules_to_not_convert or ())
        self.entries: list[PlanEntry] | None = None
        self.tied: dict[str, str] = {}  # tensor that is not stored -> the one it shares memory with

    @classmethod
    def packed(
        cls, plan: Iterable[PlanEntry], tied: Mapping[str, str] | None = None
    ) -> RealityStoneConfig:
        """The config of a model that has these compressed layers."""
        config = cls()
        config.entries, config.tied = list(plan), dict(tied or {})
        return config

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From config.json, or from settings by name. Raises ValueError in one sentence."""
        if "version" in config_dict:
            plan = checkpoint.read_plan(Path(checkpoint.CONFIG), config_dict)
            config = cls.packed(plan, checkpoint.read_tied(config_dict))
        else:
            known = {k: v for k, v in config_dict.items() if k != "quant_method"}
            try:
                config = cls(**known)
            except TypeError as error:
                raise ValueError(f"quantization_config: {error}") from None
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json; of a config that has not been used yet, its settings."""
        if self.entries is not None:
            return checkpoint.quantization(self.entries, self.tied)
        return {
            "quant_method": self.quant_method,
            "bits": self.bits,
            "codec": self.codec if isinstance(self.codec, str) else self.codec.spec,
            "calibration": None if self.calibration is None else "given",
            "plan": str(self.plan) if self.plan else [],
            "skip": list(self.skip),
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "seed": self.seed,
        }

    @property
    def patterns(self) -> list[str]:
        """`skip` and `modules_to_not_convert` as patterns of names."""
        names = self.modules_to_not_convert
        forms = ("{}", "{}.*", "*.{}", "*.{}.*")
        return [*self.skip, *(form.format(name) for name in names for form in forms)]


class RealityStoneQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` of transformers ask about packed layers."""

    requires_calibration = False
    quantization_config: RealityStoneConfig

    # --- load ---

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        devices = kwargs.get("device_map")
        places = set(devices.values()) if isinstance(devices, dict) else set()
        if not self.pre_quantized and len(places) > 1:
            raise ValueError(
                "compressing while loading needs the model on one device, device_map names "
                f"{len(places)}: compress to a directory first, then load that with this device_map"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        entries = self.quantization_config.entries or []
        tied = self.quantization_config.tied
        if checkpoint_files:
            tied = _check_files(checkpoint_files, entries, tied)
        here, renamed = _entries_of(model, entries)
        replace(model, here)
        self._dtypes = {n: t.dtype for n, t in model.state_dict().items() if t.is_floating_point()}
        names = {name for entry in here for name in entry.tensors()}
        shared = {_renamed(a, renamed): _renamed(b, renamed) for a, b in tied.items()}
        self._shared = {a: b for a, b in shared.items() if a in names and b in names}
        state = model.state_dict(keep_vars=True)
        # transformers ties parameters by name, and then neither misses nor initialises them.
        ties = {a: b for a, b in model.all_tied_weights_keys.items() if a in state and b in state}
        parameters = {a: b for a, b in self._shared.items() if isinstance(state[a], nn.Parameter)}
        model.all_tied_weights_keys = ties | parameters
        buffers = {re.escape(name) for name in self._shared.keys() - parameters.keys()}
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        model._keys_to_ignore_on_load_missing = {*ignored, *buffers}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            self._restore_dtypes(model)
            for name, source in self._shared.items():
                layer, _, leaf = name.rpartition(".")
                first = model.get_submodule(source.rpartition(".")[0])
                setattr(model.get_submodule(layer), leaf, getattr(first, source.rpartition(".")[2]))
            moved: dict[torch.Tensor, torch.Tensor] = {}
            for entry in plan_of(model):
                layer = model.get_submodule(entry.name)
                if _holds_data(entry.name, layer, offloaded=_offloaded(model)):
                    _check_layer(entry.name, layer)
                    _take_memory(layer, moved)
        else:
            config = self.quantization_config
            compress(
                model, config.bits, config.calibration, config.codec, plan=config.plan,
                skip=config.patterns, seed=config.seed, progress=config.progress,
            )  # fmt: skip
            self.pre_quantized = True
        # The plan names modules, so files have the modules' names too, whatever the source had.
        model._weight_conversions = []
        self._describe(model, {})
        return model

    def _restore_dtypes(self, model: nn.Module) -> None:
        """transformers before 5.18 leaves tensors that it found under another name as stored."""
        wide = [
            *(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        ]
        for name, tensor in model.state_dict(keep_vars=True).items():
            wanted = self._dtypes.get(name, tensor.dtype)
            if tensor.dtype != wanted and not any(part in name for part in wide):
                tensor.data = tensor.data.to(wanted)

    def _describe(self, model: nn.Module, tied: Mapping[str, str]) -> None:
        self.quantization_config = RealityStoneConfig.packed(plan_of(model), tied)
        model.config.quantization_config = self.quantization_config

    # --- save, train, go back ---

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict | None, dict]:
        """The tensors as `reality_stone.save` stores them: float16 where exact, shared ones once.

        There is no metadata: safetensors writes several entries in random order, and the same
        model would give other bytes each time. What `save` keeps there stands in config.json.
        """
        state = model.state_dict(keep_vars=True).values()
        elsewhere = any(t.is_meta or hasattr(t, "full_tensor") for t in state)  # offloaded, sharded
        if elsewhere or getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        plan = plan_of(model)
        tensors, tied = checkpoint.tensors_to_store(model, plan)
        packed = {name for entry in plan for name in entry.tensors()}
        self._describe(model, {a: b for a, b in tied.items() if a in packed})
        return tensors, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize(model, dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know the method; the second time does nothing."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(RealityStoneConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(RealityStoneQuantizer)
    if follow not in listeners:
        listeners.append(follow)


def follow(model: nn.Module) -> None:
    """Tell the models of transformers in `model` whether they have compressed layers now.

    `save_pretrained`, `Trainer` and `model.dequantize` then work as on a model loaded packed.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    done: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(prefix) for prefix in done)
        if inside or not isinstance(module, modeling.PreTrainedModel):
            continue
        done.append(f"{name}." if name else "")
        quantizer = getattr(module, "hf_quantizer", None)
        ours = isinstance(quantizer, RealityStoneQuantizer)
        plan = plan_of(module)
        if ours and not plan:
            quantizer.remove_quantization_config(module)
        elif plan and quantizer is None:
            quantizer = RealityStoneQuantizer(RealityStoneConfig.packed(plan), pre_quantized=True)
            module.hf_quantizer = quantizer
            module.is_quantized, module.quantization_method = True, METHOD
            module._weight_conversions = []
            quantizer._describe(module, {})


def _check_files(
    files: Sequence[str], entries: list[PlanEntry], tied: Mapping[str, str]
) -> dict[str, str]:
    """All tensors of the plan are there in dtype and shape, and no others of packed layers; the
    tied tensors of the files."""
    headers = [tensorfile.read_header(Path(file)) for file in files]
    found = {name: entry for header in headers for name, entry in header.entries.items()}
    recorded = [header.record("tied") for header in headers]
    tied = {**tied, **{a: b for one in recorded if isinstance(one, dict) for a, b in one.items()}}
    place = headers[0].path if len(headers) == 1 else headers[0].path.parent
    whole = Header(place, 0, found, {"tied": json.dumps(tied)})
    checkpoint.check_sizes(whole, entries)
    known = {f"{entry.prefix}codes" for entry in entries}
    strange = sorted(n for n in found if n.rpartition(".")[2] == "codes" and n not in known)
    if strange:
        raise ValueError(f"{place}: tensor {strange[0]!r} belongs to no layer of the plan")
    return tied


def _entries_of(
    model: nn.Module, entries: list[PlanEntry]
) -> tuple[list[PlanEntry], dict[str, str]]:
    """The entries under their names in this model, and {name in the plan: name here}.

    A base model stands in a model with a head under `base_model_prefix`, and either may be loaded
    from the other's checkpoint; what the other has beside it is then left out.
    """
    base = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    renamed: dict[str, str] = {}
    for entry in entries:
        forms = (entry.name, entry.name.removeprefix(base), base + entry.name)
        found = next((name for name in forms if name in modules), None)
        if found is not None:
            renamed[entry.name] = found
        elif type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
            renamed[entry.name] = entry.name  # `replace` says that it is not there
    here = [
        PlanEntry(renamed[e.name], e.shape, e.codec, e.bias, e.kind)
        for e in entries
        if e.name in renamed
    ]
    if entries and not here:
        raise ValueError(
            f"{type(model).__name__} has none of the {len(entries)} layers of the plan"
        )
    return plan_entries(here), renamed


def _renamed(tensor: str, names: Mapping[str, str]) -> str:
    layer, _, own = tensor.rpartition(".")
    return f"{names.get(layer, layer)}.{own}"


def _holds_data(name: str, layer: Compressed, offloaded: bool) -> bool:
    """False where its tensors are on disk. Raises ValueError where they are nowhere."""
    empty = [own for own, tensor in layer.state_dict().items() if tensor.is_meta]
    if empty and not offloaded:
        raise ValueError(f"layer {name!r} has got no {empty[0]}: the checkpoint is not whole")
    return not empty


def _check_layer(name: str, layer: Compressed) -> None:
    """Valid codes and finite params. Raises ValueError."""
    packed = layer.packed
    for own, tensor in packed.params.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor '{name}.{own}' holds values that are not finite")
    try:
        packed.check()
    except (*WRONG, RuntimeError) as error:
        raise ValueError(f"layer {name!r}: {error}") from None


def _take_memory(layer: Compressed, moved: dict[torch.Tensor, torch.Tensor]) -> None:
    """Copy codes out of the file: transformers leaves them mapped to it, and it may be written to.

    `moved` is {codes seen before: their copy}, so that what layers share stays shared.
    """
    for name, codes in list(layer.named_buffers(recurse=False)):
        if codes not in moved:
            moved[codes] = ops.huge_pages(torch.empty_like(codes)).copy_(codes)
        setattr(layer, name, moved[codes])


def _offloaded(model: nn.Module) -> bool:
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()


register()
