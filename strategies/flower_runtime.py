"""Flower's runtime as a resident executor speaks it: claim a message, receive it, answer it; written against 1.41.0.

Flower would start a new process for every message, which would load the base model each time. A process of ours that
stays does what that process does, over the same calls; whatever it needs of Flower's internals is in this module, and
`check_flower` says at the start when another Flower is installed.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.common.constant import Status, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.exit import ExitCode, flwr_exit
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.nodestate import NodeState
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from lora.errors import ConfigError, FederationError

log = logging.getLogger("lethe.runtime")

FLOWER = "1.41.0"
COMPONENT = "lethe-executor"
HEARTBEAT_S = 8.0
"""Seconds between signs of life; the SuperNode gives a message up after 60 without one (30 for the first)."""
PATIENCE_S = 90.0
"""Seconds for which a call is repeated while the SuperNode is away; a message outlives no restart of it anyway."""
FIRST_LOOK_S = 0.1
ARRIVAL_S = 120.0
"""Seconds that an executor waits for the parts of a message that its SuperNode is still receiving."""
_BUSY = frozenset({httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT})
_PROTECTED = frozenset({"/flwr.proto.Runtime/AcquireTask"})


class Unreachable(Exception):
    """The SuperNode does not answer now."""


class Lost(Exception):
    """The message was taken away: its SuperNode restarted, or its run ended."""


class Link:
    """The way to one SuperNode: its address, its certificate authority (None: plaintext), and the shared secret."""

    def __init__(self, address: str, *, secret: bytes | None = None, authority: bytes | None = None) -> None:
        check_flower()
        quicken()
        self.address, self.authority = address, authority
        auth = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_PROTECTED)] if secret else []
        self._client = self._connect(auth)

    def claim(self) -> "Assignment | None":
        """Take on the oldest waiting message; None where none waits.

        Raises Unreachable while the SuperNode is away, FederationError where it does not accept the secret.
        """
        try:
            answer = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[str(TaskType.CLIENT_APP)]))
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                raise FederationError(
                    f"the SuperNode at {self.address} does not accept the executor's secret; give both the same file"
                ) from error
            raise Unreachable(f"HTTP {error.response.status_code}") from error
        except httpx.TransportError as error:
            raise Unreachable(type(error).__name__) from error
        if not answer.HasField("task") or not answer.token:
            return None
        patient, token = _patient(), [RuntimeTokenHttpInterceptor(answer.token)]
        return Assignment(self._connect(token, retry=patient), pulse=self._connect(token), patient=patient)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _connect(self, interceptors: Sequence[Any], *, retry: RetryInvoker | None = None) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            self.address,
            self.authority is None,
            self.authority,
            [RuntimeVersionHttpInterceptor(COMPONENT), *interceptors],
            retry_invoker=retry,
        )


class Assignment:
    """One message that this process has taken on; `with assignment:` keeps it alive until it is answered."""

    def __init__(self, client: RuntimeHttpClient, *, pulse: RuntimeHttpClient, patient: RetryInvoker) -> None:
        self._client, self._pulse, self._patient = client, pulse, patient
        self._done = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self.lost = False
        """True once the SuperNode has said that it no longer waits for this message."""

    def __enter__(self) -> "Assignment":
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._heart.join()
        self._client.close()
        self._pulse.close()

    def receive(self) -> tuple[Message, Context]:
        """Return the message and the node's context. The app bundle that comes along is left alone. Raises Lost."""
        with _lost():
            message, context, _, _ = pull_task_input(self._client)
        return message, context

    def answer(self, reply: Message, context: Context) -> None:
        """Hand the reply to the SuperNode. Raises Lost where nobody waits for it any more."""
        with _lost():
            push_message(self._client, reply, context)
            push_task_output(self._client, None, SubStatus.COMPLETED, "")

    def hurry(self) -> None:
        """Give up waiting for a SuperNode that is away: the process is about to end."""
        self._patient.max_tries = 1

    def _beat(self) -> None:
        while True:
            try:
                self.lost |= not self._pulse.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
            except httpx.HTTPStatusError:
                self.lost = True
            except Exception as error:  # A heart that stops for an odd error would cost the whole message.
                log.debug("a heartbeat failed: %s", type(error).__name__)
            if self.lost or self._done.wait(HEARTBEAT_S):
                return


def quicken() -> None:
    """Look for the parts of a message every 0.1 s at first, where Flower waits a whole second, and not for two hours.

    A message is announced before its parts have been uploaded, so whoever looks soon waits in nearly every round; and
    of a server that died meanwhile they never come.
    """
    for function in (pull_objects, pull_and_inflate_object_from_tree):
        defaults = function.__kwdefaults__
        if defaults is None or "initial_backoff" not in defaults:
            raise ConfigError(f"{function.__name__} of this flwr waits in another way; use flwr=={FLOWER}")
        defaults["initial_backoff"] = FIRST_LOOK_S
    (pull_and_inflate_object_from_tree.__kwdefaults__ or {})["max_time"] = ARRIVAL_S


def run_supernode(*, pause: float) -> None:
    """Run Flower's own SuperNode on this process's arguments, looking for messages every `pause` seconds, not 3.

    It also forgets a message whose parts never came, because the server died while it was sending: Flower's would offer
    it to the executor for ever, ahead of all others.
    """
    check_flower()
    quicken()
    receive = loop._pull_and_store_message

    def received(state: NodeState, **rest: Any) -> int | None:
        run: int | None = receive(state=state, **rest)
        if run is None:
            forget_unfinished(state)
        return run

    vars(loop)["_pull_and_store_message"] = received
    vars(loop)["time"] = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, pause)))
    flower_supernode()
    # Flower's loop ends at an answer such as HTTP 500 and leaves its own server up: a process that lives, and works no
    # more. Whoever watches it starts another only when it has ended.
    flwr_exit(ExitCode.SUPERNODE_CONNECTION_ERROR, "The SuperLink could not serve this node, which must start again.")


def forget_unfinished(state: NodeState) -> None:
    """Drop the messages of a SuperNode that has nothing to do: it handles one at a time, and this one is over."""
    tasks = state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING])
    for task in tasks:
        state.finish_task(task.task_id, SubStatus.FAILED, "the message did not arrive whole")
    if tasks:
        log.warning("a message did not arrive whole, and is dropped")
        state.delete_messages()


def check_flower() -> None:
    """Raise ConfigError where another Flower is installed than the one that this module was written against."""
    found = version("flwr")
    if found != FLOWER:
        raise ConfigError(f"flwr=={found} is installed; this release works with flwr=={FLOWER}: pip install that")


def passing(error: Exception) -> bool:
    """Whether a call that failed may succeed when it is repeated: the other side was away, or its database was busy."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
    return isinstance(error, httpx.TransportError)


def _patient() -> RetryInvoker:
    """Repeat a call for a while when the SuperNode is away; an answer that refuses it is final."""
    return RetryInvoker(
        lambda: exponential(base_delay=0.2, max_delay=5),
        (httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=PATIENCE_S,
        should_giveup=_final,
        wait_function=time.sleep,
    )


def _final(error: Exception) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _BUSY


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Refused, expired, half delivered: whatever it was, this message cannot be saved.
        raise Lost(type(error).__name__) from error
