import pytest

from tasks.examples import Examples

FULL = Examples(texts=("a", "b", "c"), labels=(0, 1, 2), prompts=("p", "q", "r"), owners=("x", "y", "z"))


def test_take_follows_the_indices_in_every_column() -> None:
    assert FULL.take([2, 0, 2]) == Examples(
        texts=("c", "a", "c"), labels=(2, 0, 2), prompts=("r", "p", "r"), owners=("z", "x", "z")
    )


def test_take_keeps_absent_columns_absent_and_may_be_empty() -> None:
    bare = Examples(texts=("a", "b")).take([1])
    assert (bare.texts, bare.labels, bare.prompts, bare.owners) == (("b",), None, None, None)
    assert len(FULL.take([])) == 0


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="labels has 1 values for 2 texts"):
        Examples(texts=("a", "b"), labels=(0,))
