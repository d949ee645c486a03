"""Descent on the codes: changes proposed from gradients and curvature, kept where a loss falls.

Codes are discrete, and steps along a gradient fail: small ones change no code, large ones raise the
loss. So a change is proposed from a quadratic model of the loss (see proposals.py), tried, and kept
only where the loss measured on a batch of its own is lower; otherwise the codes go back bit for
bit. The curvature is the empirical Fisher's, by Kronecker factors (Martens and Grosse, K-FAC, 2015;
Tseng et al., YAQA, 2025), scaled by what the trials show, as in Levenberg and Marquardt's method.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..feedback import DAMPING, OUTPUT_DAMPING
from ..nn import RBELinear
from .proposals import Proposal, Quadratic, changeable, propose, units

LARGEST_FISHER = 4096  # outputs whose second moment is kept whole; of more, its diagonal
Closure = Callable[[], "float | Tensor"]


@dataclass(frozen=True)
class CodeStep:
    """One layer's trial. proposed: codes or tiles changed; before, after: the closure's losses,
    NaN where nothing was proposed; predicted: the change of the loss by the model."""

    layer: str
    proposed: int
    accepted: bool
    before: float = math.nan
    after: float = math.nan
    predicted: float = 0.0


class CodeDescent:
    """Changes the codes of a model's compressed layers beside any optimiser of its params.

    layers: how many are active at a time, in a fixed shuffled round; only they cost memory, with
        float32 sums of (out, in), (in, in) and (out, out).
    gather: steps of gradients behind each proposal.
    share: of a layer's codes (of its tiles, where codes have no fields) that one proposal changes
        at most; halved where a trial fails, raised again by half where one succeeds.
    damping: of the inputs' and the outputs' second moments, relative to their mean diagonal.

    Losses must be means over tokens: then N tokens with gradients g give N sum g g^T for the second
    moment per token. Backwards between two steps are one batch, accumulated as for an optimiser
    (each loss divided by their number). Gradients seen are those before clipping. Under
    torch.distributed all ranks must step together; sums and losses are averaged, and the codes are
    those of rank 0.

    >>> model = nn.Sequential(RBELinear(32, 32, codec="uniform(bits=2, group=32)"))
    >>> x, y = torch.randn(64, 32), torch.randn(64, 32)
    >>> with CodeDescent(model, gather=1) as codes:
    ...     (model(x) - y).square().mean().backward()
    ...     step, = codes.step(lambda: (model(x) - y).square().mean())
    >>> step.after < step.before or not step.accepted
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: int = 1,
        gather: int = 8,
        share: float = 0.01,
        damping: tuple[float, float] = (DAMPING, OUTPUT_DAMPING),
        seed: int = 0,
    ):
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share!r}")
        if gather < 1 or layers < 1:
            raise ValueError(f"layers and gather must be positive, got {layers!r} and {gather!r}")
        if len(damping) != 2 or not all(0 < d < math.inf for d in damping):
            raise ValueError(f"damping must be two positive numbers, got {damping!r}")
        self.layers = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, RBELinear) and math.prod(m.shape) and changeable(m.codec, m.shape)
        }
        if not self.layers:
            raise ValueError("the model has no compressed layers whose codes can change")
        self.gather, self.share, self.damping = gather, float(share), tuple(damping)
        self.skipped = 0  # backwards through an active layer whose numbers were not finite
        self._number = min(layers, len(self.layers))
        generator = torch.Generator().manual_seed(seed)
        names = list(self.layers)
        self._order = [names[i] for i in torch.randperm(len(names), generator=generator)]
        self._position = self._count = 0
        self._shares = dict.fromkeys(names, self.share)
        self._curvatures = dict.fromkeys(names, 1.0)
        self._sums: dict[str, _Sums] = {}
        self._hooks: dict[str, Any] = {}
        self._open: weakref.WeakSet[_Forward] = weakref.WeakSet()
        self._activate()

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the layers whose gradients are gathered now."""
        return tuple(self._sums)

    @torch.no_grad()
    def step(self, closure: Closure) -> tuple[CodeStep, ...]:
        """Count a step; after every `gather` of them, try a change of each active layer's codes.

        closure: the loss on a batch not used for training since the last trial, the same whenever
        it is called during this step; called without gradients, twice for each proposal.
        RuntimeError where a forward pass of an active layer still waits for its backward pass.
        """
        due = self._count + 1 >= self.gather
        if due:
            for forward in self._open:
                raise RuntimeError(
                    f"layer {forward.layer!r} has run forward and waits for its backward, which "
                    "needs the codes as they are: call step after backward, or run that forward "
                    "under torch.no_grad"
                )
        self._count += 1
        if not due:
            return ()
        made = tuple(self._trial(name, closure) for name in self.active)
        self._position = (self._position + self._number) % len(self._order)
        self._count = 0
        self._activate()
        return made

    def close(self) -> None:
        """Stop watching the layers; what was gathered since the last trial is dropped."""
        for name, hook in self._hooks.items():
            self.layers[name].observer = None
            hook.remove()
        self._hooks, self._sums, self._count = {}, {}, 0

    def __enter__(self) -> CodeDescent:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on beside model and optimiser, sums included."""
        return {
            "layers": {name: [m.codec.spec, *m.shape] for name, m in self.layers.items()},
            "order": list(self._order),
            "position": self._position,
            "count": self._count,
            "skipped": self.skipped,
            "shares": dict(self._shares),
            "curvatures": dict(self._curvatures),
            "sums": {name: sums.state() for name, sums in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. ValueError where the state is of other layers or codecs."""
        mine, other = self.state_dict()["layers"], state["layers"]
        for name in [*mine, *other]:
            if list(mine.get(name, ())) != list(other.get(name, ())):
                have, got = (_words(found.get(name)) for found in (mine, other))
                raise ValueError(
                    f"the state is of another model: layer {name!r} is {have} here, {got} there"
                )
        self.close()
        self._order, self._position = list(state["order"]), state["position"]
        self._count, self.skipped = state["count"], state["skipped"]
        self._shares = {name: min(self.share, share) for name, share in state["shares"].items()}
        self._curvatures = dict(state["curvatures"])
        self._activate(tuple(state["sums"]))
        for name, sums in state["sums"].items():
            self._sums[name].load(sums)

    # --- watching ---

    def _activate(self, names: tuple[str, ...] | None = None) -> None:
        if names is None:
            twice = self._order * 2
            names = tuple(twice[self._position : self._position + self._number])
        count = self._count
        self.close()
        self._count = count
        for name in names:
            layer = self.layers[name]
            if layer.observer is not None:
                self.close()
                raise ValueError(f"layer {name!r} has an observer already; detach that first")
            self._sums[name] = _Sums(layer)
            layer.observer = self._see(self._sums[name])
            self._hooks[name] = layer.register_forward_hook(self._watch(name))

    def _see(self, sums: _Sums) -> Callable[[Tensor, Tensor], None]:
        def see(x: Tensor, grad: Tensor) -> None:
            if sums.add(x, grad):
                return
            self.skipped += 1
            if self.skipped == 1:
                warnings.warn(
                    "gradients or inputs that are not finite are left out of code descent",
                    stacklevel=2,
                )

        return see

    def _watch(self, name: str) -> Callable:
        def enter(module: nn.Module, args: tuple, y: Tensor) -> None:
            if torch.is_grad_enabled() and y.grad_fn is not None:
                y.grad_fn.register_hook(_Forward(name, self._open))

        return enter

    # --- one layer ---

    def _trial(self, name: str, closure: Closure) -> CodeStep:
        layer = self.layers[name]
        proposal = self._propose(name)
        if proposal is None:
            self._curvatures[name] *= 0.5  # too cautious for any change
            return CodeStep(name, 0, False)
        predicted = proposal.linear + self._curvatures[name] * proposal.quadratic
        before = _loss(closure, layer.codes.device)
        after, accepted, kept = math.nan, False, layer.codes.clone()
        if math.isfinite(before):
            try:
                layer.codes.copy_(proposal.codes)
                after = _loss(closure, layer.codes.device)
                accepted = math.isfinite(after) and after < before
            finally:
                if not accepted:
                    layer.codes.copy_(kept)
        if not (math.isfinite(before) and math.isfinite(after)):
            warnings.warn(
                f"layer {name!r}: the closure's loss is not finite; the codes stay as they were",
                stacklevel=3,
            )
        self._learn(name, proposal, after - before, accepted)
        return CodeStep(name, proposal.count, accepted, before, after, predicted)

    def _propose(self, name: str) -> Proposal | None:
        """The same on every rank."""
        layer = self.layers[name]
        model = self._sums[name].model(self._count, self.damping, self._curvatures[name])
        count = max(1, round(self._shares[name] * units(layer.codec, layer.shape)))
        found = None if model is None else propose(layer.packed, model, count)
        if _ranks() == 1:
            return found
        device = layer.codes.device
        numbers = (0, 0.0, 0.0) if found is None else (found.count, found.linear, found.quadratic)
        said = torch.tensor(numbers, dtype=torch.float64, device=device)
        distributed.broadcast(said, 0)
        count, linear, quadratic = said.tolist()
        codes = (layer.codes if found is None else found.codes).clone()
        distributed.broadcast(codes, 0)
        return Proposal(codes, int(count), linear, quadratic) if count else None

    def _learn(self, name: str, proposal: Proposal, change: float, accepted: bool) -> None:
        """The share and the curvature for the layer's next proposal."""
        layer, now, seen = self.layers[name], self._curvatures[name], 0.0
        if math.isfinite(change) and proposal.quadratic > 0:
            seen = (change - proposal.linear) / proposal.quadratic
            # The Fisher's own scale can be far off: that of squared errors shrinks with the errors.
            self._curvatures[name] = min(max(seen, 0.5 * now), 64 * now)
        if accepted:
            self._shares[name] = min(self.share, 1.5 * self._shares[name])
        elif seen < 4 * now:  # otherwise the curvature was to blame
            half = max(1, proposal.count // 2) / units(layer.codec, layer.shape)
            self._shares[name] = min(self.share, half)


class _Forward:
    """A hook on a layer's output in the graph: in `open` until its backward has run, or the graph
    is gone."""

    def __init__(self, layer: str, open: weakref.WeakSet):
        self.layer, self.open = layer, open
        open.add(self)

    def __call__(self, *gradients) -> None:
        self.open.discard(self)


class _Sums:
    """Sums of a layer's g^T x, x^T x and g^T g (or its diagonal), and the number of tokens."""

    def __init__(self, layer: RBELinear):
        out, n = layer.shape
        square = (out, out) if out <= LARGEST_FISHER else (out,)
        sizes = {"gradient": (out, n), "inputs": (n, n), "outputs": square}
        self.tokens = 0
        self.held = {
            name: torch.zeros(size, device=layer.codes.device) for name, size in sizes.items()
        }

    @torch.no_grad()
    def add(self, x: Tensor, grad: Tensor) -> bool:
        """Take a backward in, all of it or nothing: False where a number is not finite."""
        x, grad = x.float(), grad.float()
        if not bool(x.isfinite().all() & grad.isfinite().all()):
            return False
        self.held["gradient"].addmm_(grad.t(), x)
        self.held["inputs"].addmm_(x.t(), x)
        if self.held["outputs"].dim() == 1:
            self.held["outputs"].add_(grad.square().sum(0))
        else:
            self.held["outputs"].addmm_(grad.t(), grad)
        self.tokens += len(x)
        return True

    def model(self, steps: int, damping: tuple[float, float], curvature: float) -> Quadratic | None:
        """The quadratic model of the mean loss of a step, over all ranks; None without tokens."""
        ranks, tokens = _ranks(), self.tokens
        if ranks > 1:
            count = torch.tensor(float(tokens), device=self.held["gradient"].device)
            for tensor in (*self.held.values(), count):
                distributed.all_reduce(tensor)
            tokens = int(count.item())
        if not tokens:
            return None
        # Each rank's loss is a mean of its own tokens: of the whole mean, g is one part in `ranks`.
        return Quadratic(
            self.held["gradient"] / (steps * ranks),
            self.held["inputs"] / tokens,
            self.held["outputs"] * (tokens / (steps * ranks) ** 2),
            damping,
            curvature,
        )

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens} | {n: t.cpu().clone() for n, t in self.held.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.tokens = state["tokens"]
        for name, tensor in self.held.items():
            tensor.copy_(state[name])


def _ranks() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _loss(closure: Closure, device: torch.device) -> float:
    """What the closure says, its mean over the ranks."""
    value = closure()
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, (int, float)):
        raise TypeError(f"the closure must return a loss, one number, got {type(value).__name__}")
    if _ranks() == 1:
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.item() / _ranks()


def _words(found: list | None) -> str:
    return "not there" if found is None else f"{found[0]} of {found[1]} x {found[2]}"
