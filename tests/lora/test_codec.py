"""Laws of the flat layout."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.codec import Entry, Layout, Part, Turned
from lora.errors import WrongUpdate

PARTS: tuple[Part, ...] = ("A", "B", "head")
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
chosen = st.lists(st.sampled_from(PARTS), unique=True)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    entries: list[Entry] = []
    for part in draw(st.permutations(PARTS)):
        names = draw(st.lists(st.text("abc.", min_size=1, max_size=4), unique=True, max_size=4))
        entries += [Entry(part, name, draw(shapes)) for name in names]
    return Layout(tuple(entries))


def numbered(layout: Layout, *lead: int) -> Tensor:
    return torch.arange(math.prod(lead) * layout.size, dtype=torch.float32).view(*lead, layout.size)


@given(layouts(), st.sampled_from([(), (3,), (2, 3)]))
def test_views_cover_the_vector_once_in_order(layout: Layout, lead: tuple[int, ...]) -> None:
    flat = numbered(layout, *lead)
    views = layout.views(flat)
    assert list(views) == [(entry.part, entry.name) for entry in layout.entries]
    pieces = [view.reshape(*lead, -1) for view in views.values()]
    assert torch.equal(torch.cat([*pieces, flat[..., :0]], dim=-1), flat)
    assert all(views[e.part, e.name].shape == (*lead, *e.shape) for e in layout.entries)


@given(layouts())
def test_writing_to_a_view_writes_to_the_vector(layout: Layout) -> None:
    flat = torch.zeros(layout.size)
    for view in layout.views(flat).values():
        view.fill_(1.0)
    assert flat.sum() == layout.size


@given(layouts(), chosen, st.sampled_from([(), (3,)]))
def test_inserting_what_was_selected_gives_the_vector_back(
    layout: Layout, parts: list[Part], lead: tuple[int, ...]
) -> None:
    flat = numbered(layout, *lead) + 1
    selected = layout.select(flat, parts)
    assert selected.shape == (*lead, layout.length(parts))
    target = torch.zeros_like(flat)
    layout.insert(target, parts, selected)
    assert torch.equal(layout.select(target, parts), selected)
    others = [part for part in PARTS if part not in parts]
    assert not layout.select(target, others).any()
    layout.insert(target, others, layout.select(flat, others))
    assert torch.equal(target, flat)


@given(layouts(), chosen)
def test_selecting_is_viewing_by_the_subset(layout: Layout, parts: list[Part]) -> None:
    flat, smaller = numbered(layout), layout.subset(parts)
    assert smaller.size == layout.length(parts)
    own = smaller.views(layout.select(flat, parts))
    views = layout.views(flat)
    assert own.keys() == {key for key in views if key[0] in parts}
    assert all(torch.equal(own[key], views[key]) for key in own)


@given(layouts())
def test_spans_are_contiguous_and_follow_each_other(layout: Layout) -> None:
    stop = 0
    for part in layout.parts:
        span = layout.span(part)
        assert span.start == stop
        assert span.stop - span.start == layout.length([part])
        stop = span.stop
    assert stop == layout.size
    for part in set(PARTS) - set(layout.parts):
        assert layout.span(part) == slice(0, 0)


def test_one_part_is_selected_without_a_copy() -> None:
    layout = Layout((Entry("A", "x", (2, 3)), Entry("B", "x", (4,))))
    flat = numbered(layout)
    assert layout.select(flat, ["B"]).data_ptr() == flat[6:].data_ptr()


@given(layouts().filter(lambda layout: layout.entries), st.data())
@settings(max_examples=60)
def test_any_name_shape_or_order_changes_the_digest(layout: Layout, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(layout.entries) - 1))
    entry = layout.entries[place]
    fresh = Entry(entry.part, entry.name + "!", entry.shape)
    for other in (fresh, replace(entry, shape=(*entry.shape, 1)), replace(entry, shape=(7, *entry.shape))):
        changed = (*layout.entries[:place], other, *layout.entries[place + 1 :])
        assert Layout(changed).digest != layout.digest
    assert Layout(layout.entries[1:]).digest != layout.digest
    turned = Layout(layout.entries[::-1])
    assert (turned.digest == layout.digest) == (len(layout.entries) == 1)
    assert Layout(tuple(layout.entries)).digest == layout.digest


@given(layouts(), chosen, st.integers(-2, 2).filter(bool))
def test_a_wrong_length_is_refused_and_nothing_is_written(layout: Layout, parts: list[Part], more: int) -> None:
    length = max(0, layout.length(parts) + more)
    flat = torch.zeros(layout.size)
    if length != layout.length(parts):
        with pytest.raises(WrongUpdate, match=rf"{length} numbers, expected {layout.length(parts)} for parts"):
            layout.insert(flat, parts, torch.ones(length))
    assert not flat.any()


def test_a_layout_that_breaks_its_own_rules_is_refused() -> None:
    with pytest.raises(ValueError, match="side by side, not A B A"):
        Layout((Entry("A", "x", (1,)), Entry("B", "x", (1,)), Entry("A", "y", (1,))))
    with pytest.raises(ValueError, match="every block once"):
        Layout((Entry("B", "x", (1,)), Entry("B", "x", (2,))))


def test_turned_numbers_have_the_same_blocks_with_b_as_it_is_read() -> None:
    layout = Layout(
        (Entry("A", "x", (2, 5)), Entry("B", "x", (3, 2)), Entry("B", "y", (4, 2)), Entry("head", "w", (2,)))
    )
    flat, turned = torch.arange(3.0 * layout.size).view(3, -1), Turned(layout)
    for some in (flat, flat[1], flat[:0]):
        found, wanted = turned.views(turned.turned(some)), layout.views(some)
        assert found.keys() == wanted.keys() and all(found[key].equal(wanted[key]) for key in wanted)
        assert all(found["B", name].mT.is_contiguous() for name in "xy") or some.dim() > 1
