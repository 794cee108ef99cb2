"""Deep interest network: attention of the target over a history of items with their ratings.

After Zhou et al. (2018) as RecLoRA's release has it: attention from (target, event, difference, product) through a
small network, no softmax, empty places masked by multiplication. Fed with events that are retrieved for the target
instead of the latest ones it is what that paper calls SIM.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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

Chosen = Callable[[Interactions, Queries], Ints]
"""(log, queries) -> rows of each query's history in time order, `[queries, length]`; -1 fills the front."""

SCORED = 4096
"""Queries scored together."""


@dataclass(frozen=True)
class DinSettings:
    """Sizes and training of the network."""

    width: int = 32
    length: int = 50
    """Latest events that are attended to."""
    attention: int = 32
    hidden: tuple[int, int] = (128, 64)
    dropout: float = 0.2
    rate: float = 1e-3
    decay: float = 1e-2
    batch: int = 512
    epochs: int = 12
    patience: int = 2


class DinNetwork(nn.Module):
    """Embeddings, attention and the network above them."""

    def __init__(self, settings: DinSettings, *, items: int) -> None:
        super().__init__()
        width, hidden = settings.width, settings.hidden
        self.items = nn.Embedding(items, width)
        self.events = nn.Linear(width, width)
        self.stars = nn.Embedding(LEVELS, width)
        self.of_target = nn.Linear(width, settings.attention)
        self.of_event = nn.Linear(width, settings.attention, bias=False)
        self.of_product = nn.Linear(width, settings.attention, bias=False)
        self.weight = nn.Linear(settings.attention, 1)
        self.body = nn.Sequential(
            nn.Linear(3 * width + LEVEL_FEATURES, hidden[0]), nn.ReLU(), nn.Dropout(settings.dropout),
            nn.Linear(hidden[0], hidden[1]), nn.ReLU(), nn.Dropout(settings.dropout),
        )  # fmt: skip
        self.out = nn.Linear(hidden[1], 1)
        self.bias = nn.Embedding(items, 1)
        for table in (self.items, self.stars):
            nn.init.normal_(table.weight, std=0.05)
        nn.init.zeros_(self.bias.weight)

    def history(self, items: Tensor, stars: Tensor) -> Tensor:
        """Embed events, `[queries, length, width]`."""
        # The linear map is applied to the table, not to every event: the sums are the same and there are fewer.
        table = self.events(self.items.weight)
        return torch.relu(functional.embedding(items, table) + self.stars(stars))

    def forward(self, target: Tensor, items: Tensor, stars: Tensor, seen: Tensor, level: Tensor) -> Tensor:
        """Return the last hidden layer, `[queries, hidden]`."""
        wanted, events = self.items(target), self.history(items, stars)
        # One matrix a query, diag(target) W, in place of the product with every event.
        mixed = self.of_product.weight[None] * wanted[:, None, :] + self.of_event.weight[None]
        joint = torch.relu(torch.bmm(events, mixed.transpose(1, 2)) + self.of_target(wanted)[:, None, :])
        weights = self.weight(joint)[:, :, 0] * seen
        interest = torch.bmm(weights[:, None, :], events)[:, 0] / seen.shape[1]
        hidden: Tensor = self.body(torch.cat([wanted, interest, wanted * interest, level], dim=1))
        return hidden

    def logit(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the log odds, `[queries]`."""
        odds: Tensor = self.out(hidden)[:, 0] + self.bias(target)[:, 0]
        return odds


class Din:
    """The network over the latest events, or over those that `chosen` retrieves for each target."""

    def __init__(self, settings: DinSettings | None = None, *, chosen: Chosen | None = None, name: str = "DIN") -> None:
        self.settings = settings or DinSettings()
        self.name = name
        self.retrieves = chosen is not None
        """Whether it reads other events than the latest."""
        self._chosen = chosen or self._latest
        self._network: DinNetwork | None = None
        self._mean = 0.5

    def _latest(self, log: Interactions, queries: Queries) -> Ints:
        return queries.latest(self.settings.length)

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        """Learn on training rows, stop on validation."""
        with seeded(seed):
            self._learn(log, split)

    def _learn(self, log: Interactions, split: Split) -> None:
        settings = self.settings
        network = DinNetwork(settings, items=len(log.catalogue))
        self._network, self._mean = network, float(log.likes[split.train].mean())
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=settings.decay)
        queries, held = log.queries(split.train), log.queries(split.validation)
        rows = self._chosen(log, queries)
        labels = torch.from_numpy(log.likes[split.train].astype(np.float32))

        def epoch() -> None:
            for batch in batches(np.arange(len(queries)), settings.batch):
                target = torch.from_numpy(queries.items[batch])
                inputs = self._inputs(log, queries.take(batch), rows[batch])
                logits = network.logit(network(*inputs), target)
                step(optimizer, functional.binary_cross_entropy_with_logits(logits, labels[batch]))

        def check() -> float:
            return log_loss(log.likes[split.validation], self.logits(log, held))

        kept_best(network, epoch, check, epochs=settings.epochs, patience=settings.patience)

    def state(self) -> dict[str, Tensor]:
        """Return what was learned."""
        return {**self._learned().state_dict(), "mean": torch.tensor(self._mean, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what was learned before."""
        network = DinNetwork(self.settings, items=len(state["items.weight"]))
        network.load_state_dict({name: value for name, value in state.items() if name != "mean"})
        self._network, self._mean = network.eval(), float(state["mean"])

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return the log odds of a like."""
        network = self._learned()
        return self._each(log, queries, lambda inputs: network.logit(network(*inputs), inputs[0]))

    def user_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return the mean of the latest events' embeddings beside the user's levels, `[queries, width + 3]`."""
        network = self._learned()

        def mean(part: slice) -> Tensor:
            asked = queries.take(part)
            _, items, stars, seen, level = self._inputs(log, asked, asked.latest(self.settings.length))
            events = network.history(items, stars) * seen[:, :, None]
            return torch.cat([events.sum(1) / seen.sum(1, keepdim=True).clamp(min=1), level], dim=1)

        return chunked(mean, len(queries), size=SCORED)

    def pair_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return the last hidden layer, which has seen the target, `[queries, hidden]`."""
        network = self._learned()
        return self._each(log, queries, lambda inputs: network(*inputs))

    def _each(self, log: Interactions, queries: Queries, work: Callable[[tuple[Tensor, ...]], Tensor]) -> Floats:
        def part(chosen: slice) -> Tensor:
            asked = queries.take(chosen)
            return work(self._inputs(log, asked, self._chosen(log, asked)))

        return chunked(part, len(queries), size=SCORED)

    def _learned(self) -> DinNetwork:
        if self._network is None:
            raise unfitted(self.name)
        return self._network

    def _inputs(self, log: Interactions, queries: Queries, rows: Ints) -> tuple[Tensor, ...]:
        seen = rows >= 0
        return (
            torch.from_numpy(queries.items),
            torch.from_numpy(log.items[rows]),
            torch.from_numpy(log.levels[rows]),
            torch.from_numpy(seen.astype(np.float32)),
            torch.from_numpy(level_features(log, queries, mean=self._mean)),
        )
