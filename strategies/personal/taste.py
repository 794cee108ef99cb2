"""What routes where no recommender may be trained on everybody: a user's taste, in vectors of public item texts."""

import hashlib
import re
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.personal.representation import State
from tasks.recommendation.interactions import Interactions, Items, Queries

_WORD = re.compile(r"[^\W_]+")
_KNOWN_AT = 20.0
"""Events after which the number of events says little more."""

Vectors = NDArray[np.float32]


class Taste:
    """Vectors of histories that anybody computes alike from texts and a seed: nothing is learned, nothing is asked.

    Of a history: the mean text vector of the liked items and that of the others (zero where there are none), the share
    of likes less a half, and how many events there are. A text's vector is the sum of signs that a seed gives to its
    words (Achlioptas 2003), of length one; rare words and tags count like others. A history without events gives zeros.
    """

    def __init__(self, *, width: int = 32, seed: int = 0) -> None:
        self.width, self.seed = width, seed

    @property
    def inputs(self) -> int:
        """Numbers of a vector."""
        return 2 * self.width + 2

    def fit(self, log: Interactions, queries: Queries) -> None:
        """There is nothing to learn."""

    def __call__(self, log: Interactions, queries: Queries) -> Tensor:
        """Return vectors `[queries, 2 width + 2]`, float32; only events strictly before a query count."""
        items = self.texts(log.catalogue)[log.items] * np.sqrt(self.width)
        liked = log.likes[:, None]
        likes, others = (_before(np.where(chosen, items, 0.0), queries) for chosen in (liked, ~liked))
        count = (queries.end - queries.first).astype(np.float64)[:, None]
        fans = _before(liked.astype(np.float64), queries)
        level = np.where(count > 0, fans / np.maximum(count, 1) - 0.5, 0.0)
        parts = (likes / np.maximum(fans, 1), others / np.maximum(count - fans, 1), level, count / (count + _KNOWN_AT))
        return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))

    def texts(self, catalogue: Items) -> Vectors:
        """Return the unit vectors of all items' titles and tags, `[items, width]`; zero for a text without words."""
        rows = [self._of(text) for text in catalogue.texts]
        return np.stack(rows) if rows else np.empty((0, self.width), dtype=np.float32)

    def _of(self, text: str) -> Vectors:
        words = _WORD.findall(text.casefold())
        whole = sum((_signs(word, self.width, self.seed) for word in words), np.zeros(self.width, dtype=np.float32))
        return np.asarray(whole / max(float(np.linalg.norm(whole)), 1e-12), dtype=np.float32)

    def state(self) -> State:
        """Return width and seed."""
        return {"taste": torch.tensor([self.width, self.seed])}

    def restore(self, state: State) -> None:
        """Take width and seed."""
        self.width, self.seed = (int(value) for value in state["taste"])


@lru_cache(maxsize=1 << 16)
def _signs(word: str, width: int, seed: int) -> Vectors:
    digest = hashlib.shake_256(f"{seed}/{word}".encode()).digest(-(-width // 8))
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:width]
    return bits.astype(np.float32) * 2 - 1


def _before(values: NDArray[np.float64], queries: Queries) -> NDArray[np.float64]:
    """Sum `values [rows, k]` over every query's history, `[queries, k]`."""
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=np.float64)])
    found: NDArray[np.float64] = sums[queries.end] - sums[queries.first]
    return found
