"""Warm slots: always the source's numbers, whatever is evicted, written or removed meanwhile."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.codec import Entry, Layout
from lora.errors import ConfigError, Unknown
from server.service.lent import Desk
from server.service.sources import BankSource
from server.service.warm import Kept, WarmSlots
from strategies.personal.slots import UserSlots

LAYOUT = Layout((Entry("B", "x", (3, 2)),))
NAMES = [f"user-{number}" for number in range(8)]


def slots(directory: Path | None = None) -> UserSlots:
    made = UserSlots(LAYOUT, frame="f" * 64, directory=directory)
    made.add(NAMES, torch.arange(8.0)[:, None].expand(-1, 6).clone())
    return made


def gathered(warm: WarmSlots, *names: str | None) -> tuple[list[float], list[object]]:
    out = torch.full((len(names) + 1, 6), -1.0)
    told = warm.gather(names, out)
    assert (out[: len(names)] == out[: len(names), :1]).all() and (out[-1] == -1).all()
    return out[:-1, 0].tolist(), list(told)


def test_each_name_gets_its_own_slot_and_version_and_the_rest_is_said() -> None:
    bank = slots()
    warm = WarmSlots(BankSource(bank), rows=4)
    values, told = gathered(warm, "user-5", None, "nobody", "user-2", "user-5")
    assert values == [5, 0, 0, 2, 5]
    assert told[:2] == [1, 0] and told[3:] == [1, 1]
    assert isinstance(told[2], Unknown) and "nobody" in str(told[2]) and "user-" not in str(told[2])


def test_what_was_asked_for_lately_stays_and_what_is_pinned_stays_longer() -> None:
    warm = WarmSlots(BankSource(slots()), rows=3)
    warm.pin("user-0")
    for name in ("user-1", "user-2", "user-1", "user-3"):
        gathered(warm, name)
    assert [name in warm for name in NAMES[:4]] == [True, True, False, True]
    assert (warm.traffic.hits, warm.traffic.misses, warm.traffic.evictions) == (1, 4, 1)
    warm.pin("user-1")
    with pytest.raises(ConfigError, match="2 of 3 warm rows are pinned"):
        warm.pin("user-2")
    with pytest.raises(Unknown):
        WarmSlots(BankSource(slots()), rows=3).pin("nobody")
    warm.unpin("user-0")
    gathered(warm, "user-4", "user-5")
    assert "user-0" not in warm and "user-1" in warm


def test_what_is_held_before_it_is_there_stays_from_its_first_use_on() -> None:
    bank = slots()
    warm = WarmSlots(BankSource(bank), rows=3)
    warm.hold(["user-0", "late"])
    assert "user-0" in warm and "late" not in warm
    bank.add(["late"], torch.full((6,), 9.0))
    assert gathered(warm, "late")[0] == [9]
    for name in NAMES[1:5]:
        gathered(warm, name)
    assert "late" in warm and "user-0" in warm
    with pytest.raises(ConfigError, match="2 of 3 warm rows are pinned"):
        warm.hold(["nobody"])


def test_a_batch_of_more_users_than_rows_is_right_too() -> None:
    warm = WarmSlots(BankSource(slots()), rows=2)
    assert gathered(warm, *NAMES)[0] == list(range(8))
    assert len(warm) == 2


def test_bfloat16_holds_half_the_bytes_and_answers_in_float32() -> None:
    warm = WarmSlots(BankSource(slots()), rows=4, dtype=torch.bfloat16)
    assert gathered(warm, "user-3", "user-1")[0] == [3, 1] and gathered(warm, "user-3")[0] == [3]
    assert warm.data.element_size() == 2


def test_what_is_removed_leaves_no_number_behind() -> None:
    bank = slots()
    warm = WarmSlots(BankSource(bank), rows=4)
    gathered(warm, "user-5", "user-2")
    bank.remove(["user-5"])
    assert "user-5" not in warm and not (warm.data == 5).any()
    assert isinstance(gathered(warm, "user-5")[1][0], Unknown)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["ask", "write", "remove", "add"]), st.sampled_from(NAMES)), max_size=30))
def test_it_is_the_source_seen_through_any_sequence_of_writes(steps: list[tuple[str, str]]) -> None:
    bank, value = slots(), 100.0
    warm = WarmSlots(BankSource(bank), rows=3)
    for what, name in steps:
        value += 1
        if what == "write" and name in bank:
            bank.write([name], torch.full((1, 6), value))
        elif what == "remove" and name in bank:
            bank.remove([name])
        elif what == "add" and name not in bank:
            bank.add([name], torch.full((6,), value))
        (seen,), (told,) = gathered(warm, name)
        if name in bank:
            assert seen == float(bank.read([name]).values[0, 0]) and told == bank.version(name)
        else:
            assert isinstance(told, Unknown)


class Interrupted(BankSource):
    """A source that lets something happen between its reading and its answer."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def kept(self, names: Sequence[str]) -> Kept:
        found = super().kept(names)
        self.meanwhile()
        return found


