"""Running a model one block at a time, so that calibration never starts over.

The hidden states of all calibration batches are carried from block to block. Inside a block, layers
that read the same input form a group; groups are visited in execution order, each seeing the
outputs of those before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .nn import RBEExperts


@dataclass
class Call:
    """Arguments of one forward call. `mask` (batch, length): the positions that are no padding."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None

    def on(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)


@dataclass
class Stage:
    """A block and the calls that reach it, one per calibration batch."""

    name: str
    module: nn.Module
    calls: list[Call]


class Stop(Exception):
    """Ends a forward pass once what was asked for has been seen."""


class Walk:
    """How a walk from block to block comes by what it needs: here all of the model is in memory."""

    def block_calls(
        self, model: nn.Module, names: Sequence[str], calls: Sequence[Call]
    ) -> list[list[Call]] | None:
        """See `block_calls`."""
        return block_calls(model, names, calls)

    def begin(self, hidden: list[Tensor]) -> int:
        """The first block to visit; `hidden`, what reaches the very first, may be replaced."""
        return 0

    def block(self, name: str) -> AbstractContextManager[None]:
        """Within, the block has its weights."""
        return nullcontext()

    def carried(self, done: int, hidden: Sequence[Tensor]) -> None:
        """Told what comes out of the first `done` blocks, as the caller has changed them."""


def calls_from(
    calibration: Any, batch: int, tokenizer: Any = None, context: int = 256
) -> list[Call]:
    """Calibration data as forward calls.

    Takes a tensor (cut into batches of `batch` rows), a list of tensors, tuples or keyword mappings
    (one call each), or with a tokenizer a text or list of texts. Positions at which a mapping's
    `attention_mask` is zero are padding and calibrate nothing. Raises ValueError when empty.
    """
    if tokenizer is not None and not isinstance(calibration, Tensor):
        calibration = _tokenize(calibration, tokenizer, context)
    if isinstance(calibration, Tensor):
        if calibration.numel() == 0:
            raise ValueError(f"the calibration set is empty: shape {tuple(calibration.shape)}")
        return [Call((part,)) for part in calibration.split(batch)]
    calls = []
    for item in calibration:
        if isinstance(item, str):
            raise ValueError("calibration texts need tokenizer=")
        if isinstance(item, Tensor):
            calls += [Call((item,))] if item.numel() else []
        elif isinstance(item, Mapping):
            calls.append(Call(kwargs=dict(item), mask=_padding(item.get("attention_mask"))))
        elif isinstance(item, Sequence):
            calls.append(Call(tuple(item)))
        else:
            raise TypeError(
                f"a calibration batch is a tensor, tuple or mapping, got {type(item).__name__}"
            )
    if not calls:
        raise ValueError("the calibration set is empty")
    return calls


def _padding(mask: Any) -> Tensor | None:
    """A (batch, length) attention mask as the positions that count, None where all do."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return None if bool(mask.all()) else mask.bool()


def _tokenize(texts: str | Sequence[str], tokenizer: Any, context: int) -> Tensor:
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids = [i for text in texts for i in tokenizer.encode(text)]
    if len(ids) < context:
        raise ValueError(
            f"the calibration set is empty: {len(ids)} tokens are less than one window of {context}"
        )
    return torch.tensor(ids[: len(ids) // context * context]).view(-1, context)


def to_device(calls: Sequence[Call], device: torch.device) -> None:
    """Move the tensors among the calls' arguments, in place."""
    for call in calls:
        call.args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in call.args)
        call.kwargs = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.kwargs.items()
        }
        call.mask = call.mask if call.mask is None else call.mask.to(device)


def inside(name: str, block: str) -> bool:
    """Whether a module is a block or within it; "" is the whole model."""
    return not block or name == block or name.startswith(block + ".")


