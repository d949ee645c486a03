"""What an error at a layer's output costs the model: Fisher information, one moment per layer.

For loss differences near a minimum, KL(model || changed) is about half of tr F E H E^T summed over
layers, with E the error of a weight, H = E[x x^T] of its input and F = E[g g^T] of the gradients of
the log likelihood at its output, labels drawn from the model itself (K-FAC: Martens & Grosse 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Call, first_output, inference, not_padding
from .nn.observe import watch

LARGEST = 4096  # outputs of a module whose moment is gathered: 64 MB
HELD = 2**30  # bytes of moments that are measured in one pass for `compress`
POSITIONS = 16384  # tokens of a pass


def output_curvature(
    model: nn.Module,
    calls: Sequence[Call],
    names: Sequence[str],
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """E[g g^T] (out, out) float32 at the output of each named module, in nats^2 per token.

    The model's output is next-token logits (..., vocabulary), or has them as `logits`. Modules that
    no call reaches and those with more than 4096 outputs are left out.
    """
    sums: dict[str, Tensor] = {}

    def gather(name: str, _: Tensor, grad: Tensor) -> None:
        if grad.shape[-1] <= LARGEST:
            grad = grad.float()
            moment = grad.t() @ grad
            sums[name] = sums[name].add_(moment) if name in sums else moment

    tokens = _backward(model, calls, names, gather, True, seed, progress)
    return {name: total.div_(max(1, tokens)).cpu() for name, total in sums.items()}


def output_power(
    model: nn.Module,
    calls: Sequence[Call],
    names: Sequence[str],
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """trace E[g g^T] / out at the output of each named module, of any size: what a small white
    error of unit power there costs, twice, in nats per token.

    Where the model gives neither `logits` nor, from token ids, a tensor, the cost is the squared
    error of its output relative to the output's own power. Modules no call reaches are left out.
    """
    sums: dict[str, float] = {}

    def gather(name: str, _: Tensor, grad: Tensor) -> None:
        power = grad.float().pow(2).sum(dtype=torch.float64).item() / grad.shape[-1]
        sums[name] = sums.get(name, 0.0) + power

    tokens = _backward(model, calls, names, gather, False, seed, progress)
    return {name: total / max(1, tokens) for name, total in sums.items()}


class OutputSide:
    """E[g g^T] of layers' outputs for an encoder that goes through them in about this order.

    Moments of up to 1 GiB are measured at a time, when the first of them is asked for, on the model
    as it is then, and each is let go as it is handed out. Calibration goes through one row at a
    time: what its backward pass keeps is the only other memory. A pass is over 16,384 tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Mapping[str, int],
        calls: Sequence[Call],
        *,
        seed: int = 0,
        progress: bool = True,
    ):
        """outputs: how many each layer has; those with more than 4096 are left out."""
        self.model, self.seed, self.progress = model, seed, progress
        self.waiting = {name: n for name, n in outputs.items() if n <= LARGEST}
        self.found: dict[str, Tensor] = {}
        self.calls = some_rows(calls, POSITIONS)

    def take(self, name: str) -> Tensor | None:
        """The moment (out, out) of this layer, once; None where there is none."""
        if name in self.waiting:
            self._measure(name)
        return self.found.pop(name, None)

    def _measure(self, first: str) -> None:
        names, size = [], 0
        for name in [first, *(n for n in self.waiting if n != first)]:
            size += 4 * self.waiting[name] ** 2
            if names and size > HELD:
                break
            names.append(name)
        for name in names:
            del self.waiting[name]
        self.found |= output_curvature(
            self.model, self.calls, names, seed=self.seed, progress=self.progress
        )


def some_rows(calls: Sequence[Call], positions: int) -> list[Call]:
    """Rows from all of the calibration, a call each, of about this many positions together."""
    rows = [row for call in calls for row in _rows(call)]
    wanted = -(-positions // max(1, _positions(rows[0])))
    return rows[:: max(1, len(rows) // wanted)][:wanted]


def _rows(call: Call) -> list[Call]:
    """A call for each row; itself where not all that it holds is cut alike."""
    values = [v for v in (*call.args, *call.kwargs.values()) if v is not None]
    cut = all(isinstance(v, Tensor) and v.dim() > 1 for v in values)
    if not cut or len({len(v) for v in values}) != 1:
        return [call]

    def row(value: Tensor | None, i: int) -> Tensor | None:
        return None if value is None else value[i : i + 1]

    return [
        replace(
            call,
            args=tuple(row(a, i) for a in call.args),
            kwargs={name: row(a, i) for name, a in call.kwargs.items()},
            mask=row(call.mask, i),
        )
        for i in range(len(values[0]))
    ]


def _positions(call: Call) -> int:
    values = (*call.args, *call.kwargs.values())
    x = next((v for v in values if isinstance(v, Tensor)), torch.empty(1))
    return x.numel() // x.shape[-1] if x.is_floating_point() and x.dim() > 1 else x.numel()


def is_language(call: Call, output: object) -> bool:
    """Whether a call's output is the logits of a language model."""
    tokens = [a for a in call.args[:1] if isinstance(a, Tensor) and not a.is_floating_point()]
    return hasattr(output, "logits") or (isinstance(output, Tensor) and bool(tokens))


@torch.no_grad()
def check_language(model: nn.Module, call: Call) -> None:
    """ValueError where the model is no language model."""
    with inference(model):
        if not is_language(call, call.on(model)):
            raise ValueError(
                "curvature is of a language model's likelihood: this model gives neither `logits` "
                "nor, from token ids, a tensor of them"
            )


def _backward(
    model: nn.Module,
    calls: Sequence[Call],
    names: Sequence[str],
    see: Callable[[str, Tensor, Tensor], None],
    likely: bool,
    seed: int,
    progress: bool,
) -> int:
    """Differentiate each call's surprise; `see` gets name, input and gradient. Counts tokens.
    likely: outputs are logits, whatever they look like."""
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(calls, desc="curvature", leave=False, disable=None if progress else True)
    with ExitStack() as stack:
        stack.enter_context(inference(model))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        for name in names:
            stack.callback(watch(model.get_submodule(name), partial(see, name)).remove)
        for call in bar:
            out = call.on(model)
            judge = _label_surprise if likely or is_language(call, out) else _probe
            value, count = judge(out, generator, call.mask)
            value.backward()
            tokens += count
    return tokens


def _label_surprise(
    out: object, generator: torch.Generator, mask: Tensor | None
) -> tuple[Tensor, int]:
    """Summed -log p of labels that the model itself draws, and their number."""
    log_p = not_padding(getattr(out, "logits", out), mask).float().log_softmax(-1)
    p = log_p.detach().exp().nan_to_num(1.0)  # a NaN goes on through the gradient
    labels = torch.multinomial(p.cpu(), 1, generator=generator)
    return -log_p.gather(-1, labels.to(log_p.device)).sum(), log_p.shape[0]


def _probe(out: object, generator: torch.Generator, mask: Tensor | None) -> tuple[Tensor, int]:
    """The output along a random direction, and its rows, so that half of the curvature is the
    squared error in units of the output's own power."""
    y = not_padding(first_output(out), mask).float()
    direction = torch.randn(y.shape, generator=generator).to(y.device)
    length = y.detach().pow(2).sum(-1).mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return math.sqrt(2) * (direction * y).sum() / length, y.shape[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient; as before afterwards."""
    before = [p for p in model.parameters() if p.requires_grad]
    for p in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in before:
            p.requires_grad_(True)