def test_a_copy_that_was_overwritten_while_it_was_read_does_not_stay() -> None:
    bank = slots()
    source = Interrupted(bank)
    warm = WarmSlots(source, rows=4)
    source.meanwhile = lambda: bank.write(["user-1"], torch.full((1, 6), 50.0))
    gathered(warm, "user-1")
    source.meanwhile = lambda: None
    assert gathered(warm, "user-1")[0] == [50]


def test_a_slot_that_is_dropped_while_others_are_fetched_is_fetched_again() -> None:
    bank = slots()
    source = Interrupted(bank)
    warm = WarmSlots(source, rows=4)
    gathered(warm, "user-1")
    left = [60.0]

    def write_once() -> None:
        if left:
            bank.write(["user-1"], torch.full((1, 6), left.pop()))

    source.meanwhile = write_once
    assert gathered(warm, "user-1", "user-2") == ([60, 2], [2, 1])


def test_in_doubt_versions_are_compared() -> None:
    class Silent(BankSource):
        def listen(self, listener: Callable[[Sequence[str]], None]) -> None:
            """Another process writes: nothing is heard."""

    bank = slots()
    warm = WarmSlots(Silent(bank), rows=4)
    gathered(warm, "user-1", "user-2", "user-3")
    bank.write(["user-1"], torch.full((1, 6), 70.0))
    bank.remove(["user-3"])
    warm.doubt()
    misses = warm.traffic.misses
    values, told = gathered(warm, "user-1", "user-2", "user-3")
    assert values[:2] == [70, 2] and isinstance(told[2], Unknown)
    assert warm.traffic.misses == misses + 2


def test_readers_see_whole_slots_of_a_version_while_writers_write(tmp_path: Path) -> None:
    bank = slots(tmp_path)
    warm, stop, wrong = WarmSlots(BankSource(bank), rows=3), threading.Event(), list[Tensor]()

    def read() -> None:
        out = torch.empty(4, 6)
        while not stop.is_set():
            told = warm.gather(["user-1", "user-2", "user-3", "user-1"], out)
            if not (out == out[:, :1]).all() or (out[:, 0] // 100 != torch.tensor([1, 2, 3, 1])).any():
                wrong.append(out.clone())
            assert all(isinstance(version, int) for version in told)

    for number in (1, 2, 3):
        bank.write([f"user-{number}"], torch.full((1, 6), 100.0 * number))
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(40):
        number = turn % 3 + 1
        bank.write([f"user-{number}"], torch.full((1, 6), 100.0 * number + turn))
    stop.set()
    for thread in threads:
        thread.join(30)
    bank.close()
    assert wrong == []


def test_there_is_at_least_one_row() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        WarmSlots(BankSource(slots()), rows=0)


def test_what_is_lent_stays_until_it_is_given_back_and_goes_then() -> None:
    bank = slots()
    warm = WarmSlots(BankSource(bank), rows=3)
    out = torch.empty(2, 6)
    with warm.lent(["user-5", "user-2", "user-5"]) as lent:
        bank.remove(["user-5"])
        # Others come to the row that is left, and not to one that is lent.
        for name in ("user-1", "user-3", "user-4"):
            assert gathered(warm, name)[0] == [float(name[-1])]
        assert "user-2" in warm or (warm.data == 2).any()
        lent.part([0, 1]).copy(slice(0, 6), out)
        assert out[:, 0].tolist() == [5, 2] and list(lent.versions) == [1, 1, 1]
        assert isinstance(gathered(warm, "user-5")[1][0], Unknown)
    assert not (warm.data == 5).any()
    assert gathered(warm, "user-0", "user-6", "user-7")[0] == [0, 6, 7] and len(warm) == 3


def test_blocks_are_those_of_the_slots_wherever_they_come_from() -> None:
    layout = Layout(
        (Entry("B", "x", (3, 2)), Entry("B", "y", (3, 2)), Entry("A", "x", (2, 4)), Entry("head", "z", (3,)))
    )
    bank = UserSlots(layout, frame="f" * 64)
    values = torch.randn(3, layout.size, generator=torch.Generator().manual_seed(0))
    bank.add(["a", "b", "c"], values)
    for dtype, exact in ((torch.float32, True), (torch.bfloat16, False)):
        warm = WarmSlots(BankSource(bank), rows=2, dtype=dtype)
        desk = Desk(warm.turned)
        wanted = layout.views(torch.stack([values[0], values[1], torch.zeros(layout.size), values[2]]))
        # Two are in memory, one is not there, and one has no room.
        with warm.lent(["a", "b", None, "c"]) as lent:
            found = desk.blocks(lent)
            assert {*found} == {*wanted}
            for key, block in wanted.items():
                torch.testing.assert_close(found[key], block, atol=0 if exact else 0.02, rtol=0 if exact else 0.01)
            for key, block in desk.blocks(lent.part([1]), alone=True).items():
                torch.testing.assert_close(block, wanted[key][1], atol=0 if exact else 0.02, rtol=0 if exact else 0.01)
