"""Self-attentive sequential recommendation (Kang and McAuley, 2018) over items with their ratings.

A user's events run through a causal transformer in blocks that overlap by half, so that one pass gives the state after
every event; a query reads the state after the last strictly earlier event. Events of the query's own time come later
in the row order and are never attended to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from strategies.personal.recommenders.levels import LEVEL_FEATURES, level_features
from strategies.personal.recommenders.protocol import unfitted
from strategies.personal.recommenders.training import batches, chunked, kept_best, seeded, step
from tasks.recommendation.interactions import LEVELS, Floats, Interactions, Ints, Queries
from tasks.recommendation.metrics import log_loss
from tasks.recommendation.splits import Split

SCORED = 256
"""Blocks passed through the transformer together when scoring."""


@dataclass(frozen=True)
class SasrecSettings:
    """Sizes and training of the transformer."""

    objective: Literal["like", "next"] = "like"
    """What is learned: whether the target is liked, or which item comes next."""
    width: int = 48
    block: int = 64
    """Events of a block; a state has seen between half a block and a whole one of the latest events."""
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3
    rate: float = 1e-3
    decay: float = 0.1
    batch: int = 16
    """Blocks of a batch."""
    negatives: int | None = 512
    """Items that the next one is told from, drawn anew for every batch; None: all (`objective: next`)."""
    epochs: int = 30
    patience: int = 2


@dataclass(frozen=True)
class Blocks:
    """Where in which block the states of queries are."""

    rows: Ints
    """Rows of the interactions, `[blocks, block]`; -1 fills the end."""
    block: Ints
    """Block of each query; -1 without a history."""
    place: Ints

    @classmethod
    def of(cls, queries: Queries, *, size: int) -> "Blocks":
        """Lay out the blocks that the queries need, each once, whoever asks."""
        stride = size // 2
        last = queries.end - queries.first - 1
        number = np.maximum(0, last // stride - 1)
        begin = queries.first + number * stride
        # A block ends where a query needs no more of it: what a later query needs is cut off by causality anyway.
        known = last >= 0
        starts, index = np.unique(begin[known], return_inverse=True)
        ends = np.zeros(len(starts), dtype=np.int64)
        np.maximum.at(ends, index, queries.end[known])
        rows = starts[:, None] + np.arange(size)
        block = np.full(len(queries), -1, dtype=np.int64)
        block[known] = index
        return cls(np.where(rows < ends[:, None], rows, -1), block, np.where(known, last - number * stride, 0))


class SasrecNetwork(nn.Module):
    """Embeddings, causal transformer and the scores of a state for an item."""

    def __init__(self, settings: SasrecSettings, *, items: int) -> None:
        super().__init__()
        width = settings.width
        self.items = nn.Embedding(items, width)
        self.stars = nn.Embedding(LEVELS, width)
        self.places = nn.Embedding(settings.block, width)
        self.empty = nn.Parameter(torch.zeros(width))
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, 2 * width, settings.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, settings.layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.dropout = nn.Dropout(settings.dropout)
        self.user_bias = nn.Linear(width + LEVEL_FEATURES, 1)
        self.item_bias = nn.Embedding(items, 1)
        self.joint = nn.Sequential(
            nn.Linear(3 * width + LEVEL_FEATURES, width), nn.ReLU(), nn.Dropout(settings.dropout)
        )
        self.out = nn.Linear(width, 1)
        for table in (self.items, self.stars, self.places):
            nn.init.normal_(table.weight, std=0.05)
        nn.init.zeros_(self.item_bias.weight)

    def states(self, items: Tensor, stars: Tensor) -> Tensor:
        """Return the state after every event of every block, `[blocks, block, width]`."""
        length = items.shape[1]
        events = self.dropout(self.items(items) + self.stars(stars) + self.places.weight[:length])
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        states: Tensor = self.encoder(events, mask=ahead)
        return states

    def pair(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the last hidden layer for users `[queries, width + LEVEL_FEATURES]` and items `[queries]`."""
        state, wanted = user[:, :-LEVEL_FEATURES], self.items(item)
        hidden: Tensor = self.joint(torch.cat([user, wanted, state * wanted], dim=1))
        return hidden

    def like(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the log odds of a like, `[queries]`."""
        odds: Tensor = self.out(self.pair(user, item)) + self.user_bias(user) + self.item_bias(item)
        return odds[:, 0]

    def next(self, user: Tensor, items: Tensor) -> Tensor:
        """Return scores of `items [n]` as the next one, `[queries, n]`."""
        scores: Tensor = user[:, :-LEVEL_FEATURES] @ self.items(items).T + self.item_bias(items)[:, 0]
        return scores

    def follows(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the score of each query's own item as the next one, `[queries]`."""
        score: Tensor = (user[:, :-LEVEL_FEATURES] * self.items(item)).sum(1) + self.item_bias(item)[:, 0]
        return score


class Sasrec:
    """The transformer with its training."""

    def __init__(self, settings: SasrecSettings | None = None) -> None:
        self.settings = settings or SasrecSettings()
        self.name = "SASRec" if self.settings.objective == "like" else "SASRec, next item"
        self._network: SasrecNetwork | None = None
        self._mean = 0.5

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        """Learn on training rows, stop on validation."""
        with seeded(seed):
            self._learn(log, split)

    def _learn(self, log: Interactions, split: Split) -> None:
        settings = self.settings
        self._network = network = SasrecNetwork(settings, items=len(log.catalogue))
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=settings.decay)
        queries = log.queries(split.train)
        blocks = Blocks.of(queries, size=settings.block)
        order = np.argsort(blocks.block, kind="stable")
        edges = np.searchsorted(blocks.block[order], np.arange(len(blocks.rows) + 1))
        likes = torch.from_numpy(log.likes[split.train].astype(np.float32))
        self._mean = float(likes.mean())

        def epoch() -> None:
            for numbers in batches(np.arange(len(blocks.rows)), settings.batch):
                asked = np.concatenate([order[edges[b] : edges[b + 1]] for b in numbers])
                within = np.repeat(np.arange(len(numbers)), [edges[b + 1] - edges[b] for b in numbers])
                states = network.states(*self._events(log, blocks.rows[numbers]))
                cold = _drawn(order[: edges[0]], share=len(numbers) / len(blocks.rows))
                known = states[torch.from_numpy(within), torch.from_numpy(blocks.place[asked])]
                state = torch.cat([known, network.empty.expand(len(cold), -1)])
                asked = np.concatenate([asked, cold])
                user = torch.cat([state, self._levels(log, queries.take(asked))], dim=1)
                loss = self._loss(network, user, torch.from_numpy(queries.items[asked]), likes[asked])
                step(optimizer, loss)

        kept_best(network, epoch, lambda: self._held(log, split), epochs=settings.epochs, patience=settings.patience)

    def _loss(self, network: SasrecNetwork, user: Tensor, items: Tensor, likes: Tensor) -> Tensor:
        if self.settings.objective == "like":
            loss: Tensor = functional.binary_cross_entropy_with_logits(network.like(user, items), likes)
            return loss
        if self.settings.negatives is None:
            every = torch.arange(network.items.num_embeddings)
            return functional.cross_entropy(network.next(user, every), items)
        drawn = torch.randint(network.items.num_embeddings, (self.settings.negatives,))
        right = network.follows(user, items)
        wrong = network.next(user, drawn).masked_fill(drawn[None] == items[:, None], -torch.inf)
        both = torch.cat([right[:, None], wrong], dim=1)
        return (torch.logsumexp(both, dim=1) - right).mean()

    def _held(self, log: Interactions, split: Split) -> float:
        queries = log.queries(split.validation)
        if self.settings.objective == "like":
            return log_loss(log.likes[split.validation], self.logits(log, queries))
        users = self._users(log, queries)
        every = torch.arange(len(log.catalogue))
        items = torch.from_numpy(queries.items)
        parts = [
            functional.cross_entropy(
                self._learned().next(users[i : i + 512], every), items[i : i + 512], reduction="sum"
            )
            for i in range(0, len(queries), 512)
        ]
        return float(sum(parts)) / len(queries)

    def state(self) -> dict[str, Tensor]:
        """Return what was learned."""
        return {**self._learned().state_dict(), "mean": torch.tensor(self._mean, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what was learned before."""
        network = SasrecNetwork(self.settings, items=len(state["items.weight"]))
        network.load_state_dict({name: value for name, value in state.items() if name != "mean"})
        self._network, self._mean = network.eval(), float(state["mean"])

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return log odds of a like, or scores as the next item."""
        network, users = self._learned(), self._users(log, queries)
        items = torch.from_numpy(queries.items)
        score = network.like if self.settings.objective == "like" else network.follows
        return chunked(lambda part: score(users[part], items[part]), len(queries), size=8192)

    def user_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return the state after the history beside the user's levels, `[queries, width + LEVEL_FEATURES]`."""
        return self._users(log, queries).double().numpy()

    def pair_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return the last hidden layer, which has seen the target, `[queries, width]`."""
        network, users = self._learned(), self._users(log, queries)
        items = torch.from_numpy(queries.items)
        return chunked(lambda part: network.pair(users[part], items[part]), len(queries), size=8192)

    def _users(self, log: Interactions, queries: Queries) -> Tensor:
        return torch.cat([self._states(log, queries), self._levels(log, queries)], dim=1)

    def _levels(self, log: Interactions, queries: Queries) -> Tensor:
        return torch.from_numpy(level_features(log, queries, mean=self._mean))

    def _states(self, log: Interactions, queries: Queries) -> Tensor:
        """Return the state of every query, `[queries, width]`."""
        network = self._learned()
        blocks = Blocks.of(queries, size=self.settings.block)
        found = network.empty.detach().expand(len(queries), -1).clone()
        order = np.argsort(blocks.block, kind="stable")
        edges = np.searchsorted(blocks.block[order], np.arange(0, len(blocks.rows) + SCORED, SCORED))
        with torch.no_grad():
            for number, begin in enumerate(range(0, len(blocks.rows), SCORED)):
                asked = order[edges[number] : edges[number + 1]]
                states = network.states(*self._events(log, blocks.rows[begin : begin + SCORED]))
                within = torch.from_numpy(blocks.block[asked] - begin)
                found[torch.from_numpy(asked)] = states[within, torch.from_numpy(blocks.place[asked])]
        return found

    def _events(self, log: Interactions, rows: Ints) -> tuple[Tensor, Tensor]:
        # Places after the end of a block are filled with the last row of all; nothing before attends to them.
        return torch.from_numpy(log.items[rows]), torch.from_numpy(log.levels[rows])

    def _learned(self) -> SasrecNetwork:
        if self._network is None:
            raise unfitted(self.name)
        return self._network


def _drawn(queries: Ints, *, share: float) -> Ints:
    """Draw a batch's part of the queries without a history, from torch's generator."""
    count = round(share * len(queries) + 0.5) if len(queries) else 0
    drawn: Ints = torch.randint(max(1, len(queries)), (count,)).numpy()
    return queries[drawn]
