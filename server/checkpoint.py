"""Checkpoints of a run: written aside and renamed, verified when read, never half visible."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from lora.errors import CheckpointError
from lora.files import sync

STATE, ARRAYS = "state.json", "arrays.safetensors"
_NAME = re.compile(r"round-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after `round`.

    There are no random states: every draw that may be repeated is derived from the run's seed and the round, and
    secret noise is never saved. `ledger` is the position of the simulation's ledger, for the record; None elsewhere.
    """

    round: int
    vector: Tensor
    strategy: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    ledger: int | None = None
    tally: dict[str, object] = field(default_factory=dict)
    """What the summary sums up over rounds, so that a resumed run's covers the rounds before."""


class Checkpoints:
    """The checkpoints below one directory, `round-00012/{state.json, arrays.safetensors}`.

    **Guarantee**: after a kill or a full disk at any instant, `latest` returns the newest checkpoint that was saved
    whole, unchanged.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        self.directory, self.keep = directory, keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Save a checkpoint and drop the oldest. Raises CheckpointError if it cannot be written; older ones stay."""
        final = self.directory / f"round-{checkpoint.round:05d}"
        aside = self.directory / f".{final.name}.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for stale in self.directory.glob(".round-*"):
                shutil.rmtree(stale, ignore_errors=True)
            aside.mkdir()
            arrays = {"vector": checkpoint.vector.numpy()} | {
                f"strategy.{k}": v for k, v in checkpoint.strategy.items()
            }
            data = save({key: np.ascontiguousarray(array) for key, array in arrays.items()})
            state = {
                "round": checkpoint.round,
                "config": checkpoint.config,
                "ledger": checkpoint.ledger,
                "tally": checkpoint.tally,
            }
            _write(aside / ARRAYS, data)
            _write(aside / STATE, json.dumps(state | {"sha256": _seal(state, data)}, indent=1).encode())
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            sync(self.directory)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint of round {checkpoint.round} cannot be written to {self.directory} ({error.strerror}); "
                "earlier checkpoints are intact: make room and `lethe resume` the run"
            ) from error
        self._prune(final)
        return final

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, None where there is none. Raises CheckpointError if all are damaged."""
        found = self._found()
        problems = []
        for directory in reversed(found):
            try:
                return _load(directory)
            except (OSError, ValueError, KeyError) as error:
                problems.append(f"{directory.name}: {error}")
        if problems:
            raise CheckpointError(f"no checkpoint below {self.directory} can be read: {'; '.join(problems)}")
        return None

    def _prune(self, newest: Path) -> None:
        """Drop all but the `keep` newest up to this one; later ones were passed over when it was resumed: damaged."""
        found = self._found()
        place = found.index(newest)
        for other in [*found[: max(0, place + 1 - self.keep)], *found[place + 1 :]]:
            shutil.rmtree(other, ignore_errors=True)

    def _found(self) -> Sequence[Path]:
        numbered = {
            int(match[1]): path for path in self.directory.glob("round-*") if (match := _NAME.fullmatch(path.name))
        }
        return [numbered[number] for number in sorted(numbered)]


def check_config(checkpoint: Checkpoint, config: dict[str, object]) -> None:
    """Raise CheckpointError naming the keys in which the checkpoint's config differs from the present one."""
    then, now = _flat(checkpoint.config), _flat(config)
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if changed:
        rows = ", ".join(f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" for key in changed)
        raise CheckpointError(
            f"the checkpoint of round {checkpoint.round} belongs to another configuration ({rows}); "
            "restore these keys, or start a new run under another name"
        )


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf for key, value in tree.items() for name, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()
    }


def _load(directory: Path) -> Checkpoint:
    state = json.loads((directory / STATE).read_text())
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is damaged: it holds no object")
    data = (directory / ARRAYS).read_bytes()
    if _seal({key: value for key, value in state.items() if key != "sha256"}, data) != state["sha256"]:
        raise ValueError("damaged (sha256 differs)")
    arrays = load(data)
    return Checkpoint(
        round=int(state["round"]),
        vector=torch.from_numpy(arrays.pop("vector")),
        strategy={key.removeprefix("strategy."): array for key, array in arrays.items()},
        config=state["config"],
        ledger=state["ledger"],
        tally=state["tally"],
    )


def _seal(state: dict[str, object], data: bytes) -> str:
    """Return a SHA-256 over both files: a flipped bit in the state is no better than one in the arrays."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode() + b"\0" + data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
