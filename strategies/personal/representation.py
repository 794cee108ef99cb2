"""What routes: vectors of users, or of users with a target, from frozen recommenders."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora.errors import ModelError
from strategies.personal.config import Routing
from strategies.personal.recommenders.protocol import Representing
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries

State = dict[str, Tensor]


class Representation(Protocol):
    """Vectors of queries that carry no gradient."""

    def fit(self, log: Interactions, queries: Queries) -> None:
        """Learn scales from the given queries."""
        ...

    def __call__(self, log: Interactions, queries: Queries) -> Tensor:
        """Return vectors `[queries, d]`, float32."""
        ...

    def state(self) -> State:
        """Return what was learned."""
        ...

    def restore(self, state: State) -> None:
        """Take what was learned before."""
        ...


class Recommended:
    """Vectors of one or more recommenders side by side, every column with mean 0 and spread 1 over the fitted queries.

    A router's LayerNorm evens out a whole vector, so that without this one recommender of large numbers would drown
    the others.
    """

    def __init__(self, recommenders: Sequence[Representing], routing: Routing = "user") -> None:
        if not recommenders:
            raise ModelError(
                "routing needs at least one recommender with vectors, such as DIN or SASRec; none is given"
            )
        self.recommenders, self.routing = tuple(recommenders), routing
        self._scales: tuple[Floats, Floats] | None = None

    def fit(self, log: Interactions, queries: Queries) -> None:
        """Learn means and spreads of the columns."""
        raw = self._raw(log, queries)
        self._scales = raw.mean(0), np.maximum(raw.std(0), 1e-6)

    def __call__(self, log: Interactions, queries: Queries) -> Tensor:
        """Return standardised vectors, cut at ten spreads."""
        if self._scales is None:
            raise ModelError("the representation has no scales yet; call fit(log, queries) first")
        mean, spread = self._scales
        raw = np.clip((self._raw(log, queries) - mean) / spread, -10, 10)
        return torch.from_numpy(raw.astype(np.float32))

    def _raw(self, log: Interactions, queries: Queries) -> Floats:
        parts = [
            each.user_vectors(log, queries) if self.routing == "user" else each.pair_vectors(log, queries)
            for each in self.recommenders
        ]
        return np.concatenate(parts, axis=1)

    def state(self) -> State:
        """Return means and spreads, `[2, d]`."""
        return {} if self._scales is None else {"scales": torch.from_numpy(np.stack(self._scales))}

    def restore(self, state: State) -> None:
        """Take means and spreads."""
        if "scales" in state:
            mean, spread = state["scales"].numpy()
            self._scales = mean, spread


class Drawn:
    """Normal numbers that are drawn once for every user by name, the same however the log grows."""

    def __init__(self, *, width: int, seed: int = 0) -> None:
        self.width, self.seed = width, seed

    def fit(self, log: Interactions, queries: Queries) -> None:
        """There is nothing to learn."""

    def __call__(self, log: Interactions, queries: Queries) -> Tensor:
        """Return the numbers of each query's user."""
        users, place = np.unique(owners(log, queries), return_inverse=True)
        drawn = [self._of(log.user_names[user]) for user in users]
        table = np.stack(drawn) if drawn else np.empty((0, self.width), dtype=np.float32)
        return torch.from_numpy(table[place.reshape(-1)])

    def _of(self, name: str) -> NDArray[np.float32]:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        drawn = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(self.width)
        return drawn.astype(np.float32)

    def state(self) -> State:
        """Return the seed."""
        return {"seed": torch.tensor(self.seed)}

    def restore(self, state: State) -> None:
        """Take the seed."""
        self.seed = int(state["seed"])


def owners(log: Interactions, queries: Queries) -> Ints:
    """Return the user of every query: whose rows its history starts with."""
    found: Ints = np.searchsorted(log.starts[:-1], queries.first, side="right") - 1
    return found
