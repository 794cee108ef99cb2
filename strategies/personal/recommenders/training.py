"""Early stopping and freezing, the same for every learned recommender."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from tasks.recommendation.interactions import Floats, Ints


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's generator as seeded, and leave it to others as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def kept_best(
    model: nn.Module, epoch: Callable[[], None], check: Callable[[], float], *, epochs: int, patience: int
) -> float:
    """Run epochs until `check` (lower is better) has not improved for `patience` of them; keep the best weights.

    The model is frozen and in eval mode afterwards: dropout inside a frozen recommender would make routing noisy.
    Returns the best value.
    """
    best, state, since = float("inf"), copy.deepcopy(model.state_dict()), 0
    for _ in range(epochs):
        model.train()
        epoch()
        model.eval()
        with torch.no_grad():
            value = check()
        since = 0 if value < best else since + 1
        if value < best:
            best, state = value, copy.deepcopy(model.state_dict())
        if since >= patience:
            break
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    return best


def batches(rows: Ints, size: int) -> Iterator[Ints]:
    """Yield shuffled batches of rows, drawn from torch's generator."""
    shuffled = rows[torch.randperm(len(rows)).numpy()]
    for begin in range(0, len(rows), size):
        yield shuffled[begin : begin + size]


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one optimizer step down the loss."""
    optimizer.zero_grad()
    torch.autograd.backward([loss])
    optimizer.step()


def chunked(work: Callable[[slice], Tensor], count: int, *, size: int) -> Floats:
    """Apply `work` to slices of `count` rows without gradients and join what it returns."""
    with torch.no_grad():
        parts = [work(slice(i, i + size)) for i in range(0, count, size)]
    return torch.cat(parts).double().numpy() if parts else np.empty(0)
