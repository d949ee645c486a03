"""Block by block: tables, scales and codes so that each block gives the dense model's output.

The error at a block's output is weighed by what it costs the model (curvature.py), so the loss of a
step is about the block's share of KL(dense || compressed), at the price of one block's forward and
backward. Codes are found group by group: after each group the block's weights that still wait, held
dense meanwhile, train on to make up for its errors (Tseng et al., QuIP#, 2024, with a plain error).
Dense weights exist for one block at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..blocks import (
    Call,
    Stage,
    calls_from,
    execution_groups,
    find_blocks,
    first_output,
    inference,
    input_hessian,
    inside,
    stages,
    to_device,
)
from ..curvature import frozen, output_curvature
from ..feedback import OUTPUT_DAMPING
from ..nn import RBELinear
from ..nn.experts import unfused
from ..packed import Packed, round_to_half
from .loop import cosine, relative
from .precision import training_precision
from .tables import table_parameters

TABLE_LR, WEIGHT_LR = 2e-3, 5e-3  # Adam steps relative to a tensor's root mean square
MEASURED = 128  # windows for the moments of inputs and of output gradients
HELD_OUT = 16  # one call in so many judges a block and is not trained on


@dataclass
class BlockReport:
    """Loss of one block on calls it was not trained on: nats per token where the model's outputs
    are logits."""

    name: str
    before: float
    after: float
    accepted: bool  # otherwise the block is as it was


@dataclass
class ReconstructionReport:
    """losses: of every step, through the blocks in order."""

    blocks: list[BlockReport] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict:
        return asdict(self)


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Tensor | Iterable,
    *,
    codes: bool = True,
    steps: int = 100,
    batch: int = 8,
    seed: int = 0,
    precision: str = "auto",
    skip: Collection[str] = (),
    after: Callable[[str], None] | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """Train each block of a compressed model to give the dense model's output, in place.

    calibration: token ids (n, length), cut into calls of `batch` rows, or a list of calls.
    codes: find codes anew, from the dense weights of `teacher`; otherwise only tables and scales
        are trained. `steps` optimiser steps before the codes of a block's first group and after
        each group (twice as many after the last); without codes, `steps` a block.
    precision: "float32", "bfloat16" (autocast) or "auto": bfloat16 where the processor has it.
    skip: names of blocks to leave as they are; `after(name)` is called when a block is done.

    A block that is not better than before on calls held out from training is put back. An
    interrupt leaves finished blocks finished and the block at work as it was. ValueError where
    model and teacher do not have the same layers, or nothing is compressed.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, RBELinear)}
    calls = calls_from(calibration, batch)
    device = next(model.parameters()).device
    to_device(calls, device)
    names = find_blocks(model, layers)
    report, start = ReconstructionReport(), time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(unfused(teacher, layers))
        _check(layers, teacher)
        for one in (model, teacher):
            stack.enter_context(inference(one))
            stack.enter_context(frozen(one))
        bar = stack.enter_context(
            tqdm(names, desc="blocks", leave=False, disable=None if progress else True)
        )
        measured = calls[: max(1, MEASURED // batch)]
        wanted = [n for n in [*names, *(layers if codes else ())] if n]
        cost = output_curvature(teacher, measured, wanted, seed=seed, progress=progress)
        pairs = zip(stages(model, names, calls), stages(teacher, names, calls), strict=True)
        for mine, dense in pairs:
            here = {n: m for n, m in layers.items() if inside(n, mine.name)}
            bar.set_postfix_str(mine.name)
            if here and mine.name not in skip:
                work = _Block(mine, dense, here, cost, seed, training_precision(precision, device))
                report.blocks.append(work.improve(teacher if codes else None, steps))
                report.losses += work.losses
                if after is not None:
                    after(mine.name)
            bar.update()
    report.seconds = time.perf_counter() - start
    return report


def _check(layers: dict[str, RBELinear], teacher: nn.Module) -> None:
    if not layers:
        raise ValueError("the model has no compressed layers to train; call compress first")
    dense = dict(teacher.named_modules())
    for name, layer in layers.items():
        weight = None
        if getattr(dense.get(name), "weight", None) is not None:
            weight = layer.dense_weight(dense[name])
        if weight is None or tuple(weight.shape) != layer.shape:
            found = "none" if weight is None else tuple(weight.shape)
            raise ValueError(
                f"layer {name!r} has a weight of {layer.shape}, the teacher's is {found}"
            )


class _Block:
    """One block at work: what goes in, what should come out, and how errors are weighed."""

    def __init__(self, mine: Stage, dense: Stage, layers, cost, seed: int, autocast):
        self.stage, self.layers, self.cost, self.autocast = mine, layers, cost, autocast
        with torch.no_grad():
            self.goals = [first_output(call.on(dense.module)).float() for call in dense.calls]
        metric = cost.get(mine.name)
        if metric is not None:
            metric = metric.to(self.goals[0].device)
            metric.diagonal().add_(OUTPUT_DAMPING * metric.diagonal().mean())
        self.metric = metric
        held = max(1, len(mine.calls) // HELD_OUT)
        self.training = list(range(max(1, len(mine.calls) - held)))
        self.judging = list(range(len(mine.calls)))[-held:]
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.losses: list[float] = []

    def improve(self, teacher: nn.Module | None, steps: int) -> BlockReport:
        """Train the block, with codes found anew where there is a teacher; undo what is no gain."""
        before, kept = self.judge(), {n: _copy(m.packed) for n, m in self.layers.items()}
        done = False
        try:
            if teacher is None:
                self.train([], steps)
            else:
                self.recode(teacher, steps)
            with torch.no_grad():
                for p in self.tables():
                    p.copy_(round_to_half(p))
            loss = self.judge()
            done = loss < before
        finally:
            for name, layer in self.layers.items():
                self.put(name, layer)
                if not done:
                    layer.set_packed(kept[name])
        return BlockReport(self.stage.name, before, loss, done)

    def recode(self, teacher: nn.Module, steps: int) -> None:
        waiting = {}
        for name, layer in self.layers.items():
            dense = nn.Linear(1, 1, bias=False, device="meta")
            weight = layer.dense_weight(teacher.get_submodule(name))
            dense.weight = nn.Parameter(weight.detach().float().clone())
            dense.bias = layer.bias
            self.put(name, dense)
            waiting[name] = dense
        groups = execution_groups(self.stage, waiting)
        weights = [m.weight for m in waiting.values()]
        self.train(weights, steps)
        measured = self.stage.calls[: max(1, MEASURED // _rows(self.stage.calls[0]))]
        for group in groups:
            part = Stage(self.stage.name, self.stage.module, measured)
            hessian = input_hessian(part, waiting[group[0]])
            for name in group:
                layer, dense = self.layers[name], waiting.pop(name)
                common = {n: getattr(layer, n).detach() for n in layer.codec.common}
                packed = layer.codec.encode(
                    dense.weight,
                    hessian,
                    self.cost.get(name),
                    seed=self.seed,
                    label=name,
                    given=common,
                )
                layer.set_packed(packed.to(layer.codes.device))
                self.put(name, layer)
            self.train([m.weight for m in waiting.values()], steps if waiting else 2 * steps)

    def train(self, weights: Sequence[nn.Parameter], steps: int) -> None:
        """`steps` of Adam on these dense weights and on the tables of layers that have codes."""
        groups = relative(self.tables(), TABLE_LR) + relative(weights, WEIGHT_LR)
        params = [group["params"][0] for group in groups]
        if not params:
            return
        for p in params:
            p.requires_grad_(True)
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: cosine(i, steps, 0.1))
        for _ in range(steps):
            pick = torch.randint(len(self.training), (), generator=self.generator)
            loss = self.loss(self.training[pick])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(params, 1.0)
            self.losses.append(loss.item())
            if math.isfinite(self.losses[-1]) and bool(norm.isfinite()):
                optimiser.step()
            schedule.step()
        for p in params:
            p.requires_grad_(False)
            p.grad = None

    def tables(self) -> list[nn.Parameter]:
        """Tables and scales of the layers that stand in the block now, but those that layers of
        other blocks share."""
        shared = {id(getattr(m, name)) for m in self.layers.values() for name in m.codec.common}
        return [p for p in table_parameters(self.stage.module) if id(p) not in shared]

    def loss(self, i: int) -> Tensor:
        with self.autocast():
            y = first_output(self.stage.calls[i].on(self.stage.module))
        error = (y.float() - self.goals[i]).flatten(0, -2)
        weighed = error if self.metric is None else error @ self.metric
        return (weighed * error).sum(-1).mean() / 2

    @torch.no_grad()
    def judge(self) -> float:
        return sum(self.loss(i).item() for i in self.judging) / len(self.judging)

    def put(self, name: str, module: nn.Module) -> None:
        inner = name[len(self.stage.name) :].lstrip(".") if self.stage.name else name
        if not inner:
            self.stage.module = module
            return
        parent, _, leaf = inner.rpartition(".")
        setattr(self.stage.module.get_submodule(parent), leaf, module)


def _rows(call: Call) -> int:
    return max(1, call.args[0].shape[0]) if call.args else 1


def _copy(packed: Packed) -> Packed:
    params = {name: p.clone() for name, p in packed.params.items()}
    return Packed(packed.codec, packed.shape, packed.codes.clone(), params)
