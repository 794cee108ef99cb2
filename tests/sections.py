"""Sections of small runs: what the tests of several packages build their jobs from."""

from typing import Any

Sections = dict[str, Any]


def merge(base: Sections, changes: Sections) -> Sections:
    """Return `base` with `changes` in it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged
