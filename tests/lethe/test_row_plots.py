"""Charts with one row a name: inside the picture, lengths that mean values, intervals that say what they rule out."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lethe.plots import plain
from lethe.row_plots import intervals, row_bars
from tests.lethe.test_plots import pictures

VALUES = st.floats(0, 1e9, allow_subnormal=False)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=40))
def test_bars_take_any_numbers_and_stay_inside(rows: list[tuple[float, float]]) -> None:
    names = [f"a <very> long title of a film, number {i}, which does not fit" for i in range(len(rows))]
    series = [("one", [a for a, _ in rows]), ("two", [b for _, b in rows])]
    svg = pictures(row_bars("t", names, series, form=plain, label="x"))
    assert len(svg.findall("rect")) == 2 * len(rows)
    assert all(float(box.attrib["x"]) + float(box.attrib["width"]) <= 980 for box in svg.findall("rect"))


def test_lengths_are_the_values_and_rows_do_not_overlap() -> None:
    svg = pictures(row_bars("t", ["a", "b"], [("x", [1, 2]), ("y", [3, 4])], form=plain, label="x", top=4))
    boxes = svg.findall("rect")
    widths = [float(box.attrib["width"]) for box in boxes]
    assert widths == pytest.approx([widths[0], 3 * widths[0], 2 * widths[0], 4 * widths[0]], abs=0.2)
    ends = sorted((float(b.attrib["y"]), float(b.attrib["y"]) + float(b.attrib["height"])) for b in boxes)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))


def test_own_colours_and_no_rows() -> None:
    svg = pictures(row_bars("t", ["a", "b"], [("x", [1, 2])], form=plain, label="x", hues=[[3, 2]]))
    assert [box.attrib["class"] for box in svg.findall("rect")] == ["f3", "f2"]
    assert row_bars("t", [], [("x", [])], form=plain, label="x") == intervals("t", [], form=plain, label="x") == ""


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=10))
def test_an_interval_is_coloured_only_where_zero_is_outside(rows: list[tuple[float, float, float]]) -> None:
    given_rows = [("n", value, value - below, value + above) for value, below, above in rows]
    svg = pictures(intervals("t", given_rows, form=plain, label="x"))
    styles = [dot.attrib["class"] for dot in svg.findall("circle")]
    assert styles == ["f1" if low > 0 or high < 0 else "f0" for _, _, low, high in given_rows]