def find_blocks(model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
    """Names of the repeated blocks that hold the most target weights, or [""]: the whole model."""
    best, most = [""], 0
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        children = [f"{name}.{i}" if name else i for i, _ in module.named_children()]
        size = sum(
            t.weight.numel() for n, t in targets.items() if any(inside(n, c) for c in children)
        )
        if size > most:
            best, most = children, size
    return best


@torch.no_grad()
def stages(
    model: nn.Module, names: Sequence[str], calls: Sequence[Call], walk: Walk | None = None
) -> Iterator[Stage]:
    """Each block in turn; the caller may change a block before it asks for the next one.

    One pass of the whole model collects the arguments of every block and checks that each block's
    first argument is the output of the one before; otherwise the model is treated as one block.
    """
    walk = walk or Walk()
    seen = walk.block_calls(model, names, calls) if names != [""] else None
    if seen is None:
        yield Stage("", model, list(calls))
        return
    hidden = []
    for per_block in seen:
        first = per_block[0]
        hidden.append(first.args[0])
        first.args = (None, *first.args[1:])
    for i in range(walk.begin(hidden), len(names)):
        block = model.get_submodule(names[i])
        with walk.block(names[i]):
            current = [
                Call((h, *per_block[i].args[1:]), per_block[i].kwargs, call.mask)
                for h, per_block, call in zip(hidden, seen, calls, strict=True)
            ]
            yield Stage(names[i], block, current)
            if i + 1 == len(names):
                return
            for j, call in enumerate(current):  # one is dropped as the next is made
                hidden[j] = first_output(call.on(block))
                call.args = (hidden[j], *call.args[1:])
        walk.carried(i + 1, hidden)


def first_output(output: Any) -> Tensor:
    """A module's hidden states, whether they come alone or first of several."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def block_calls(
    model: nn.Module, names: Sequence[str], calls: Sequence[Call]
) -> list[list[Call]] | None:
    """Arguments of every block for every call (hidden states of the first block only).

    None where the blocks do not pass hidden states from one to the next, and nothing between.
    """
    blocks = [model.get_submodule(n) for n in names]
    found: list[list[Call]] = []
    chained = True
    previous: Tensor | None = None

    def enter(module, args, kwargs):
        nonlocal chained
        chained &= bool(args) and isinstance(args[0], Tensor)
        if not chained:
            raise Stop
        if found[-1]:
            chained &= previous is not None and args[0].data_ptr() == previous.data_ptr()
            found[-1].append(Call((None, *args[1:]), kwargs))
        else:
            found[-1].append(Call(args, kwargs))

    def leave(module, args, output):
        nonlocal previous
        if not isinstance(output, Tensor) and not (
            isinstance(output, tuple) and isinstance(output[0], Tensor)
        ):
            raise Stop
        previous = first_output(output)
        if module is blocks[-1]:
            raise Stop

    handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(leave) for b in blocks]
    try:
        for call in calls:
            found.append([])
            with suppress(Stop):
                call.on(model)
            if not chained or len(found[-1]) != len(blocks):
                return None
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def execution_groups(stage: Stage, targets: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of the targets inside a stage, in execution order, those with a common input together.

    Targets that the first call does not reach come last, each alone.
    """
    order: list[tuple[str, tuple]] = []
    keep = []  # inputs stay alive, so that an address stands for one tensor

    def hook(name):
        def enter(module, args, kwargs):
            x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            keep.append(x)
            order.append((name, (x.data_ptr(), tuple(x.shape), tuple(x.stride()))))

        return enter

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in targets.items()]
    try:
        for call in stage.calls[:1]:
            call.on(stage.module)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    keys: list[tuple] = []
    for name, key in order:
        if any(name in g for g in groups):
            continue
        if keys and keys[-1] == key:
            groups[-1].append(name)
        else:
            groups.append([name])
            keys.append(key)
    reached = {n for g in groups for n in g}
    return groups + [[n] for n in targets if n not in reached]


@torch.no_grad()
def input_hessian(stage: Stage, module: nn.Module) -> Tensor | None:
    """E[x x^T] (in, in) in float64 over every input of `module` in the stage's calls, or None.

    A pass ends as soon as the module has been seen.
    """
    total, count = None, 0
    for call, (args, _) in arguments(stage, module):
        x = not_padding(args[0], call.mask).float()
        product = (x.t() @ x).double()
        total = product if total is None else total.add_(product)
        count += x.shape[0]
    return None if count == 0 else total.div_(count).cpu()


