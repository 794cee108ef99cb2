"""Fitted recommenders on disk: settings as JSON, numbers as safetensors; nothing in them is code."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.errors import ModelError, nearest
from strategies.personal.recommenders.din import Din, DinSettings
from strategies.personal.recommenders.factors import FactorSettings, FoldedFactors
from strategies.personal.recommenders.protocol import Recommender
from strategies.personal.recommenders.sasrec import Sasrec, SasrecSettings

ABOUT, NUMBERS = "recommender.json", "recommender.safetensors"


class Keepable(Recommender, Protocol):
    """A recommender whose learned numbers can be taken out and put back."""

    settings: Any

    def state(self) -> dict[str, Tensor]:
        """Return what was learned."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what was learned before."""
        ...


_KINDS: Mapping[str, tuple[type[Keepable], type[Any], Callable[[Any], Keepable]]] = {
    "MF": (FoldedFactors, FactorSettings, FoldedFactors),
    "DIN": (Din, DinSettings, Din),
    "SASRec": (Sasrec, SasrecSettings, Sasrec),
}


def keepable(one: object) -> bool:
    """Return whether a recommender can be saved: a network over other events than the latest cannot."""
    return any(type(one) is kind for kind, _, _ in _KINDS.values()) and not (isinstance(one, Din) and one.retrieves)


def save_recommender(one: object, directory: Path) -> Path:
    """Write a fitted recommender, aside and renamed. Raises ModelError for one of a kind that cannot be saved."""
    found = next((name for name, (kind, _, _) in _KINDS.items() if type(one) is kind), None)
    if found is None or not keepable(one):
        raise ModelError(f"recommender {getattr(one, 'name', one)} cannot be saved; use {', '.join(_KINDS)}")
    kept: Any = one
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in kept.state().items()}, aside / NUMBERS)
    (aside / ABOUT).write_text(json.dumps({"kind": found, "settings": asdict(kept.settings)}, indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    return aside.rename(directory)


def load_recommender(directory: Path) -> Any:
    """Read a recommender that answers as the saved one does. Raises ModelError for missing or damaged files."""
    try:
        about = json.loads((directory / ABOUT).read_text())
        kind, tensors = str(about["kind"]), load_file(directory / NUMBERS)
        if kind not in _KINDS:
            raise ModelError(f"{directory}: recommender of kind '{kind}'{nearest(kind, _KINDS)}")
        _, settings, make = _KINDS[kind]
        one = make(settings(**_typed(settings, about["settings"])))
        one.restore(tensors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory}: no recommender can be read ({error}); fit and save it again") from error
    return one


def _typed(settings: type[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the class has them: JSON knows lists where they have tuples."""
    known = {field.name for field in fields(settings)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items() if name in known}
