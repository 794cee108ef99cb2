"""The error tree as it is drawn, and as it is."""

import inspect
import re

import pytest

from lora import errors
from lora.errors import LetheError, nearest


def drawn() -> dict[str, str | None]:
    """Return each class of the drawing with the class that it hangs from."""
    parents: dict[str, str | None] = {}
    depths: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)( |$)", line)
        if found:
            depth = len(found[1]) // 4
            depths = [*depths[:depth], found[2]]
            parents[found[2]] = depths[depth - 1] if depth else None
    return parents


def defined() -> dict[str, str | None]:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LetheError)]
    return {
        kind.__name__: kind.__base__.__name__ if kind.__base__ and kind is not LetheError else None for kind in kinds
    }


def test_the_drawn_tree_is_the_tree() -> None:
    assert len(drawn()) > 5
    assert drawn() == defined()


def test_every_error_says_what_it_means() -> None:
    assert all((getattr(errors, name).__doc__ or "").endswith(".") for name in defined())


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("qery", ["query", "value"], "; did you mean 'query'?"),
        ("fedagv", ["fedavg", "krum"], "; did you mean 'fedavg'?"),
        ("zzz", ["query", "value"], "; known: query, value"),
        ("zzz", {"b", "a"}, "; known: a, b"),
        ("zzz", [], ""),
    ],
)
def test_nearest(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint
