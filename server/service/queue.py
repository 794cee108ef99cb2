"""What waits to be answered: bounded, and one after another by user, so that nobody's burst delays the others."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lora.errors import Busy, Unavailable

Asked = TypeVar("Asked")


@dataclass(eq=False)
class Work(Generic[Asked]):
    """One request on its way through an engine: whose it is, what is asked, and where the answer goes."""

    owner: Hashable
    asked: Asked
    answer: "Future[Any]" = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)

    @property
    def over(self) -> bool:
        """Whether it has its answer, or nobody waits for one any more."""
        return self.answer.done()

    def tell(self, answer: object) -> bool:
        """Hand over the answer, or the error that stands for it; False where it came too late."""
        try:
            if isinstance(answer, BaseException):
                self.answer.set_exception(answer)
            else:
                self.answer.set_result(answer)
        except Exception:  # concurrent.futures.InvalidStateError: cancelled, or ended by `Engine.retire`
            return False
        return True


class FairQueue(Generic[Asked]):
    """Work in the order of its owners' turns: every owner with waiting work gives one piece, then the next one does.

    **Guarantee**: where k owners have work waiting, the oldest piece of each is among the next k that are taken.

    | case | answer |
    |---|---|
    | `most` pieces are waiting | Busy |
    | an owner has `most_of_one` pieces waiting | Busy, for this owner only |
    | the queue is closed | Unavailable |
    """

    def __init__(self, *, most: int, most_of_one: int) -> None:
        self.most, self.most_of_one = most, most_of_one
        self._turns: OrderedDict[Hashable, deque[Work[Asked]]] = OrderedDict()
        self._changed = threading.Condition()
        self._count, self._closed = 0, False

    def __len__(self) -> int:
        return self._count

    def put(self, work: Work[Asked], *, retry_after: float = 1.0) -> None:
        """Let a piece of work wait. Raises Busy where there is no room, Unavailable after `close`."""
        with self._changed:
            if self._closed:
                raise Unavailable("the service is stopping and takes no more requests; ask again once it is back")
            own = self._turns.get(work.owner, ())
            if self._count >= self.most:
                raise Busy(f"{self._count} requests are waiting, the most that may; ask again later",
                           retry_after=retry_after)  # fmt: skip
            if len(own) >= self.most_of_one:
                raise Busy(f"{len(own)} requests of this user are waiting, the most that may of one; wait for them",
                           retry_after=retry_after)  # fmt: skip
            self._turns.setdefault(work.owner, deque()).append(work)
            self._count += 1
            self._changed.notify()

    def take(self, count: int, *, wait: float, idle: bool = True) -> list[Work[Asked]]:
        """Return up to `count` pieces. Waits for the first one if `idle`, then at most `wait` seconds for the others.

        Nothing comes back after `close`, or at once where nothing waits and the caller is not idle.
        """
        with self._changed:
            while idle and not self._count and not self._closed:
                self._changed.wait()
            if idle and self._count:
                self._gather(count, wait)
            return [self._next() for _ in range(min(count, self._count))]

    def _gather(self, count: int, wait: float) -> None:
        """Wait until `count` pieces are there, or the oldest has waited for `wait` seconds."""
        end = min(own[0].since for own in self._turns.values()) + wait
        while self._count < count and not self._closed:
            left = end - time.perf_counter()
            if left <= 0:
                return
            self._changed.wait(left)

    def _next(self) -> Work[Asked]:
        owner, own = self._turns.popitem(last=False)
        self._count -= 1
        work = own.popleft()
        if own:
            self._turns[owner] = own
        return work

    def remove(self, owner: Hashable) -> list[Work[Asked]]:
        """Take away all that an owner has waiting."""
        with self._changed:
            own = [*self._turns.pop(owner, ())]
            self._count -= len(own)
            return own

    def close(self) -> list[Work[Asked]]:
        """Take nothing more, and return what is still waiting."""
        with self._changed:
            self._closed = True
            left = [work for own in self._turns.values() for work in own]
            self._turns.clear()
            self._count = 0
            self._changed.notify_all()
            return left
