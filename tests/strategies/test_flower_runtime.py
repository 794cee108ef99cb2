"""The contract with Flower's runtime: another version, or a function of another shape, fails here and not at a node."""

import inspect
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from typing import Any

import flwr.supernode.runtime.run_clientapp as clientapp
import flwr.supernode.start_client_internal as supernode
import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, SubStatus
from flwr.proto import runtime_pb2 as proto
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import http_grid
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.nodestate import NodeStateFactory

from lora.errors import ConfigError, FederationError
from strategies import flower_runtime
from strategies.flower import number, take_identity
from strategies.flower_runtime import (
    ARRIVAL_S,
    FIRST_LOOK_S,
    HEARTBEAT_S,
    Assignment,
    Link,
    Lost,
    Unreachable,
    forget_unfinished,
    quicken,
)

CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "connect": (
        RuntimeHttpClient.from_server_address,
        ("server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"),
    ),
    "claim": (RuntimeHttpClient.AcquireTask, ("self", "request")),
    "heartbeat": (RuntimeHttpClient.SendTaskHeartbeat, ("self", "request")),
    "token": (RuntimeTokenHttpInterceptor, ("token",)),
    "version": (RuntimeVersionHttpInterceptor, ("component_name",)),
    "secret": (SuperExecAuthHttpInterceptor, ("master_secret", "protected_methods")),
    "exponential": (exponential, ("base_delay", "multiplier", "max_delay")),
    "pull": (clientapp.pull_task_input, ("client",)),
    "push": (clientapp.push_message, ("client", "message", "context")),
    "output": (clientapp.push_task_output, ("client", "context", "sub_status", "details")),
    "supernode": (flower_supernode, ()),
}
FIELDS: dict[str, tuple[Any, set[str]]] = {
    "claim": (proto.AcquireTaskRequest, {"supported_task_types", "agentapp_fab_hashes"}),
    "claimed": (proto.AcquireTaskResponse, {"task", "token"}),
    "heartbeat": (proto.SendTaskHeartbeatRequest, set()),
    "alive": (proto.SendTaskHeartbeatResponse, {"success"}),
    "input": (proto.PullTaskInputResponse, {"context", "run", "fab", "task_id", "federation_config"}),
    "output": (proto.PushTaskOutputRequest, {"context", "sub_status", "details", "clientapp_runtime"}),
    "messages": (proto.PullAppMessagesResponse, {"messages_list", "message_object_trees"}),
}


# --- The contract ----------------------------------------------------------------------------------------------------


def test_the_flower_that_was_read_is_the_one_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version("flwr") == flower_runtime.FLOWER == "1.41.0"
    flower_runtime.check_flower()
    monkeypatch.setattr(flower_runtime, "version", lambda _: "1.42.0")
    with pytest.raises(ConfigError, match=r"flwr==1\.42\.0 is installed.*flwr==1\.41\.0"):
        Link("127.0.0.1:1")


@pytest.mark.parametrize("name", CALLS)
def test_functions_have_the_parameters_that_are_passed(name: str) -> None:
    function, parameters = CALLS[name]
    assert tuple(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize("name", FIELDS)
def test_messages_have_the_fields_that_are_read(name: str) -> None:
    message, fields = FIELDS[name]
    assert {field.name for field in message.DESCRIPTOR.fields} == fields


def test_a_retry_takes_its_limits_by_name() -> None:
    taken = inspect.signature(RetryInvoker).parameters
    assert {"max_tries", "max_time", "should_giveup", "wait_function"} < set(taken)
    assert list(taken)[:2] == ["wait_gen_factory", "recoverable_exceptions"]
    assert flower_runtime._patient().max_tries is None


def test_words_on_the_wire_are_the_same() -> None:
    assert (str(TaskType.CLIENT_APP), SubStatus.COMPLETED) == ("flwr-clientapp", "completed")


def test_a_heart_beats_often_enough_for_the_supernode() -> None:
    assert 3 * HEARTBEAT_S < HEARTBEAT_DEFAULT_INTERVAL <= HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE == 60


def test_the_supernode_s_loop_waits_where_it_was_found_to_wait() -> None:
    source = inspect.getsource(supernode)
    assert source.count("time.sleep(3)") == 1
    assert set(supernode.time.__dict__) >= {"sleep"}
    uses = {line.split("time.")[1].split("(")[0] for line in source.splitlines() if " time." in line and "(" in line}
    assert uses == {"sleep"}


def test_parts_of_a_message_are_looked_for_soon() -> None:
    assert http_grid.pull_objects is pull_objects
    assert clientapp.pull_and_inflate_object_from_tree is pull_and_inflate_object_from_tree
    quicken()
    for function in (pull_objects, pull_and_inflate_object_from_tree):
        assert inspect.signature(function).parameters["initial_backoff"].default == FIRST_LOOK_S
    assert inspect.signature(pull_and_inflate_object_from_tree).parameters["max_time"].default == ARRIVAL_S


def test_a_supernode_whose_loop_is_over_ends_as_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    for name in ("_pull_and_store_message", "time"):
        monkeypatch.setattr(supernode, name, getattr(supernode, name))  # To be put back as it was.
    monkeypatch.setattr(flower_runtime, "flower_supernode", lambda: None)
    monkeypatch.setattr(flower_runtime, "flwr_exit", lambda code, message: codes.append(code))
    flower_runtime.run_supernode(pause=1)
    assert len(codes) == 1 and codes[0] >= 100  # Flower makes exit code 1 of these.


def test_a_supernode_forgets_a_message_that_never_came_whole() -> None:
    assert tuple(inspect.signature(supernode._pull_and_store_message).parameters)[:2] == ("state", "object_store")
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=3, fab_hash="f")
    take_identity()
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    number(message)
    state.store_message(message)
    forget_unfinished(state)
    assert state.claim_task(task) is None
    assert list(state.get_messages_legacy(is_reply=False)) == []
    state.store_message(message)
    forget_unfinished(state)
    assert len(state.get_messages_legacy(is_reply=False)) == 1