def not_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (n, in) of x (..., in) that stand for a position of the mask (batch, length), or all
    where rows and positions are not the same."""
    rows = x.reshape(-1, x.shape[-1])
    positions = mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),))
    return rows[mask.flatten()] if positions else rows


def arguments(stage: Stage, module: nn.Module) -> Iterator[tuple[Call, tuple[tuple, dict]]]:
    """(args, kwargs) of a module for each of a stage's calls that reaches it."""
    seen: list[tuple[tuple, dict]] = []

    def enter(_, args, kwargs):
        seen.append((args, kwargs))
        raise Stop

    for call in stage.calls:
        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with suppress(Stop):
                call.on(stage.module)
        finally:
            handle.remove()
        if seen:
            yield call, seen.pop()


class _Expert(nn.Module):
    """One of several experts as a module by itself, which sees its layers change."""

    def __init__(self, experts: RBEExperts, number: int):
        super().__init__()
        self.experts, self.number = experts, number

    def forward(self, x: Tensor) -> Tensor:
        return self.experts.expert(self.number, x)


@torch.no_grad()
def expert_stages(stage: Stage, name: str, experts: RBEExperts) -> Iterator[Stage]:
    """A stage for each expert, whose calls hold the tokens that reach it, padding left out."""
    routed = []
    for call, (args, kwargs) in arguments(stage, experts):
        hidden, index, *_ = (*args, *kwargs.values())
        kept = call.mask is not None and index.shape[0] == call.mask.numel()
        if kept:
            hidden, index = hidden[call.mask.flatten()], index[call.mask.flatten()]
        rows = [slots // index.shape[1] for slots in experts.slots(index)]
        routed.append((hidden, rows))
    for number in range(experts.num_experts):
        calls = [Call((x[rows[number]],)) for x, rows in routed if rows[number].numel()]
        yield Stage(name, _Expert(experts, number), calls)


def hessians(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    calls: Sequence[Call],
    walk: Walk | None = None,
) -> Iterator[tuple[list[str], Tensor | None]]:
    """Groups of targets with their input's Hessian, in execution order; None where no call goes.

    The caller may swap the layers of a group before it asks for the next one. Layers of experts
    come each alone, on the tokens that reach their expert.
    """
    blocks = find_blocks(model, targets)
    covered = {n for n in targets if any(inside(n, b) for b in blocks)}
    for stage in stages(model, blocks, calls, walk):
        yield from _groups(model, stage, {n: targets[n] for n in covered if inside(n, stage.name)})
    # Before or after the blocks: the rest of a model that is mostly blocks.
    rest = {n: m for n, m in targets.items() if n not in covered}
    yield from _groups(model, Stage("", model, list(calls)), rest)


def _groups(
    model: nn.Module, stage: Stage, targets: Mapping[str, nn.Module]
) -> Iterator[tuple[list[str], Tensor | None]]:
    units = _units(model, targets)
    for group in execution_groups(stage, units) if units else ():
        own = [name for name in group if name in targets]
        if own:
            yield own, input_hessian(stage, targets[own[0]])
            if stage.name in own:  # a block that is itself a layer
                stage.module = model.get_submodule(stage.name)
        for name in group:
            if name in targets:
                continue
            for number, expert in enumerate(expert_stages(stage, name, units[name])):
                for matrix in units[name].matrices:
                    one = f"{name}.{matrix}.{number}"
                    if one in targets:
                        yield [one], input_hessian(expert, targets[one])


def _units(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The targets, experts of one mixture as one."""
    units: dict[str, nn.Module] = {}
    for name, module in targets.items():
        owner = ".".join(name.split(".")[:-2])
        mixture = model.get_submodule(owner)
        together = isinstance(mixture, RBEExperts)
        units[owner if together else name] = mixture if together else module
    return units


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without key-value caches, restored afterwards."""
    training = [m for m in model.modules() if m.training]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    model.eval()
    if cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
        if cache is not None:
            config.use_cache = cache
