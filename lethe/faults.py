"""What is wrong with a section of a run file: key, value, limit and remedy, every fault at once."""

import math
import types
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lethe.notation import inline
from lora.config import Section
from lora.errors import nearest

Layout = Mapping[str, type[Section]]
"""The sections of a run file by name; the name "" stands for the keys above all sections."""

# Names from other tools, and ours for them in either kind of run file: likeness of spelling would find a wrong one.
_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "batch_size": ("training.batch", "personal.batch"),
    "dataset": ("data.name", "ratings.path"),
    "epochs": ("training.steps", "personal.epochs"),
    "eps": ("privacy.epsilon",),
    "learning_rate": ("training.rate", "personal.rate"),
    "local_epochs": ("training.steps",),
    "local_steps": ("training.steps",),
    "lora_alpha": ("adapter.alpha",),
    "lora_r": ("adapter.rank",),
    "lr": ("training.rate", "personal.rate"),
    "max_grad_norm": ("privacy.clip",),
    "mu": ("training.proximal",),
    "num_clients": ("federation.clients",),
    "num_rounds": ("federation.rounds",),
    "r": ("adapter.rank",),
    "seq_len": ("task.max_length", "personal.max_length"),
    "sigma": ("privacy.noise_multiplier",),
    "target_delta": ("privacy.delta",),
    "target_epsilon": ("privacy.epsilon",),
    "target_modules": ("adapter.targets",),
}
_REASONS = {
    "name": "letters, digits, dots, dashes and underscores, at most 100, the first a letter or digit",
    "federation.clients": "a federation needs at least 2 clients",
    "model.device": "auto, cpu, cuda, cuda:N or mps",
}
_PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}
_LIMITS = (
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "at most"),
    (annotated_types.Lt, "lt", "below"),
)


def section_faults(name: str, layout: Layout, raw: object) -> tuple[Section | None, list[str]]:
    """Validate the raw value of section `name`: the section, or None and one line for every fault."""
    kind = layout[name]
    if not isinstance(raw, Mapping):
        known = ", ".join(kind.model_fields)
        return None, [f"{name}={_shown(raw)}: `{name}` is a section, not a value; give keys of it: {known}"]
    faults = [unknown_key(_dotted(name, key), layout) for key in raw if key not in kind.model_fields]
    known_keys = {key: _tidy(value, kind.model_fields[key]) for key, value in raw.items() if key in kind.model_fields}
    odd = {key for key, value in known_keys.items() if _odd(value, kind.model_fields[key])}
    faults += [_wrong_value(name, key, known_keys[key], kind) for key in known_keys if key in odd]
    section, more = _validated(name, kind, {key: value for key, value in known_keys.items() if key not in odd})
    return (None if faults else section), faults + more


def unknown_key(key: str, layout: Layout) -> str:
    """Say that the dotted `key` is unknown and which known one, over all sections, is nearest."""
    section, _, leaf = key.rpartition(".")
    for ours in _ELSEWHERE.get(leaf, ()):
        if ours.partition(".")[0] in layout:
            return f"{key}: there is no such key; did you mean '{ours}'?"
    known = [_dotted(home, field) for home, kind in layout.items() for field in kind.model_fields]
    score, best = max((_likeness(key, candidate, leaf), candidate) for candidate in known)
    if score >= 0.65:
        return f"{key}: there is no such key; did you mean '{best}'?"
    place = section if section in layout else ""
    what = f"keys of {place}" if place else "sections and keys"
    return f"{key}: there is no such key; {what}: {', '.join(layout[place].model_fields)}"


def _likeness(key: str, candidate: str, leaf: str) -> float:
    """Compare two dotted keys: by their last part first, the home decides among equals."""
    name = candidate.rpartition(".")[2]
    return 0.9 * SequenceMatcher(None, leaf, name).ratio() + 0.1 * SequenceMatcher(None, key, candidate).ratio()


def _dotted(section: str, key: object) -> str:
    return f"{section}.{key}" if section else str(key)


