"""Who is there: greetings, silent nodes, and clients that come back under another id."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

import server.roster
from lora.errors import FederationError
from server.roster import Roster, exchange
from simulation.grid import SequentialGrid
from strategies.federated.wire import METRICS, REPORT, WEIGHT
from strategies.flower import number, take_identity

Answer = Callable[[Message], list[Message]]


class Nodes(SequentialGrid):
    """Nodes of whom a test says what each answers: any number of replies, late or never."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        take_identity()
        self.answers, self.sent = answers, list[int]()
        self.waiting: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        ids = [number(message) for message in batch]
        for message in batch:
            node = message.metadata.dst_node_id
            self.sent.append(node)
            self.waiting += self.answers[node](message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out everything there is, asked for or not, as a hostile link would."""
        found, self.waiting = self.waiting, []
        return found


def says(client: str, *, examples: int = 5) -> Answer:
    content = RecordDict(
        {METRICS: MetricRecord({WEIGHT: examples}), REPORT: ConfigRecord({"client": client, "frame": "f"})}
    )
    return lambda message: [Message(content, reply_to=message)]


def fails(message: Message) -> list[Message]:
    return [Message(Error(100, "ValueError; see the log"), reply_to=message)]


def mute(message: Message) -> list[Message]:
    return []


def orders(nodes: Sequence[int]) -> list[Message]:
    content = RecordDict({"config": ConfigRecord({})})
    return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


# --- exchange --------------------------------------------------------------------------------------------------------


def test_replies_are_matched_to_their_messages() -> None:
    grid = Nodes({1: says("a"), 2: fails, 3: says("c")})
    ids, replies = exchange(grid, orders([3, 1, 2]), timeout=1)
    assert sorted(ids.values()) == [0, 1, 2]
    found = {ids[reply.metadata.reply_to_message_id]: reply for reply in replies}
    assert found[2].has_error()
    assert found[0].content[REPORT]["client"] == "c"


def test_a_second_reply_to_the_same_message_is_dropped() -> None:
    def twice(message: Message) -> list[Message]:
        return [*says("first")(message), *says("second")(message), *fails(message)]

    _, replies = exchange(Nodes({1: twice, 2: says("b")}), orders([1, 2]), timeout=1)
    assert [reply.content[REPORT]["client"] for reply in replies] == ["first", "b"]


def test_a_replay_of_an_earlier_reply_is_dropped() -> None:
    grid = Nodes({1: says("old")})
    _, earlier = exchange(grid, orders([1]), timeout=1)
    grid.answers[1] = lambda message: [*earlier, *says("new")(message), *earlier]
    _, replies = exchange(grid, orders([1]), timeout=1)
    assert [reply.content[REPORT]["client"] for reply in replies] == ["new"]


def test_what_is_missing_when_the_time_is_up_is_left_out() -> None:
    began = time.monotonic()
    _, replies = exchange(Nodes({1: says("a"), 2: mute}), orders([1, 2]), timeout=0.2)
    assert [reply.content[REPORT]["client"] for reply in replies] == ["a"]
    assert 0.2 <= time.monotonic() - began < 2


def test_no_messages_are_no_wait() -> None:
    assert exchange(Nodes({}), [], timeout=60) == ({}, [])


# --- Roster ----------------------------------------------------------------------------------------------------------


def greeted(grid: Nodes, roster: Roster | None = None) -> Roster:
    roster = roster or Roster()
    roster.refresh(grid, timeout=0.05)
    return roster


def test_every_node_is_greeted_once() -> None:
    grid = Nodes({11: says("0", examples=7), 12: says("1")})
    roster = greeted(grid)
    assert roster.names == {11: "0", 12: "1"}
    assert (roster.members["0"].examples, roster.members["0"].node) == (7, 11)
    grid.answers[13] = says("2")
    greeted(grid, roster)
    assert grid.sent == [11, 12, 13]
    assert roster.names == {11: "0", 12: "1", 13: "2"}


def test_a_node_that_left_is_forgotten_and_greeted_when_it_is_back() -> None:
    grid = Nodes({11: says("0"), 12: says("1")})
    roster = greeted(grid)
    answer = grid.answers.pop(12)
    assert greeted(grid, roster).names == {11: "0"}
    grid.answers[12] = answer
    assert greeted(grid, roster).names == {11: "0", 12: "1"}


def test_a_client_under_a_new_node_id_takes_its_old_place() -> None:
    grid = Nodes({11: says("0"), 12: says("1")})
    roster = greeted(grid)
    del grid.answers[12]
    grid.answers[99] = says("1")
    assert greeted(grid, roster).names == {11: "0", 99: "1"}
    assert roster.members["1"].node == 99


def test_an_old_node_that_lingers_does_not_take_the_place_back() -> None:
    """A dead node is listed for up to a minute; greeting it again would cost the whole timeout in every round."""
    grid = Nodes({11: says("0"), 12: says("0")})
    roster = greeted(grid)
    assert roster.names == {12: "0"}
    assert "answers from another node" in roster.silent[11]
    for _ in range(3):
        assert greeted(grid, roster).names == {12: "0"}
    assert grid.sent == [11, 12]
    del grid.answers[12]
    assert greeted(grid, roster).names == {11: "0"}
    assert roster.silent == {}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({METRICS: MetricRecord({}), REPORT: ConfigRecord({"client": "1", "frame": "f"})}),
        RecordDict({METRICS: MetricRecord({WEIGHT: [1, 2]}), REPORT: ConfigRecord({"client": "1", "frame": "f"})}),
        RecordDict({METRICS: MetricRecord({WEIGHT: 3}), REPORT: ConfigRecord({})}),
        RecordDict({METRICS: ConfigRecord({WEIGHT: "many"}), REPORT: ConfigRecord({"client": "1", "frame": "f"})}),
    ],
)
def test_a_malformed_greeting_silences_one_node_and_ends_nothing(content: RecordDict) -> None:
    def odd(message: Message) -> list[Message]:
        return [Message(content, reply_to=message)]

    roster = greeted(Nodes({11: odd, 12: says("1"), 13: fails, 14: mute}))
    assert roster.names == {12: "1"}
    assert "malformed" in roster.silent[11]
    assert roster.silent[13].startswith("ValueError")
    assert "no answer" in roster.silent[14]


def test_waiting_ends_when_enough_clients_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Nodes({11: says("0")})

    def arrive(_: float) -> None:
        grid.answers[10 + len(grid.answers) + 1] = says(str(len(grid.answers)))

    monkeypatch.setattr(time, "sleep", arrive)
    roster = Roster()
    roster.await_clients(grid, wanted=3, timeout=60)
    assert sorted(roster.names.values()) == ["0", "1", "2"]


def test_too_few_clients_are_an_error_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep: Any = time.sleep
    monkeypatch.setattr(time, "sleep", lambda _: sleep(0.01))
    with pytest.raises(FederationError, match=r"1 clients are connected.*min_clients=2.*ValueError; see the log"):
        Roster().await_clients(Nodes({11: says("0"), 12: fails}), wanted=2, timeout=0.1)


# --- Greetings that take their time ----------------------------------------------------------------------------------


class Later(Nodes):
    """Nodes whose greeting is answered only when a test says so."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        super().__init__(answers)
        self.open = False

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(message_ids) if self.open else []


def test_a_slow_node_is_greeted_once_and_seated_by_a_later_look() -> None:
    grid, roster = Later({11: says("0")}), Roster()
    for _ in range(3):
        roster.refresh(grid, timeout=60, patience=0)
    assert (grid.sent, roster.names) == ([11], {})
    grid.open = True
    roster.refresh(grid, timeout=60, patience=0)
    assert (grid.sent, roster.names) == ([11], {11: "0"})


def test_a_round_does_not_wait_for_a_slow_node_but_the_start_does(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, roster = Later({11: says("0")}), Roster()
    grid.open = True
    roster.refresh(grid, timeout=60)
    grid.open = False
    grid.answers[12] = says("1")
    roster.await_clients(grid, wanted=1, timeout=60, settle=False)
    assert roster.names == {11: "0"}
    sleep: Any = time.sleep

    def open_now(_: float) -> None:
        grid.open = True
        sleep(0.001)

    monkeypatch.setattr(time, "sleep", open_now)
    roster.await_clients(grid, wanted=1, timeout=60)
    assert roster.names == {11: "0", 12: "1"}


def test_a_node_that_fails_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Nodes({11: fails})
    roster = greeted(grid)
    greeted(grid, roster)
    assert grid.sent == [11]
    later = time.monotonic() + server.roster.AGAIN_S
    monkeypatch.setattr(server.roster.time, "monotonic", lambda: later)
    grid.answers[11] = says("0")
    roster.refresh(grid, timeout=0, patience=0)
    assert (grid.sent, roster.names, roster.silent) == ([11, 11], {11: "0"}, {})


def test_a_greeting_that_cannot_be_sent_says_so() -> None:
    class Closed(Nodes):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return ["" for _ in messages]

    roster = greeted(Closed({11: says("0")}))
    assert roster.silent == {11: "the greeting could not be sent"}


def test_an_order_that_cannot_be_sent_has_no_id() -> None:
    class HalfClosed(Nodes):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            _, second = messages
            return ["", *super().push_messages([second])]

    ids, replies = exchange(HalfClosed({1: says("a"), 2: says("b")}), orders([1, 2]), timeout=1)
    assert list(ids.values()) == [1]
    assert [reply.content[REPORT]["client"] for reply in replies] == ["b"]


def test_who_waits_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lethe.server")
    monkeypatch.setattr(server.roster, "PROGRESS_S", 0.0)
    sleep: Any = time.sleep
    monkeypatch.setattr(time, "sleep", lambda _: sleep(0.01))
    heard: list[int] = []
    with pytest.raises(FederationError):
        Roster().await_clients(Later({11: mute}), wanted=2, timeout=0.1, tell=heard.append)
    assert set(heard) == {0}
    assert "0 clients are here, 2 are needed; node 11 has not answered the greeting yet" in caplog.text


def test_a_greeting_names_the_operator_s_node() -> None:
    report = ConfigRecord({"client": "0", "node": "ward-3", "frame": "f"})
    content = RecordDict({METRICS: MetricRecord({WEIGHT: 3}), REPORT: report})
    roster = greeted(Nodes({11: lambda message: [Message(content, reply_to=message)], 12: says("1")}))
    assert [roster.members[name].label for name in ("0", "1")] == ["ward-3", "1"]
