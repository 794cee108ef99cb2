"""Charts: well-formed, everything drawn inside the picture, positions that mean the values."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lethe import plots
from lethe.plots import Canvas, Level, Series, bars, heat, lines, plain, spread, ticks

NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False)


def pictures(figure: str) -> ElementTree.Element:
    """Parse a figure's SVG, and check that no mark lies outside of it."""
    svg = ElementTree.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for mark in svg:
        for name, value in mark.attrib.items():
            if name in ("x", "x1", "x2", "cx"):
                assert -0.1 <= float(value) <= width + 0.1
            if name in ("y", "y1", "y2", "cy"):
                assert -0.1 <= float(value) <= height + 0.1
            if name == "points":
                assert all(0 <= float(x) <= width for x in re.findall(r"([-\d.e]+),", value))
    return svg


@given(NUMBERS, st.floats(1e-6, 1e9))
def test_ticks_are_inside_evenly_spaced_and_few(low: float, span: float) -> None:
    high = low + span
    if not high - low > 1e-6 * abs(low):
        return
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    slack = 1e-6 * (high - low)
    assert all(low - slack <= each <= high + slack for each in found)
    steps = {round((b - a) / (high - low), 4) for a, b in pairwise(found)}
    assert max(steps) - min(steps) < 1e-3


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(allow_nan=True)), min_size=1, max_size=50), st.booleans())
def test_lines_take_any_numbers(points: list[tuple[int, float]], from_zero: bool) -> None:
    wild = [(x, y if not math.isfinite(y) else max(min(y, 1e12), -1e12)) for x, y in points]
    figure = lines("a < b", [Series("one", wild)], form=plain, levels=[Level("budget", 3.0)], from_zero=from_zero)
    finite = [y for _, y in wild if math.isfinite(y)]
    assert bool(figure) == bool(finite)
    if figure:
        svg = pictures(figure)
        assert len(svg.findall("circle")) == len(finite)
        assert "a &lt; b" in figure


def test_higher_values_are_drawn_higher_and_later_rounds_further_right() -> None:
    svg = pictures(lines("t", [Series("s", [(1, 0.1), (2, 0.9), (3, 0.5)])], form=plain))
    first, second, third = svg.findall("circle")
    assert float(second.attrib["cy"]) < float(third.attrib["cy"]) < float(first.attrib["cy"])
    assert float(first.attrib["cx"]) < float(second.attrib["cx"]) < float(third.attrib["cx"])
    assert [dot.findtext("title") for dot in (first, second)] == ["round 1: 0.1", "round 2: 0.9"]


def test_stacked_bars_add_up() -> None:
    svg = pictures(bars("t", ["a", "b"], [("x", [1, 2]), ("y", [3, 0])], form=plain, label="client"))
    heights = [float(box.attrib["height"]) for box in svg.findall("rect")]
    unit = heights[0]
    assert heights == pytest.approx([unit, 3 * unit, 2 * unit], abs=0.2)
    bottom, top = svg.findall("rect")[:2]
    assert float(top.attrib["y"]) + float(top.attrib["height"]) == pytest.approx(float(bottom.attrib["y"]), abs=0.2)


def test_many_names_are_thinned_until_they_fit() -> None:
    svg = pictures(bars("t", [str(i) for i in range(200)], [("x", [1.0] * 200)], form=plain, label="client"))
    names = [text for text in svg.findall("text") if text.attrib["text-anchor"] == "middle"]
    spots = [float(text.attrib["x"]) for text in names[:-1]]
    assert 5 < len(spots) < 25
    assert all(b - a > 20 for a, b in pairwise(spots))


def test_the_heat_map_is_darkest_at_the_largest_share() -> None:
    svg = pictures(heat("t", ["a", "b"], ["0", "1"], [[0.5, 0.0], [0.25, 0.1]]))
    shades = [float(box.attrib.get("fill-opacity", 1)) for box in svg.findall("rect")]
    assert len(shades) == 3
    assert shades[0] == 1 > shades[1] > shades[2] > 0


def test_spread_shows_single_clients_only_while_they_are_few() -> None:
    few = pictures(spread("t", {1: {str(i): float(i) for i in range(5)}}))
    many = pictures(spread("t", {1: {str(i): float(i) for i in range(120)}}))
    assert len(few.findall("circle")) == 5
    assert not many.findall("circle")
    tip = many.find("rect/title")
    assert tip is not None
    assert tip.text == "round 1, 120 clients: median 59.5, half of them 29.75 to 89.25, all 0 to 119"


def test_spread_leaves_out_what_is_no_number() -> None:
    assert spread("t", {1: {"0": math.nan, "1": None}, 2: {}}) == ""
    assert len(pictures(spread("t", {1: {"0": math.inf, "1": 2.0}})).findall("circle")) == 1


def test_many_rounds_are_thinned() -> None:
    svg = pictures(spread("t", {i: {"0": 1.0, "1": 2.0} for i in range(1000)}))
    assert len(svg.findall("rect")) <= 90


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (74_000, "74 kB"), (1_480_000, "1.48 MB"), (2.5e9, "2.5 GB")]
)
def test_sizes_have_decimal_units(value: float, text: str) -> None:
    assert plots.size(value) == text


def test_names_and_tips_are_escaped() -> None:
    canvas = Canvas((0, 1), (0, 1))
    canvas.text(1, 1, "<script>", "end")
    canvas.box(1, 1, 1, 1, style="f1", tip="</title><script>")
    assert "<script>" not in canvas.svg('"><script>')
