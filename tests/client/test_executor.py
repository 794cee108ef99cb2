"""The executor's loop over a link that a test plays: what is answered, what is dropped, and how it ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

import client.executor
from client.executor import Executor, Stopped, main
from lora.errors import FederationError
from strategies.federated.wire import DECLINED, INTERNAL
from strategies.flower import number, take_identity
from strategies.flower_runtime import Lost, Unreachable

SECRET = "the patient in bed 4 has measles"
Step = Any


class Played:
    """An assignment of one message; remembers the reply."""

    def __init__(self, *, lost: bool = False, ttl: float | None = None) -> None:
        take_identity()
        self.message = Message(RecordDict(), dst_node_id=1, message_type="train", ttl=ttl)
        number(self.message)
        self.lost, self.replies, self.open, self.hurried = lost, list[Message](), 0, False

    def __enter__(self) -> "Played":
        self.open += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.open -= 1

    def receive(self) -> tuple[Message, Context]:
        return self.message, Context(1, 1, {}, RecordDict(), {})

    def answer(self, reply: Message, context: Context) -> None:
        if self.lost:
            raise Lost("HTTPStatusError")
        self.replies.append(reply)

    def hurry(self) -> None:
        self.hurried = True


class Script:
    """A link that gives what a test writes down, one after the other, and then stops the executor."""

    address = "127.0.0.1:9"

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)

    def claim(self) -> Any:
        step = self.steps.pop(0) if self.steps else Stopped(0)
        if isinstance(step, BaseException):
            raise step
        return step


def echo(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


def serve(app: Callable[..., Message], *steps: Step) -> None:
    executor = Executor(Script(*steps), app)  # type: ignore[arg-type]
    with pytest.raises(Stopped):
        executor.serve()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(client.executor.time, "sleep", taken.append)
    return taken


def test_messages_are_answered_one_after_the_other(naps: list[float]) -> None:
    first, second = Played(), Played()
    serve(echo, first, None, second)
    assert [len(each.replies) for each in (first, second)] == [1, 1]
    assert first.open == second.open == 0
    assert naps == [client.executor.POLL_S]


def test_a_supernode_that_is_away_is_tried_again_ever_more_slowly(naps: list[float]) -> None:
    message = Played()
    serve(echo, *[Unreachable("ConnectError") for _ in range(8)], message, Unreachable("x"), None)
    assert naps[:8] == sorted(naps[:8])
    assert max(naps) == client.executor.LONGEST_BACK_OFF_S
    assert naps[-1] == client.executor.POLL_S
    assert len(message.replies) == 1


def test_a_lost_message_is_dropped_and_the_next_one_comes(naps: list[float]) -> None:
    lost, kept = Played(lost=True), Played()
    serve(echo, lost, kept)
    assert (len(lost.replies), len(kept.replies)) == (0, 1)


def test_no_text_of_an_exception_leaves_the_node(naps: list[float]) -> None:
    def fails(message: Message, context: Context) -> Message:
        raise ValueError(SECRET)

    message = Played()
    serve(fails, message)
    (reply,) = message.replies
    assert reply.error.code == INTERNAL
    assert reply.error.reason == "ValueError; the client's own log has the details"


def test_a_message_in_hand_is_refused_when_the_process_is_told_to_end(naps: list[float]) -> None:
    def stopped(message: Message, context: Context) -> Message:
        raise Stopped(0)

    message = Played()
    serve(stopped, message, Played())
    (reply,) = message.replies
    assert (reply.error.code, reply.error.reason) == (DECLINED, "the node is shutting down")
    assert message.hurried


def test_a_message_whose_time_is_over_is_not_acted_on(naps: list[float]) -> None:
    late, timely, acted = Played(ttl=1e-6), Played(ttl=60.0), list[Message]()

    def app(message: Message, context: Context) -> Message:
        acted.append(message)
        return echo(message, context)

    serve(app, late, timely)
    assert acted == [timely.message]
    assert late.replies[0].error.reason == "the message came too late"


def test_a_refused_secret_ends_the_process(naps: list[float]) -> None:
    executor = Executor(Script(FederationError("no")), echo)  # type: ignore[arg-type]
    with pytest.raises(FederationError):
        executor.serve()


def test_wrong_files_are_told_and_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = tmp_path / "node.toml"
    node.write_text('name = "a"\n')
    assert main(["--runtime", "127.0.0.1:9", "--config", str(tmp_path / "absent.toml")]) == 2
    assert main(["--runtime", "127.0.0.1:9", "--config", str(node), "--secret", str(tmp_path / "absent")]) == 2
    (tmp_path / "empty").touch()
    assert main(["--runtime", "127.0.0.1:9", "--config", str(node), "--secret", str(tmp_path / "empty")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert ["cannot be read" in line for line in told] == [True, True, False]
    assert "is empty" in told[2]
