"""Evidence in words: nothing of it is left out, whoever wrote it."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.console.evidence import rows

KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
VALUES = st.recursive(
    st.integers() | st.booleans() | st.text(max_size=8) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=8,
)


def test_deletions_are_counted_before_and_after() -> None:
    found = {each.what: (each.before, each.after) for each in rows(
        {"events": 3, "slot": True, "requests_ended": 0, "left": {"events": 0, "slot": False}}
    )}  # fmt: skip
    assert found == {
        "events of the history": ("3", "0"),
        "the user's own adapter": ("yes", "no"),
        "requests that were waiting": ("0", None),
    }


def test_measures_of_others_stand_side_by_side() -> None:
    found = rows(
        {"before": {"accuracy": 0.91}, "after": {"accuracy": 0.1234567, "steps": 4}, "audit": {"files": ["a"]}}
    )
    assert [(each.what, each.before, each.after) for each in found] == [
        ("audit: files", '["a"]', None), ("accuracy", "0.91", "0.123457"), ("steps", "-", "4"),
    ]  # fmt: skip


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_every_value_is_shown(evidence: dict[str, Any]) -> None:
    shown = " ".join(f"{each.before} {each.after}" for each in rows(evidence))
    for value in leaves(evidence):
        said = ("yes" if value else "no") if isinstance(value, bool) else value
        assert (said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)) in shown


def leaves(tree: dict[str, Any]) -> list[Any]:
    return [leaf for each in tree.values() for leaf in (leaves(each) if isinstance(each, dict) else [each])]
