"""The record of a forget request in words: what was deleted, what was left when it was looked for, and the rest."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_WORDS = {
    "events": "events of the history",
    "slot": "the user's own adapter",
    "adapters": "imported adapters",
    "idempotency_keys": "answers kept for repeated requests",
    "requests_ended": "requests that were waiting",
    "error": "what went wrong",
}
_LEFT, _BEFORE, _AFTER = "left", "before", "after"


@dataclass(frozen=True)
class Row:
    """One thing: how much there was, and how much was found afterwards; None where that was not measured."""

    what: str
    before: str
    after: str | None = None


def rows(evidence: Mapping[str, Any]) -> list[Row]:
    """Return everything that a request's evidence says; nothing is left out, known or not."""
    left = _table(evidence, _LEFT) | _table(evidence, _AFTER)
    before = _table(evidence, _BEFORE)
    rest = {key: value for key, value in evidence.items() if not _is_table(evidence, key)}
    counted = dict(_flat(rest)) | before
    found = [
        Row(_named(key), _said(value), _said(left[key]) if key in left else None) for key, value in counted.items()
    ]
    return found + [Row(_named(key), "-", _said(value)) for key, value in left.items() if key not in counted]


def _is_table(evidence: Mapping[str, Any], key: str) -> bool:
    return key in (_LEFT, _BEFORE, _AFTER) and isinstance(evidence[key], Mapping)


def _table(evidence: Mapping[str, Any], key: str) -> dict[str, Any]:
    return dict(_flat(evidence[key])) if key in evidence and _is_table(evidence, key) else {}


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _named(key: str) -> str:
    return _WORDS.get(key) or ": ".join(part.replace("_", " ") for part in key.split("."))


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
