"""A training run in a file, to go on after an interruption exactly where it was.

One safetensors file, `training.safetensors`, replaced whole by each save: "model.*" what is being
trained, "adam.KEY.*" its moments, "random" the generator's state, and "record" the settings and the
position as JSON in bytes, so that its sha256 is checked as that of every other tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import tensorfile
from ..nn import Compressed, RBELinear

FILE = "training.safetensors"
VERSION = 1
STAGES = ("new", "blocks", "train", "finished")
RECORD = {"version": int, "stage": str, "settings": dict, "done": list, "report": dict}


class State:
    """The run in `directory`: read and checked here, put into the model by `restore`.

    tensors: what the run changes, by name. settings: all that must be the same for the run to go
    on; ValueError in one sentence names the first that is not, or says how the file is damaged.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        every: int = 50,
    ):
        if every < 1:
            raise ValueError(f"save_every must be at least 1, got {every}")
        self.path, self.every = Path(directory) / FILE, every
        self.settings, self.tensors = json.loads(json.dumps(settings)), dict(tensors)
        self.record: dict[str, Any] = {"stage": "new", "done": [], "report": {}}
        self._stored: dict[str, Tensor] = {}
        if self.path.exists():
            self.record, self._stored = self._read()
        else:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"{directory}: no state can be kept here: {error.strerror}"
                ) from None

    @property
    def stage(self) -> str:
        """ "new", "blocks" (some are done), "train" or "finished"."""
        return self.record["stage"]

    @property
    def how_to_go_on(self) -> str:
        """A sentence for whoever interrupted."""
        return f"the training so far is in {self.path.parent}; the same call again goes on from it"

    @torch.no_grad()
    def restore(self) -> None:
        """The stored values into the model."""
        for name, tensor in self.tensors.items():
            if (stored := self._stored.get(f"model.{name}")) is not None:
                tensor.copy_(stored)

    def restore_optimiser(self, optimiser: torch.optim.Adam) -> None:
        """Adam's moments, and the generator's state."""
        names = self._names()
        for p in (p for group in optimiser.param_groups for p in group["params"]):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                stored = self._stored.get(f"adam.{key}.{names[id(p)]}")
                if stored is not None:
                    # The step counter stays on the CPU, where Adam keeps it.
                    optimiser.state[p][key] = stored if key == "step" else stored.to(p.device)
        if (random := self._stored.get("random")) is not None:
            _set_random_state(optimiser.param_groups[0]["params"][0].device, random)

    def save(
        self,
        stage: str,
        optimiser: torch.optim.Adam | None = None,
        random: Tensor | None = None,
        **record: Any,
    ) -> None:
        """Replace the file. `record`: done, report, at, rates, as far as they changed."""
        self.record = self.record | record | {
            "version": VERSION, "stage": stage, "settings": self.settings,
        }  # fmt: skip
        tensors = {f"model.{name}": t.detach() for name, t in self.tensors.items()}
        if optimiser is not None:
            names = self._names()
            for p, moments in optimiser.state.items():
                tensors |= {f"adam.{key}.{names[id(p)]}": value for key, value in moments.items()}
        if random is not None:
            tensors["random"] = random
        raw = json.dumps(self.record).encode()
        tensors["record"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        part = self.path.with_name(f".{FILE}.partial")
        try:
            tensorfile.write(part, tensors, {})
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            raise OSError(
                f"{self.path}: the state could not be written: {error.strerror}"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def _names(self) -> dict[int, str]:
        """{id of a tensor: its first name}; codecs share some tables between layers."""
        return {id(t): name for name, t in reversed(self.tensors.items())}

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        header = tensorfile.read_header(self.path)
        if "record" not in header.entries or set(header.digests) != set(header.entries):
            raise ValueError(f"{self.path}: this is no state of a training run, or it is damaged")
        with self.path.open("rb") as file:
            stored = {
                name: tensorfile.read_tensor(header, entry, file)
                for name, entry in header.entries.items()
            }
        try:
            record = json.loads(bytes(stored.pop("record").tolist()))
            sound = all(isinstance(record[key], kind) for key, kind in RECORD.items())
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound or record["stage"] not in STAGES:
            raise ValueError(f"{self.path}: the record of the run cannot be read")
        if record["version"] != VERSION:
            raise ValueError(
                f"{self.path}: version {record['version']} is not known to this release, which "
                f"reads version {VERSION}"
            )
        self._compare(record["settings"])
        for name, tensor in self.tensors.items():
            for key in (f"model.{name}", f"adam.exp_avg.{name}", f"adam.exp_avg_sq.{name}"):
                have = stored.get(key)
                if have is None and key.startswith("model."):
                    raise ValueError(f"{self.path}: tensor {key!r} is missing")
                if have is not None and (have.shape, have.dtype) != (tensor.shape, tensor.dtype):
                    raise ValueError(
                        f"{self.path}: tensor {key!r} is {have.dtype} {list(have.shape)}, the "
                        f"model has {tensor.dtype} {list(tensor.shape)}"
                    )
        return record, stored

    def _compare(self, other: Mapping[str, Any]) -> None:
        for key in [*self.settings, *other]:
            ours, theirs = self.settings.get(key), other.get(key)
            if ours != theirs:
                raise ValueError(
                    f"{self.path.parent}: the run kept here has another {key}: {_said(theirs)} "
                    f"there, {_said(ours)} now; set it back, or use another directory for the state"
                )


def describe(
    model: nn.Module, steps: list[Tensor], teacher: nn.Module | None, *, codes_move: bool
) -> dict[str, Any]:
    """What a run depends on beside its options: layers, batches, the rest of the model, teacher."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, RBELinear)}
    found: dict[str, Any] = {
        f"layer {name!r}": f"{layer.codec.spec} of {layer.shape[0]} x {layer.shape[1]}"
        for name, layer in layers.items()
    }
    own = {id(layer.codes) for layer in layers.values()}
    own |= {id(p) for m in model.modules() if isinstance(m, Compressed) for p in m.params}
    own |= {id(p) for layer in layers.values() if layer.adapter for p in layer.adapter.parameters()}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in own]
    found["number of steps"] = len(steps)
    found["text of the batches"] = _digest(steps)
    found["values outside compressed layers"] = _digest(rest, sample=4096)
    if not codes_move:
        found["codes"] = _digest(layer.codes for layer in layers.values())
    found["teacher"] = None if teacher is None else _digest(teacher.parameters(), sample=4096)
    return found


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that dropout draws from."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _digest(tensors: Iterable[Tensor], sample: int | None = None) -> str:
    """Of all values, or of the first `sample` of each tensor."""
    total = hashlib.sha256()
    for tensor in tensors:
        part = tensor.detach().reshape(-1)[:sample].cpu().contiguous()
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(part.view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
