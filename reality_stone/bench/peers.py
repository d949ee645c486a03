"""Linear layers of other libraries, to be timed beside ours where they are installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUP = 64  # weights that share a scale, as usual in all of them


@dataclass(frozen=True)
class Peer:
    """`build` takes a float32 weight (out, in) and gives a layer for activations of `dtype`, the
    one its kernels are fastest at; `bits` are stored per weight, scales and zeros counted."""

    name: str
    library: str
    build: Callable[[Tensor], nn.Module]
    bits: Callable[[tuple[int, int]], float]
    dtype: torch.dtype = torch.bfloat16

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.library.split(".")[0]) is not None

    def layer(self, weight: Tensor, training: bool = False) -> nn.Module:
        """A layer of its own; raises what the library raises, ImportError where it is not there.

        ValueError where it computes something else than the product with `weight`.
        """
        if not self.installed:
            raise ImportError(f"{self.library} is not installed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = self.build(weight).requires_grad_(False).train(training)
            x = torch.eye(2, weight.shape[1], device=weight.device)
            with torch.no_grad():
                found = layer(x.to(self.dtype)).float()
        error = ((found - weight[:, :2].T).norm() / weight[:, :2].norm()).item()
        if not error < 1:  # that of a product which is zero
            raise ValueError(f"its product is wrong, relative error {error:.2f}")
        return layer


def _dense(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return layer


def _torchao_int8(weight: Tensor) -> nn.Module:
    """Integer activations too: the only int8 of torchao that has a product of its own on a CPU.

    Compiled, which is how torchao is meant to run.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch._dynamo.config.recompile_limit = 256  # sizes and batches
    layer = nn.Sequential(_dense(weight, torch.float32))
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return _Compiled(layer)


class _Compiled(nn.Module):
    """A layer that runs as compiled code, which all layers of a size share."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return _compiled(self.layer, x)


@torch.compile(dynamic=False)
def _compiled(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _torchao_int4(weight: Tensor) -> nn.Module:
    from torchao.quantization import quantize_

    if weight.device.type == "cpu":  # the only one of its packings that has a kernel there
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    else:
        from torchao.quantization import Int4WeightOnlyConfig

        config = Int4WeightOnlyConfig(GROUP, int4_packing_format="tile_packed_to_4d")
    layer = nn.Sequential(_dense(weight, torch.bfloat16))
    quantize_(layer, config)
    return layer


def _bitsandbytes_nf4(weight: Tensor) -> nn.Module:
    from bitsandbytes import nn as bnb

    out, n = weight.shape
    layer = bnb.Linear4bit(
        n, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
        compress_statistics=False,
    )  # fmt: skip
    layer.weight = bnb.Params4bit(
        weight.cpu().clone(), requires_grad=False, quant_type="nf4", blocksize=GROUP,
        compress_statistics=False,
    )  # fmt: skip
    return layer.to(weight.device)


def _bitsandbytes_int8(weight: Tensor) -> nn.Module:
    from bitsandbytes import nn as bnb

    layer = bnb.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bnb.Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to(weight.device)


def _hqq(bits: int) -> Callable[[Tensor], nn.Module]:
    def build(weight: Tensor) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
        config["weight_quant_params"]["optimize"] = False  # takes minutes and changes no speed
        return HQQLinear(
            _dense(weight, torch.bfloat16), config, compute_dtype=torch.bfloat16,
            device=str(weight.device),
        )  # fmt: skip

    return build


def _quanto(weight: Tensor) -> nn.Module:
    from optimum import quanto

    layer = nn.Sequential(_dense(weight, torch.bfloat16))
    quanto.quantize(layer, weights=quanto.qint4)
    quanto.freeze(layer)
    return layer


def _grouped(bits: int, shared: int) -> Callable[[tuple[int, int]], float]:
    """`shared` bits a group."""
    return lambda shape: bits + shared / GROUP


def _rowwise(bits: int, shared: int) -> Callable[[tuple[int, int]], float]:
    """`shared` bits a row."""
    return lambda shape: bits + shared / shape[1]


PEERS = (
    Peer("torchao int8 activations", "torchao", _torchao_int8, _rowwise(8, 32), torch.float32),
    Peer("torchao int4", "torchao", _torchao_int4, _grouped(4, 32)),
    Peer("bitsandbytes int8", "bitsandbytes", _bitsandbytes_int8, _rowwise(8, 32), torch.float16),
    Peer("bitsandbytes nf4", "bitsandbytes", _bitsandbytes_nf4, _grouped(4, 32)),
    Peer("hqq 4 bits", "hqq", _hqq(4), _grouped(4, 32)),
    Peer("hqq 2 bits", "hqq", _hqq(2), _grouped(2, 32)),
    Peer("quanto int4", "optimum.quanto", _quanto, _grouped(4, 32)),
)
