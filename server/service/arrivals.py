"""Answers on their way from engines' threads to an event loop: one wake-up brings all that are there."""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from lora.errors import Busy

PATIENCE = 60.0
"""Seconds that a request waits for its answer at most."""


async def told(future: "Future[Any]", *, patience: float = PATIENCE) -> Any:
    """Wait for an engine's answer. Raises its error, or Busy after `patience` seconds; the request is given up then."""
    (answer,) = await all_told([future], patience=patience)
    return answer


async def all_told(futures: "Sequence[Future[Any]]", *, patience: float = PATIENCE) -> list[Any]:
    """Wait for all answers of one request, in their order; the first error is raised."""
    loop = asyncio.get_running_loop()
    wait = _Wait(loop.create_future(), left=len(futures))
    arrivals = _Arrivals.at(loop)
    for future in futures:
        future.add_done_callback(lambda _: arrivals.put(wait))
    late = loop.call_later(patience, wait.give_up)
    try:
        if futures and not await wait.over:
            raise Busy(f"no answer within {patience:g} s; ask again later", retry_after=5)
        return [future.result() for future in futures]
    finally:
        late.cancel()
        # Nobody waits any more for what is still open.
        for future in futures:
            future.cancel()


class _Wait:
    """A request that waits on the loop for so many answers."""

    def __init__(self, over: "asyncio.Future[bool]", *, left: int) -> None:
        self.over, self._left = over, left

    def arrived(self) -> None:
        self._left -= 1
        if self._left == 0 and not self.over.done():
            self.over.set_result(True)

    def give_up(self) -> None:
        if not self.over.done():
            self.over.set_result(False)


class _Arrivals:
    """What has arrived for one loop; a batch of answers wakes it once rather than once each."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._wake = loop.call_soon_threadsafe
        self._ready: deque[_Wait] = deque()
        self._woken = False

    @classmethod
    def at(cls, loop: asyncio.AbstractEventLoop) -> "_Arrivals":
        found = _LOOPS.get(loop)
        if found is None:
            found = _LOOPS[loop] = cls(loop)
        return found

    def put(self, wait: _Wait) -> None:
        self._ready.append(wait)
        if not self._woken:
            self._woken = True
            # A loop that is closed has nobody left who waits.
            with suppress(RuntimeError):
                self._wake(self._hand_out)

    def _hand_out(self) -> None:
        # Lowered first: what is put from here on wakes the loop again, or is taken below.
        self._woken = False
        while self._ready:
            self._ready.popleft().arrived()


_LOOPS: "WeakKeyDictionary[asyncio.AbstractEventLoop, _Arrivals]" = WeakKeyDictionary()