def _validated(name: str, kind: type[Section], raw: Mapping[str, object]) -> tuple[Section | None, list[str]]:
    try:
        return kind.model_validate(dict(raw)), []
    except ValidationError as error:
        return None, list(dict.fromkeys(_worded(name, kind, raw, each) for each in error.errors()))


def _worded(name: str, kind: type[Section], raw: Mapping[str, object], error: ErrorDetails) -> str:
    where = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "value_error":
        return _rule(name, kind, where, str(error["ctx"]["error"]))
    return _wrong_value(name, where, raw[where], kind)


def _rule(name: str, kind: type[Section], where: str, text: str) -> str:
    """Put the section's name before a broken rule of it, so that the key is the one to change in the file."""
    if where:
        return f"{_dotted(name, where)}: {text}"
    return _dotted(name, text) if text.partition("=")[0] in kind.model_fields else f"{name}: {text}"


def _wrong_value(name: str, key: str, value: object, kind: type[Section]) -> str:
    field, dotted = kind.model_fields[key], _dotted(name, key)
    reason = f" ({_REASONS[dotted]})" if dotted in _REASONS else ""
    return f"{dotted}={_shown(value)}: must be {_expected(field)}{reason}{_remedy(value, field)}"


def _remedy(value: object, field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    words = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    wrong = [word for word in words if isinstance(word, str) and word not in choices]
    hint = nearest(wrong[0], choices) if wrong and choices else ""
    if "did you mean" in hint:
        return hint
    quotes = "; put it in quotes" if _takes_text(field.annotation) and isinstance(value, bool | float) else ""
    return f"{quotes}; left out, it is {_shown(field.get_default(call_default_factory=True))}"


def _expected(field: FieldInfo) -> str:
    """Describe the type and its limits: `a number, above 0 and below 1, or null`."""
    kinds = get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
    limits = [
        f"{word} {_shown(getattr(limit, attribute))}"
        for limit in field.metadata
        for known, attribute, word in _LIMITS
        if isinstance(limit, known)
    ]
    words = " or ".join(_described(kind) for kind in kinds if kind is not types.NoneType)
    bounds = ", " + " and ".join(limits) if limits else ""
    return words + bounds + (", or null" if types.NoneType in kinds else "")


def _described(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inside))
    if origin is dict:
        return f"a mapping from names to {_several(inside[1])}"
    return f"a list of {_several(inside[0])}" if origin is tuple else _PLAIN.get(kind, str(kind))


def _several(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    return _PLURAL.get(kind) or f"lists of {_several(get_args(kind)[0])}"


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _choices(kind: Any) -> Sequence[str]:
    if get_origin(kind) is Literal:
        return [str(each) for each in get_args(kind)]
    nested = _is_union(kind) or get_origin(kind) is tuple
    return [each for inner in get_args(kind) for each in _choices(inner)] if nested else []


def _takes_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is not Literal and any(_takes_text(each) for each in get_args(kind)))


def _takes_truth(kind: Any) -> bool:
    return kind is bool or (_is_union(kind) and bool in get_args(kind))


def _tidy(value: object, field: FieldInfo) -> object:
    """Read whole numbers as text where only text fits: labels and names are often digits."""
    if isinstance(value, list | tuple) and _takes_text(field.annotation):
        return [_tidy(each, field) for each in value]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole and _takes_text(field.annotation) and not _takes_number(field.annotation) else value


def _takes_number(kind: Any) -> bool:
    return kind in (int, float) or (get_origin(kind) is dict) or any(_takes_number(each) for each in get_args(kind))


def _odd(value: object, field: FieldInfo) -> bool:
    """Tell whether a value would pass for a number and is none: a truth value, an infinity, not-a-number."""
    if isinstance(value, Mapping):
        return any(_odd(each, field) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_odd(each, field) for each in value)
    if isinstance(value, bool):
        return not _takes_truth(field.annotation)
    if isinstance(value, str) and _takes_number(field.annotation):
        return value.strip().lower().lstrip("+-") in ("inf", "infinity", "nan")
    return isinstance(value, float) and not math.isfinite(value)


def _shown(value: object) -> str:
    return inline(_plain(value))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
