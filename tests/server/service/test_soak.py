"""Full load for a while: no error, no memory that only grows. 30 seconds, or `LETHE_SOAK` of them (`make soak`)."""

import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import psutil
import pytest

from lethe import Client
from lethe.remote_answers import Event
from lora.errors import Unknown
from server.service import personal_pb2, personal_pb2_grpc
from server.service.adapters import NewAdapter
from server.service.door import Door
from tests.server.service.conftest import Encoder, drawn
from tests.server.service.site import Site

SECONDS = float(os.environ.get("LETHE_SOAK", "30"))
GROWTH = 16 * 2**20
"""Bytes that may come on top of 3 % between the second fifth of the time and the last."""
pb: Any = personal_pb2


class Load:
    """Threads that ask without a pause until the end; what they may not get is kept."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.asked: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._threads: list[threading.Thread] = []

    def start(self, name: str, ask: Callable[[int], object]) -> None:
        def run() -> None:
            turn = 0
            while time.monotonic() < self.end and not self.wrong:
                turn += 1
                try:
                    ask(turn)
                except Unknown:
                    # Its user is being forgotten at this moment.
                    self.asked["unknown"] += 1
                except Exception as error:
                    self.wrong.append(f"{name}: {type(error).__name__}: {error}")
                self.asked[name] += 1

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def watched(self) -> list[int]:
        """Wait for the end; returns the bytes of memory in between."""
        seen, process = [], psutil.Process()
        while time.monotonic() < self.end and not self.wrong:
            seen.append(process.memory_info().rss)
            time.sleep(SECONDS / 300)
        for thread in self._threads:
            thread.join()
        return seen


@pytest.mark.slow
def test_the_service_stays_as_it_is_under_full_load(site: Site, url: str, text_encoder: Encoder) -> None:
    door, layout = Door(site.service), text_encoder.learner.layout
    readers = [f"reader-{number}" for number in range(40)]
    slots = drawn(layout, len(readers))
    site.service.adapters.write(*[NewAdapter(n, s, layout, "b", 2, None) for n, s in zip(readers, slots, strict=True)])
    known = [f"user-{number:03d}" for number in range(12)]
    client = Client(url, site.key("operator"))
    channel = grpc.insecure_channel(f"127.0.0.1:{door.port}")
    stub: Any = personal_pb2_grpc.PersonalStub(channel)  # type: ignore[no-untyped-call]
    key = (("authorization", f"Bearer {site.key('operator')}"),)
    load = Load(SECONDS)

    def guest(turn: int) -> None:
        """Somebody comes, rates three items, gets advice, and is forgotten: nothing may be left of them."""
        user = client.user(f"guest-{turn}")
        user.observe(*[Event(f"item-{place:03d}", 4.0, place) for place in (1, 2, 3)])
        assert user.recommendations(3).whose.adapter == user.name
        assert user.forget().state == "done"

    for one in range(2):
        load.start("recommend", lambda turn, s=one: client.user(known[(turn + s) % 12]).recommendations(5))  # type: ignore[misc]
        load.start("embed", lambda turn, s=one: client.user(readers[(turn * 7 + s) % 40]).embed(["a b", "c"] * 4))  # type: ignore[misc]
    load.start("complete", lambda turn: client.complete(known[turn % 12], "14/20 The", max_tokens=8))
    load.start("guest", guest)
    load.start("grpc", lambda turn: stub.Recommend(pb.RecommendRequest(user=known[turn % 12]), metadata=key))
    request = pb.CompletionRequest(model="base", prompt=["12/20"], max_tokens=8)
    load.start("stream", lambda _: [*stub.StreamCompletion(request, metadata=key)])
    load.start("rewrite", lambda turn: _rewrite(site, layout, slots, readers, turn))
    seen = load.watched()
    channel.close()
    client.close()
    door.close(grace=5)
    fifth = len(seen) // 5
    early, late = statistics.median(seen[fifth : 2 * fifth]), statistics.median(seen[-fifth:])
    print(f"{dict(load.asked)}; memory {early / 2**20:.1f} MiB, later {late / 2**20:.1f} MiB")
    assert load.wrong == []
    assert min(load.asked[name] for name in ("recommend", "embed", "complete", "guest", "grpc", "stream")) > 0
    assert late < 1.03 * early + GROWTH


def _rewrite(site: Site, layout: Any, slots: Any, readers: list[str], turn: int) -> None:
    """Replace an adapter that others are using."""
    place = turn % len(readers)
    site.service.adapters.write(NewAdapter(readers[place], slots[place], layout, "b", 2, None))
    time.sleep(0.05)
