"""Batches side by side on the cores: one thread a core, each with batches of its own.

Torch's own threads meet at a barrier after every operation; on small layers, or beside any other work on the machine,
they mostly wait for each other. Batches are independent, so whole batches are what a core gets here.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_workers = 1


def workers() -> int:
    """Return how many threads `spread` divides work among."""
    return _workers


@contextmanager
def cores(count: int) -> Any:
    """Use `count` threads for batches inside the block, and one torch thread in each of them."""
    global _workers  # noqa: PLW0603 (torch's own thread count is as global)
    before, threads = _workers, torch.get_num_threads()
    _workers = count
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _workers = before
        torch.set_num_threads(threads)


def even_budget(total: int, *, most: int, least: int, count: int | None = None) -> int:
    """Return how large batches of `total` tokens should be so that all workers end together, from `least` to `most`.

    `count` is the number of workers, else that of `workers()`. Below `least` a batch costs more to start than to
    compute, and is not worth a worker of its own.
    """
    count = _workers if count is None else count
    turns = max(1, -(-total // (most * count)))
    return min(most, max(1, least, -(-total // (turns * count))))


def shares(costs: Sequence[float], *, count: int) -> list[list[int]]:
    """Divide jobs among `count` workers, the largest first to whoever has least; the same division every time."""
    loads = [0.0] * count
    divided: list[list[int]] = [[] for _ in range(count)]
    for job in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        idlest = loads.index(min(loads))
        divided[idlest].append(job)
        loads[idlest] += costs[job]
    return [share for share in divided if share]


def spread(work: Callable[[list[int]], T], costs: Sequence[float], *, count: int | None = None) -> list[T]:
    """Call `work` with each worker's jobs, side by side; results come in the workers' order, whoever ends first.

    `count` is the number of workers, else that of `workers()`.
    """
    divided = shares(costs, count=_workers if count is None else count)
    if len(divided) <= 1:
        return [work(share) for share in divided]
    with ThreadPoolExecutor(len(divided)) as pool:
        return list(pool.map(work, divided))
