"""The engine: one thread that answers what waits, in batches of many users."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lora.errors import LetheError, ServiceError, Unavailable
from server.service.queue import FairQueue, Work

log = logging.getLogger("lethe.service")

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Limits:
    """When a batch closes, and how much may wait."""

    rows: int = 32
    """Most rows of a batch."""
    wait: float = 0.003
    """Seconds that the oldest request waits for others to join its batch."""
    waiting: int = 1024
    """Requests that may wait; beyond them a request is refused as busy."""
    waiting_of_one: int = 64
    """Requests of one user that may wait."""


class Worker(Protocol[Asked]):
    """What an engine's thread drives: takes work in, and brings it on step by step."""

    @property
    def running(self) -> int:
        """Rows that are being worked on after a step."""
        ...

    def step(self, new: Sequence[Work[Asked]]) -> None:
        """Take new work in and bring all of it on by a step; answers go to the works themselves."""
        ...

    def give_up(self, error: BaseException) -> None:
        """End what is being worked on with an error."""
        ...


class Batches(Generic[Asked]):
    """A worker whose work is done in one step: a function from requests to answers, or errors in place of them."""

    def __init__(self, answer: Callable[[Sequence[Asked]], Sequence[object]]) -> None:
        self._answer = answer
        self.running = 0

    def step(self, new: Sequence[Work[Asked]]) -> None:
        """Answer a batch."""
        waited = [work for work in new if not work.over]
        if not waited:
            return
        for work, answer in zip(waited, self._answer([work.asked for work in waited]), strict=True):
            work.tell(answer)

    def give_up(self, error: BaseException) -> None:
        """There is nothing between two steps."""


Observer = Callable[[int, float], None]
"""Called with the rows and seconds of every step."""


class Engine(Generic[Asked]):
    """Answers requests of many users in shared batches, in a thread of its own.

    **Guarantee**: every request that was accepted gets an answer or an error, exactly once; and when `retire` returns,
    no request of that owner that was accepted before gets an answer any more.

    | case | what happens |
    |---|---|
    | the queue is full | Busy; nothing is accepted |
    | the worker raises | the requests of its step get the error, the engine goes on |
    | an owner is retired | own requests end with the given error, waiting or running; others are untouched |
    | `close` | what runs is finished, what waits ends with Unavailable |
    """

    def __init__(self, worker: Worker[Asked], limits: Limits | None = None, *, name: str = "engine") -> None:
        self.worker, self.limits, self.name = worker, limits or Limits(), name
        self.observers: list[Observer] = []
        self._queue: FairQueue[Asked] = FairQueue(most=self.limits.waiting, most_of_one=self.limits.waiting_of_one)
        self._open: dict[int, Work[Asked]] = {}
        self._lock = threading.Lock()
        self._pace = 0.01
        self._thread = threading.Thread(target=self._run, name=f"lethe-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait for their batch."""
        return len(self._queue)

    @property
    def owners(self) -> "set[Any]":
        """Whose requests wait or run."""
        with self._lock:
            return {work.owner for work in self._open.values()}

    @property
    def alive(self) -> bool:
        """Whether the thread answers."""
        return self._thread.is_alive()

    def submit(self, owner: Hashable, asked: Asked) -> "Future[Any]":
        """Accept a request; its answer is the future's result. Raises Busy where too much is waiting."""
        work = Work(owner, asked)
        with self._lock:
            self._queue.put(work, retry_after=max(1, math.ceil(self._pace * len(self._queue))))
            self._open[id(work)] = work
        work.answer.add_done_callback(lambda _: self._forget(work))
        return work.answer

    def _forget(self, work: Work[Asked]) -> None:
        with self._lock:
            self._open.pop(id(work), None)

    def retire(self, owner: Hashable, error: BaseException) -> int:
        """End all that an owner has accepted here with an error; returns how many requests that were."""
        self._queue.remove(owner)
        with self._lock:
            own = [work for work in self._open.values() if work.owner == owner]
        return sum(work.tell(error) for work in own)

    def close(self, *, timeout: float = 30.0) -> None:
        """Finish what runs, end what waits, and stop the thread."""
        for work in self._queue.close():
            work.tell(Unavailable("the service has stopped; ask again once it is back"))
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            running = self.worker.running
            new = self._queue.take(self.limits.rows - running, wait=self.limits.wait, idle=running == 0)
            if not new and not running:
                return
            self._step(new, rows=running + len(new))

    def _step(self, new: Sequence[Work[Asked]], *, rows: int) -> None:
        began = time.perf_counter()
        try:
            self.worker.step(new)
        except Exception as error:
            self._broken(new, error)
        spent = time.perf_counter() - began
        self._pace = 0.9 * self._pace + 0.1 * spent / rows
        for observer in self.observers:
            observer(rows, spent)

    def _broken(self, new: Sequence[Work[Asked]], error: Exception) -> None:
        told = error
        if not isinstance(error, LetheError):
            log.exception("a batch of %s could not be answered", self.name)
            # What went wrong inside may hold a user's text: it stays in the log of the one who serves.
            told = ServiceError(f"the {self.name} could not answer ({type(error).__name__}); ask again, or see the log")
        with contextlib.suppress(Exception):
            self.worker.give_up(told)
        for work in new:
            work.tell(told)
