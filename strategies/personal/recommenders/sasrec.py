"""Self-attentive sequential recommendation (Kang and McAuley, 2018) over items with their ratings.

A user's events run through a causal transformer in blocks that overlap by half, so that one pass gives the state after
every event; a query reads the state after the last strictly earlier event. Events of the query's own time come later
in the row order and are never attended to.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from strategies.personal.recommenders.protocol import unfitted
from strategies.personal.recommenders.training import chunked, kept_best
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
    dropout: float = 0.2
    rate: float = 2e-3
    decay: float = 1e-2
    batch: int = 32
    """Blocks of a batch."""
    negatives: int = 512
    """Items that the next one is told from, drawn anew for every batch (`objective: next`)."""
    epochs: int = 30
    patience: int = 3


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
        self.user_bias = nn.Linear(width, 1)
        self.item_bias = nn.Embedding(items, 1)
        self.joint = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Dropout(settings.dropout))
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

    def pair(self, state: Tensor, item: Tensor) -> Tensor:
        """Return the last hidden layer for states `[queries, width]` and items `[queries]`."""
        wanted = self.items(item)
        hidden: Tensor = self.joint(torch.cat([state, wanted, state * wanted], dim=1))
        return hidden

    def like(self, state: Tensor, item: Tensor) -> Tensor:
        """Return the log odds of a like, `[queries]`."""
        odds: Tensor = self.out(self.pair(state, item)) + self.user_bias(state) + self.item_bias(item)
        return odds[:, 0]

    def next(self, state: Tensor, items: Tensor) -> Tensor:
        """Return scores of `items [n]` as the next one, `[queries, n]`."""
        scores: Tensor = state @ self.items(items).T + self.item_bias(items)[:, 0]
        return scores


class Sasrec:
    """The transformer with its training."""

    def __init__(self, settings: SasrecSettings | None = None) -> None:
        self.settings = settings or SasrecSettings()
        self.name = "SASRec" if self.settings.objective == "like" else "SASRec, next item"
        self._network: SasrecNetwork | None = None

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        """Learn on training rows, stop on validation."""
        torch.manual_seed(seed)
        settings = self.settings
        self._network = network = SasrecNetwork(settings, items=len(log.catalogue))
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=settings.decay)
        queries = log.queries(split.train)
        blocks = Blocks.of(queries, size=settings.block)
        order = np.argsort(blocks.block, kind="stable")
        edges = np.searchsorted(blocks.block[order], np.arange(len(blocks.rows) + 1))
        likes = torch.from_numpy(log.likes[split.train].astype(np.float32))

        def epoch() -> None:
            for chosen in torch.randperm(len(blocks.rows)).split(settings.batch):
                numbers = chosen.numpy()
                asked = np.concatenate([order[edges[b] : edges[b + 1]] for b in numbers])
                within = np.repeat(np.arange(len(numbers)), [edges[b + 1] - edges[b] for b in numbers])
                states = network.states(*self._events(log, blocks.rows[numbers]))
                cold = _drawn(order[: edges[0]], share=len(numbers) / len(blocks.rows))
                known = states[torch.from_numpy(within), torch.from_numpy(blocks.place[asked])]
                state = torch.cat([known, network.empty.expand(len(cold), -1)])
                asked = np.concatenate([asked, cold])
                loss = self._loss(network, state, torch.from_numpy(queries.items[asked]), likes[asked])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        kept_best(network, epoch, lambda: self._held(log, split), epochs=settings.epochs, patience=settings.patience)

    def _loss(self, network: SasrecNetwork, state: Tensor, items: Tensor, likes: Tensor) -> Tensor:
        if self.settings.objective == "like":
            return functional.binary_cross_entropy_with_logits(network.like(state, items), likes)
        drawn = torch.randint(network.items.num_embeddings, (self.settings.negatives,))
        right = (state * network.items(items)).sum(1) + network.item_bias(items)[:, 0]
        wrong = network.next(state, drawn).masked_fill(drawn[None] == items[:, None], -torch.inf)
        return (torch.logsumexp(torch.cat([right[:, None], wrong], dim=1), dim=1) - right).mean()

    def _held(self, log: Interactions, split: Split) -> float:
        queries = log.queries(split.validation)
        if self.settings.objective == "like":
            return log_loss(log.likes[split.validation], self.logits(log, queries))
        states = self._states(log, queries)
        every = torch.arange(len(log.catalogue))
        items = torch.from_numpy(queries.items)
        parts = [
            functional.cross_entropy(
                self._learned().next(states[i : i + 512], every), items[i : i + 512], reduction="sum"
            )
            for i in range(0, len(queries), 512)
        ]
        return float(sum(parts)) / len(queries)

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return log odds of a like, or scores as the next item."""
        network, states = self._learned(), self._states(log, queries)
        items = torch.from_numpy(queries.items)
        if self.settings.objective == "like":
            return chunked(lambda part: network.like(states[part], items[part]), len(queries), size=8192)
        return chunked(
            lambda part: (states[part] * network.items(items[part])).sum(1) + network.item_bias(items[part])[:, 0],
            len(queries),
            size=8192,
        )

    def user_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return the state after the history, `[queries, width]`."""
        return self._states(log, queries).double().numpy()

    def pair_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return the last hidden layer, which has seen the target, `[queries, width]`."""
        network, states = self._learned(), self._states(log, queries)
        items = torch.from_numpy(queries.items)
        return chunked(lambda part: network.pair(states[part], items[part]), len(queries), size=8192)

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
        # Places after the end of a block are filled with its last row; nothing before them attends to them.
        return torch.from_numpy(log.items[rows]), torch.from_numpy(log.levels[rows])

    def _learned(self) -> SasrecNetwork:
        if self._network is None:
            raise unfitted(self.name)
        return self._network


def _drawn(queries: Ints, *, share: float) -> Ints:
    """Draw a batch's part of the queries without a history, from torch's generator."""
    count = round(share * len(queries) + 0.5) if len(queries) else 0
    return queries[torch.randint(max(1, len(queries)), (count,)).numpy()]
