"""The resident executor: one long-lived process at a node that handles its SuperNode's messages.

    python -m client.executor --runtime 127.0.0.1:9094 --secret executor.secret --config node.toml

It runs the ClientApp that is installed here. The bundle that a coordinator ships is left alone, because whoever may
submit a run must not thereby run code on a node. Base model, tokenizer and data stay in memory between messages.
"""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import build
from client.node import NodeSettings, read_node
from lora.errors import ConfigError, LetheError
from strategies.federated.wire import Declined, refusal
from strategies.flower_runtime import Assignment, Link, Lost, Unreachable
from strategies.observe.watch import watched_node

log = logging.getLogger("lethe.executor")

POLL_S, IDLE_POLL_S = 0.2, 1.0
"""Seconds between looks for a message: shortly after one, and when there was none for IDLE_AFTER_S."""
IDLE_AFTER_S = 60.0
LONGEST_BACK_OFF_S = 10.0
USER_ERROR = 2


class Stopped(SystemExit):
    """The process was told to end. No handler of exceptions on the way may keep it."""


class Executor:
    """Claims messages one by one and answers each through the ClientApp.

    | case | what happens |
    |---|---|
    | SuperNode away or restarting | tried again, every 10 s at most; a message in hand then is dropped |
    | SuperNode refuses the secret | FederationError: the process ends, and says why |
    | SIGTERM, idle | the process ends at once |
    | SIGTERM, training | the message is answered with a refusal, then the process ends; charges stay |
    | a message whose time is over | refused, so that no privacy is spent on an answer that nobody waits for |
    | the ClientApp raises | the reply names the type of the error, the node's own log has the rest |
    """

    def __init__(self, link: Link, app: ClientApp) -> None:
        self.link, self.app = link, app

    def serve(self) -> None:
        """Handle messages until the process is told to end. Raises Stopped, FederationError."""
        wait, heard = POLL_S, time.monotonic()
        while True:
            try:
                assignment = self.link.claim()
            except Unreachable as error:
                wait = min(2 * wait, LONGEST_BACK_OFF_S)
                log.warning(
                    "the SuperNode at %s does not answer (%s); next try in %g s", self.link.address, str(error), wait
                )
                time.sleep(wait)
                continue
            if assignment is not None:
                self.handle(assignment)
                heard = time.monotonic()
                continue
            wait = POLL_S if time.monotonic() - heard < IDLE_AFTER_S else IDLE_POLL_S
            time.sleep(wait)

    def handle(self, assignment: Assignment) -> None:
        """Answer one message; one that got lost on the way is given up, and the next may come."""
        with assignment:
            try:
                message, context = assignment.receive()
                reply = self._reply(assignment, message, context)
                assignment.answer(reply, context)
            except Lost as error:
                log.warning("a message was lost (%s): the SuperNode restarted, or its run ended", str(error))

    def _reply(self, assignment: Assignment, message: Message, context: Context) -> Message:
        if message.metadata.created_at + message.metadata.ttl < time.time():
            log.warning("a message came too late to be of use to anybody, and is not acted on")
            return refusal(Declined("the message came too late"), message)
        try:
            return self.app(message, context)
        except Stopped:
            assignment.hurry()
            assignment.answer(refusal(Declined("the node is shutting down"), message), context)
            raise
        except Exception as error:  # Such as a kind of message that the app does not know.
            log.exception("a message could not be handled")
            return refusal(error, message)


def run(settings: NodeSettings, *, runtime: str, secret: Path | None = None, authority: Path | None = None) -> None:
    """Handle the messages of the SuperNode at `runtime` until SIGTERM or SIGINT.

    `secret` is the file that the SuperNode was given as --superexec-auth-secret-file; `authority` is the certificate
    authority of a SuperNode that serves TLS. Raises ConfigError for files that cannot be read, FederationError where
    the SuperNode does not accept the secret.
    """
    link = Link(runtime, secret=_bytes(secret), authority=_bytes(authority))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    watched = watched_node(
        node=settings.name,
        federation=settings.federation,
        port=settings.metrics_port,
        form="json",
        file=settings.log,
    )
    try:
        with watched:
            _serve(Executor(link, build(settings=settings)), settings.name)
    finally:
        link.close()


def _serve(executor: Executor, name: str) -> None:
    log.info("node '%s' takes messages from %s", name, executor.link.address)
    try:
        executor.serve()
    except Stopped:
        log.info("node '%s' stops", name)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(0)


def _bytes(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    if not content:
        raise ConfigError(f"{path} is empty; it must hold the secret that the SuperNode has, or a certificate")
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the executor from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m client.executor", description="The resident executor of a node.")
    parser.add_argument("--runtime", required=True, metavar="ADDRESS", help="HOST:PORT of the SuperNode")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the node's settings, node.toml")
    parser.add_argument("--secret", type=Path, metavar="FILE", help="the secret shared with the SuperNode")
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="CA of a SuperNode that serves TLS")
    given = parser.parse_args(arguments)
    try:
        run(read_node(given.config), runtime=given.runtime, secret=given.secret, authority=given.root_certificates)
    except LetheError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
