"""Users' slots: found by name, versioned, kept apart bit for bit, and whole after a kill."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor

from lora.codec import Entry, Layout
from lora.errors import DataError, RunError, WrongUpdate
from strategies.personal.rows import INDEX, NUMBERS
from strategies.personal.slots import UserSlots

LAYOUT = Layout((Entry("B", "q", (3, 2)), Entry("B", "v", (2, 2))))


def opened(directory: Path | None = None, *, layout: Layout = LAYOUT, frame: str = "f" * 64) -> UserSlots:
    return UserSlots(layout, frame=frame, directory=directory)


def filled(*numbers: float) -> Tensor:
    return torch.tensor(numbers).unsqueeze(1).expand(-1, LAYOUT.size).contiguous()


# --- What a caller can do wrong --------------------------------------------------------------------------------------


def test_an_unknown_user_is_an_error_that_names_the_nearest() -> None:
    slots = opened()
    slots.add([f"user-{number}" for number in range(1000)], torch.zeros(LAYOUT.size))
    for ask in (slots.gate, slots.read, slots.remove):
        with pytest.raises(DataError, match=r"user 'user-17x' has no slot; did you mean 'user-17\d?'\?"):
            ask(["user-3", "user-17x"])
    with pytest.raises(DataError, match="no slot; add the user") as wrong:
        slots.version("someone else")
    assert "user-" not in str(wrong.value)


def test_wrong_writes_change_nothing() -> None:
    slots = opened()
    version = slots.add(["a", "b"], filled(1, 2))
    for users, values, error in (
        (["a", "c"], filled(5, 6), DataError),
        (["a", "a"], filled(5, 6), DataError),
        (["a"], filled(5, 6), WrongUpdate),
        (["a", "b"], filled(5, float("nan")), WrongUpdate),
        (["a", "b"], filled(float("inf"), 5), WrongUpdate),
    ):
        with pytest.raises(error):
            slots.write(users, values)
    with pytest.raises(DataError, match="'b' has a slot already"):
        slots.add(["c", "b"], filled(7, 8))
    assert slots.names() == ("a", "b")
    assert torch.equal(slots.read(["b", "a"]).values, filled(2, 1))
    assert slots.version("a") == slots.version("b") == version


def test_a_slot_that_was_written_meanwhile_is_refused() -> None:
    slots = opened()
    slots.add(["a", "b"], filled(1, 2))
    before = slots.read(["a", "b"])
    slots.write(["b"], filled(3))
    with pytest.raises(DataError, match="user 'b' is at version 2, not 1"):
        slots.write(["a", "b"], before.values, versions=before.versions)
    assert torch.equal(slots.read(["a", "b"]).values, filled(1, 3))


def test_slots_of_another_layout_or_frame_are_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    other = Layout((Entry("B", "q", (3, 2)), Entry("B", "k", (2, 2))))
    for wrong in ({"layout": other}, {"frame": "0" * 64}):
        with pytest.raises(RunError, match="another model"):
            opened(tmp_path, **wrong)  # type: ignore[arg-type]
    opened(tmp_path).close()


def test_a_directory_is_open_once(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(RunError, match="open in another process"):
        opened(tmp_path)
    first.close()
    opened(tmp_path).close()


@pytest.mark.parametrize("name", [INDEX, NUMBERS])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    slots = opened(tmp_path)
    slots.add(["a"], filled(1)[0])
    slots.close()
    (tmp_path / name).write_bytes(b"" if name == NUMBERS else b"not an index at all" * 100)
    with pytest.raises(RunError, match="restore"):
        opened(tmp_path)


# --- Laws ------------------------------------------------------------------------------------------------------------

USERS = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=4, unique=True)
NUMBER = st.floats(-1e6, 1e6, width=32)


class SlotsAgainstADictionary(RuleBasedStateMachine):
    """Whatever is done in whatever order, the slots are those of a dictionary; versions only grow."""

    where: Path | None = None

    @initialize()
    def begin(self) -> None:
        self.slots = opened(self.where)
        self.known: dict[str, float] = {}
        self.seen: dict[str, set[int]] = {}

    @rule(users=USERS, number=NUMBER)
    def put(self, users: list[str], number: float) -> None:
        before = {user: self.slots.version(user) for user in self.known}
        new = [user for user in users if user not in self.known]
        old = [user for user in users if user in self.known]
        if new:
            self.slots.add(new, filled(number)[0])
        if old:
            self.slots.write(old, filled(*[number] * len(old)))
        self.known |= dict.fromkeys(users, number)
        for user in self.known:
            now = self.slots.version(user)
            assert (now > before[user]) if user in old else now == before.get(user, now)
            if user in users:
                assert now not in self.seen.setdefault(user, set()), "a version means one value for ever"
                self.seen[user].add(now)

    @rule(users=USERS)
    def drop(self, users: list[str]) -> None:
        gone = [user for user in users if user in self.known]
        self.slots.remove(gone)
        for user in gone:
            del self.known[user]

    @rule()
    def reopen(self) -> None:
        if self.where is not None:
            self.slots.close()
            self.slots = opened(self.where)

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "slots"):
            return
        users = sorted(self.known)
        assert self.slots.names() == tuple(users) and len(self.slots) == len(users)
        expected = filled(*(self.known[user] for user in users)) if users else torch.zeros(0, LAYOUT.size)
        assert torch.equal(self.slots.read(users).values, expected)
        assert torch.equal(self.slots.bank.mix(self.slots.gate(users)), expected)
        assert_cleared(self.slots)

    def teardown(self) -> None:
        if hasattr(self, "slots"):
            self.slots.close()


class TestInMemory(SlotsAgainstADictionary.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def test_slots_in_a_directory_do_as_a_dictionary_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    places: list[Path] = []

    class InADirectory(SlotsAgainstADictionary):
        def __init__(self) -> None:
            super().__init__()
            self.where = tmp_path_factory.mktemp("slots")
            places.append(self.where)

    # The machine's invariant compares names and numbers with a dictionary's after every step.
    run_state_machine_as_test(InADirectory, settings=settings(max_examples=5, stateful_step_count=12, deadline=None))
    assert places and all(any(place.iterdir()) for place in places)


@settings(max_examples=30)
@given(counts=st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_growth_doubles_and_moves_nobody(counts: list[int]) -> None:
    slots, users, rooms = opened(), 0, set()
    for count in counts:
        slots.add([f"u{users + i}" for i in range(count)], filled(*(float(users + i) for i in range(count))))
        users += count
        rooms.add(len(slots.bank.data))
    everyone = [f"u{number}" for number in range(users)]
    assert torch.equal(slots.read(everyone).values, filled(*map(float, range(users))))
    assert users <= max(rooms) <= max(64, 2 * users)
    assert len(rooms) <= 2 + max(0, users // 64).bit_length()


def test_the_disk_is_asked_for_all_slots_before_the_first_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = opened(tmp_path)
    slots.add(["a", "b", "c"], filled(1, 2, 3))
    asked, ask = [], os.posix_fadvise

    def listen(file: int, start: int, length: int, advice: int) -> None:
        asked.append((start // length, length, advice))
        ask(file, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", listen)
    found = slots.read(["c", "a"]).values
    assert torch.equal(found, filled(3, 1))
    rows = [place[0] for user in ("c", "a") if (place := slots.rows.find(user))]
    assert asked == [(row, 4 * LAYOUT.size, os.POSIX_FADV_WILLNEED) for row in rows]
    found.zero_()
    assert torch.equal(slots.read(["a"]).values, filled(1))


def test_nothing_of_a_removed_user_is_left_in_the_files(tmp_path: Path) -> None:
    slots = opened(tmp_path)
    secret = filled(0.1234567)
    slots.add(["keeper", "leaver"], torch.cat([filled(1), secret]))
    slots.write(["leaver"], filled(7.654321))
    slots.remove(["leaver"])
    assert not [file.name for file in tmp_path.iterdir() if b"leaver" in file.read_bytes()]
    for value in (0.1234567, 7.654321):
        number = torch.tensor([value]).numpy().tobytes()
        assert not [file.name for file in tmp_path.iterdir() if number in file.read_bytes()]
    slots.close()


# --- Kills -----------------------------------------------------------------------------------------------------------


def at_work(directory: Path, ready: int) -> None:
    """Write both users again and again, both with one number, and tell how far it came."""
    slots = opened(directory)
    number = float(slots.read(["a"]).values[0, 0])
    os.write(ready, b"r")
    while True:
        number += 1
        slots.write(["a", "b"], filled(number, number))
        slots.add(["c"], filled(number)[0])
        os.write(ready, b"w")
        slots.remove(["c"])


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_at_any_instant_leaves_the_old_or_the_new_state(tmp_path: Path, seed: int) -> None:
    first = opened(tmp_path)
    first.add(["a", "b", "still"], filled(0, 0, 42))
    first.close()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            at_work(tmp_path, writer)
        finally:
            os._exit(1)
    os.read(reader, 1)
    time.sleep(0.009 * (seed + 1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writer)
    done = len(os.read(reader, 1 << 16))
    os.close(reader)
    slots = opened(tmp_path)
    values = slots.read(["a", "b", "still"]).values
    assert torch.equal(values[0], values[1]), "half of a write is visible"
    assert values[0].unique().numel() == 1 and torch.equal(values[2], filled(42)[0])
    assert int(values[0, 0]) >= done, "a write that had returned is lost"
    assert_cleared(slots)
    slots.close()


def test_a_kill_between_any_two_statements_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    """Stop a write at each of its disk writes and commits in turn, as a kill would: nothing after it is done."""
    outcomes = [killed_at(tmp_path / str(call), call) for call in range(1, 32)]
    new = outcomes.index(2.0)
    assert 10 < new < 25 and set(outcomes[:new]) == {1.0} and set(outcomes[new:]) == {2.0}, outcomes


def killed_at(directory: Path, call: int) -> float:
    slots = opened(directory)
    slots.add(["a", "b"], filled(1, 1))
    child = os.fork()
    if child == 0:
        try:
            stop_at(slots, call)
            slots.write(["a", "b"], filled(2, 2))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    slots.close()
    again = opened(directory)
    values = again.read(["a", "b"]).values
    assert values.unique().numel() == 1, "half of a write is visible"
    assert_cleared(again)
    again.close()
    return float(values[0, 0])


def assert_cleared(slots: UserSlots) -> None:
    owned = set(slots.gate(slots.names()).index.tolist())  # type: ignore[union-attr]
    others = [row for row in range(len(slots.bank.data)) if row not in owned]
    assert not slots.bank.data[others].any(), "rows that nobody owns hold numbers"


def stop_at(slots: UserSlots, call: int) -> None:
    """Let this process die at its `call`-th statement or write of numbers."""
    left = [call]

    def count(*_: object) -> None:
        left[0] -= 1
        if left[0] <= 0:
            os._exit(0)

    slots.rows._index.set_trace_callback(count)
    write = slots.rows.numbers.write

    def counted(rows: list[int], values: Tensor) -> None:
        count()
        write(rows, values)
        count()

    slots.rows.numbers.write = counted  # type: ignore[method-assign, assignment]


def test_a_full_disk_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    slots = opened(tmp_path)
    slots.add(["a"], filled(1))

    def full(rows: list[int], values: Tensor) -> None:
        raise OSError(28, "No space left on device")

    slots.rows.numbers.write, write = full, slots.rows.numbers.write  # type: ignore[method-assign, assignment]
    with pytest.raises(RunError, match=r"No space left on device.*nothing has changed"):
        slots.write(["a"], filled(2))
    slots.rows.numbers.write = write  # type: ignore[method-assign]
    assert torch.equal(slots.read(["a"]).values, filled(1))
    slots.write(["a"], filled(3))
    assert torch.equal(slots.read(["a"]).values, filled(3))
    slots.close()