# --- The link --------------------------------------------------------------------------------------------------------


class Runtime(HTTPServer):
    """A SuperNode's runtime that gives the answers a test writes down: status and body by path."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        runtime = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                path = self.path.rpartition("/")[2]
                runtime.asked.append((path, {key.lower(): value for key, value in self.headers.items()}))
                status, body = runtime.answers.get(path, (404, b""))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.send_header("content-type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    server = Runtime()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def claimed(runtime: Runtime) -> Assignment:
    answer = proto.AcquireTaskResponse(token="t0ken")
    answer.task.task_id = 7
    runtime.answers["acquire-task"] = (200, answer.SerializeToString())
    assignment = Link(runtime.address, secret=b"secret").claim()
    assert assignment is not None
    return assignment


def test_nothing_waiting_is_nothing_claimed(runtime: Runtime) -> None:
    runtime.answers["acquire-task"] = (200, b"")
    assert Link(runtime.address).claim() is None


def test_a_claim_is_signed_and_what_follows_carries_its_token(runtime: Runtime) -> None:
    alive = proto.SendTaskHeartbeatResponse(success=True)
    runtime.answers["send-task-heartbeat"] = (200, alive.SerializeToString())
    with claimed(runtime) as assignment:
        while len(runtime.asked) < 2:
            threading.Event().wait(0.01)
    (_, claim), (path, beat) = runtime.asked[:2]
    assert any("superexec" in name for name in claim)
    assert path == "send-task-heartbeat"
    assert "t0ken" in beat.values() and "t0ken" not in claim.values()
    assert not assignment.lost


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_secret_is_an_error_that_says_so(runtime: Runtime, status: int) -> None:
    runtime.answers["acquire-task"] = (status, b"")
    with pytest.raises(FederationError, match="does not accept the executor's secret"):
        Link(runtime.address, secret=b"other").claim()


def test_a_supernode_that_is_away_is_unreachable(runtime: Runtime) -> None:
    runtime.answers["acquire-task"] = (503, b"")
    with pytest.raises(Unreachable, match="503"):
        Link(runtime.address).claim()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="ConnectError"):
            Link(f"127.0.0.1:{closed.getsockname()[1]}").claim()


@pytest.mark.parametrize("beat", [(401, b""), (200, b"")])
def test_a_message_that_was_taken_away_is_lost(runtime: Runtime, beat: tuple[int, bytes]) -> None:
    runtime.answers["send-task-heartbeat"] = beat
    runtime.answers["pull-task-input"] = (401, b"")
    with claimed(runtime) as assignment, pytest.raises(Lost, match="HTTPStatusError"):
        assignment.receive()
    assert assignment.lost


def test_a_last_word_does_not_wait_for_a_supernode_that_is_away(runtime: Runtime) -> None:
    runtime.answers["pull-task-input"] = (503, b"")
    with claimed(runtime) as assignment:
        assignment.hurry()
        with pytest.raises(Lost):
            assignment.receive()
    assert sum(path == "pull-task-input" for path, _ in runtime.asked) == 1
