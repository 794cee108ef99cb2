"""YAML is read as version 1.2 means it."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lethe.notation import inline, parse
from lora.errors import ConfigError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("010", 10),
        ("no", "no"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1e-5}", {"a": 1e-5}),
        ("'1e-5'", "1e-5"),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse(text, source="x")
    assert found == value
    assert type(found) is type(value)


@given(PLAIN)
def test_inline_reads_back_the_same(value: Any) -> None:
    text = inline(value)
    assert "\n" not in text
    assert parse(text, source="x") == value
    assert yaml.safe_load(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5, column 3: the key 'c' is given twice (first on line 3)"),
        ("a: 1\na: 1\n", "line 2, column 1: the key 'a' is given twice (first on line 1)"),
        ("{a: 1, a: 2}", "line 1, column 8: the key 'a' is given twice (first on line 1)"),
        ("a: [1,\nb: 2", "line 2"),
        ("\ta: 1", "line 1, column 1"),
        ("a: b: c", "line 1, column 5"),
        ("{[a]: 1}", "line 1, column 2"),
        ("a: !!python/object:os.system x", "line 1, column 4"),
        ("a: *nowhere", "line 1, column 4"),
        ("[" * 5000, "nested too deeply"),
        ("a: \x07", "not YAML"),
    ],
)
def test_an_error_names_source_and_place(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, source="file.yaml")
    assert str(caught.value).startswith("file.yaml")
    assert words in str(caught.value)


def test_merge_keys_still_work() -> None:
    assert parse("a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n", source="x")["c"] == {"b": 1, "d": 2}
