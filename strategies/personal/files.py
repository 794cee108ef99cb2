"""A personalised model on disk: configuration, weights and scales; base and recommenders are kept elsewhere."""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora.config import AdapterConfig
from lora.errors import FrameMismatch, ModelError
from strategies.personal.asking import Asking
from strategies.personal.config import PersonalConfig
from strategies.personal.personalized import Personalized
from strategies.personal.representation import Representation
from tasks.models import BaseModel

CONFIG, WEIGHTS = "personal.json", "personal.safetensors"
_SCALES = "representation."


def save_personalized(one: Personalized, directory: Path) -> Path:
    """Write what was trained, aside and renamed; a directory that is there is replaced as a whole."""
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in one.parts.modules().state_dict().items()}
    tensors |= {_SCALES + name: value for name, value in one.representation.state().items()}
    save_file(tensors, aside / WEIGHTS)
    about = {
        "name": one.name,
        "base": one.base.reference,
        "frame": one.adapted.frame.digest,
        "inputs": one.inputs,
        "adapter": one.adapter.model_dump(mode="json"),
        "personal": one.config.model_dump(mode="json"),
        "curve": one.curve,
    }
    (aside / CONFIG).write_text(json.dumps(about, indent=1) + "\n")
    if directory.exists():
        old = aside.with_name(f"{aside.name}.old")
        directory.rename(old)
        shutil.rmtree(old)
    aside.rename(directory)
    return directory


def load_personalized(
    directory: Path, base: BaseModel, *, asking: Asking, representation: Representation
) -> Personalized:
    """Read a personalised model onto its base; recommenders (in `asking`, `representation`) are those it had.

    Raises ModelError for missing or damaged files, FrameMismatch for another base, rank or frame.
    """
    try:
        about = json.loads((directory / CONFIG).read_text())
        tensors = load_file(directory / WEIGHTS)
        adapter, config = AdapterConfig(**about["adapter"]), PersonalConfig(**about["personal"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{directory}: no personalised model can be read ({error}); save it again") from error
    one = Personalized(base, adapter, config, asking=asking, representation=representation, name=about["name"])
    try:
        one.adapted.frame.check(about["frame"], who=str(directory))
    except FrameMismatch:
        one.adapted.detach()
        raise
    parts = one.build(inputs=int(about["inputs"]), seed=0).modules()
    own = {name: value for name, value in tensors.items() if not name.startswith(_SCALES)}
    try:
        parts.load_state_dict(own)
    except RuntimeError as error:
        one.adapted.detach()
        raise ModelError(f"{directory}: its weights do not fit its configuration; save it again") from error
    parts.eval().requires_grad_(False)
    representation.restore(
        {name.removeprefix(_SCALES): value for name, value in tensors.items() if name.startswith(_SCALES)}
    )
    one.curve = [float(value) for value in about["curve"]]
    return one
