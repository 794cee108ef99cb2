"""Two histories for one question: a long one of ids for the recommender, a short one of texts for the language model.

The short one holds the events whose item texts mean most nearly what the target's does, put back in time order
(retrieval as in ReLLa; RecLoRA calls the pair Long-Short Modality Retriever).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora.errors import DataError, RunError
from tasks.recommendation.interactions import Interactions, Ints, Queries

_UNIT = "unit"
TABLE = 8192
"""Items up to which all similarities are computed once, rather than for every query."""


@dataclass(frozen=True)
class LongShort:
    """Rows of the interactions for each query, oldest first; -1 fills the front."""

    long: Ints
    short: Ints


class SemanticRetriever:
    """Chooses history by the cosine of item text embeddings `[items, d]`."""

    def __init__(self, embeddings: NDArray[np.float32], *, long: int = 60, short: int = 10) -> None:
        if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
            raise DataError(f"item embeddings are finite rows, one an item, not of shape {embeddings.shape}")
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        self.unit = embeddings / np.maximum(lengths, 1e-12)
        self.long, self.short = long, short
        self._table = self.unit @ self.unit.T if len(embeddings) <= TABLE else None

    def save(self, path: Path) -> None:
        """Write the embeddings; `load` reads them, so that who serves needs no model for texts."""
        save_file({_UNIT: torch.from_numpy(np.ascontiguousarray(self.unit))}, path)

    @classmethod
    def load(cls, path: Path) -> "SemanticRetriever":
        """Read what `save` wrote. Raises RunError for a file that is missing or damaged."""
        try:
            return cls(load_file(path)[_UNIT].numpy())
        except (OSError, SafetensorError, KeyError) as error:
            raise RunError(
                f"{path}: the item texts' vectors cannot be read ({type(error).__name__}); run lethe personalize again"
            ) from error

    def __call__(self, log: Interactions, queries: Queries) -> LongShort:
        """Return the latest `long` events and the `short` most similar ones of each whole history."""
        return LongShort(queries.latest(self.long), self.similar(log, queries, self.short))

    def similar(self, log: Interactions, queries: Queries, count: int) -> Ints:
        """Return the rows of the `count` events nearest to the target, `[queries, count]`; of equals, the latest."""
        if len(self.unit) != len(log.catalogue):
            raise DataError(f"there are {len(self.unit)} item embeddings for a catalogue of {len(log.catalogue)}")
        found = np.full((len(queries), count), -1, dtype=np.int64)
        for place in range(len(queries)):
            rows = np.arange(queries.first[place], queries.end[place])
            if len(rows) > count:
                near = self._near(log.items[rows], int(queries.items[place]))
                rows = np.sort(rows[::-1][np.argsort(-near[::-1], kind="stable")[:count]])
            found[place, count - len(rows) :] = rows
        return found

    def retrieved(self, log: Interactions, queries: Queries) -> Ints:
        """Return the `long` most similar events: what makes DIN a SIM."""
        return self.similar(log, queries, self.long)

    def _near(self, items: Ints, target: int) -> NDArray[np.float32]:
        near = self.unit[items] @ self.unit[target] if self._table is None else self._table[target, items]
        return np.asarray(near, dtype=np.float32)
