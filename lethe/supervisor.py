"""Children that run together: started in order, started again when they die, stopped together."""

import ctypes
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lethe.credentials import make_folder
from lethe.processes import Command
from lora.errors import DeploymentError

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds before a child that died is started again; doubled with every further death. A SuperNode that died is refused
for up to a minute under its key, so a node has to try on."""
SETTLED = 60.0
"""Seconds after which a child counts as healthy, and its next death as its first."""
PATIENCE = 20.0
"""Seconds that children have to stop by themselves."""
_TICK = 0.2
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

Say = Callable[[str], None]


@dataclass
class Child:
    """A process to keep running, and what has to be done once it is up for the first time."""

    command: Command
    ready: Callable[[], bool] | None = None
    """Whether those after it may start; asked until it is true."""
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    wait: float = FIRST_WAIT
    due: float = 0.0
    """When to start it, by the monotonic clock."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def start(self, say: Say) -> None:
        """Start it, in a process group of its own. Raises DeploymentError for a program that is not installed."""
        say(f"{self.command.name}: {self.command.shown()}")
        try:
            self.process = subprocess.Popen(
                self.command.argv,
                env=self.command.environment(),
                stdin=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
            )
        except OSError as error:
            raise DeploymentError(
                f"{self.command.argv[0]} cannot be started ({error.strerror}); "
                f"{_remedies.get(self.command.argv[0], 'install lethe and its dependencies on this host')}"
            ) from None
        self.began = time.monotonic()

    def tend(self, say: Say) -> None:
        """Start it when it is due, and plan its next start when it has died."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.due:
                self.start(say)
        elif self.process.poll() is not None:
            self.wait = FIRST_WAIT if now - self.began > SETTLED else self.wait
            say(f"{self.command.name}: {_ending(self.process.returncode)}; starts again in {self.wait:.0f} s")
            self.clear()
            self.due, self.wait = now + self.wait, min(2 * self.wait, LONGEST_WAIT)

    def clear(self) -> None:
        """Kill what is left of its process group."""
        if self.process is not None:
            _signal_group(self.process, signal.SIGKILL)
            self.process.wait()
        self.process = None


_remedies = {"nginx": "install nginx (Debian: apt-get install nginx-light), or let a proxy of your own use proxy.conf"}


def supervise(children: Sequence[Child], *, say: Say) -> None:
    """Keep the children running until this process is told to stop (SIGTERM, SIGINT, SIGHUP), then stop them all.

    A child is started once those before it are ready. Raises DeploymentError for a program that is not installed.
    """
    with _stop_signals() as stopped:
        try:
            while not stopped():
                _tend_all(children, say)
                time.sleep(_TICK)
        finally:
            _stop_all(children, say)


def _tend_all(children: Sequence[Child], say: Say) -> None:
    for child in children:
        child.tend(say)
        if child.ready is not None:
            if not (child.alive and child.ready()):
                return
            child.ready = None


def _stop_all(children: Sequence[Child], say: Say) -> None:
    """Ask the last that was started first, and kill whoever has not stopped in time."""
    living = [child for child in children if child.alive]
    if living:
        say(f"stopping {', '.join(child.command.name for child in reversed(living))}")
    for child in reversed(living):
        if child.process is not None:
            _signal_group(child.process, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    while any(child.alive for child in living) and time.monotonic() < end:
        time.sleep(_TICK)
    for child in children:
        child.clear()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _die_with_parent() -> None:
    """Let the kernel stop a child whose supervisor was killed; elsewhere than on Linux there is no such thing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Note signals to stop while the block runs; yields whether one has come."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield lambda: bool(came)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def only_one(folder: Path, *, what: str) -> Iterator[None]:
    """Hold a folder's lock while the block runs. Raises DeploymentError while another process holds it."""
    make_folder(folder)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            raise DeploymentError(
                f"{what} runs already (process {file.read().strip() or '?'}); stop it first"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
