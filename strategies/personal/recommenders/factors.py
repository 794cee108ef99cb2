"""Logistic matrix factorisation whose user part is fitted anew to the recent history at every query.

Item biases and factors are learned on training rows; a user's bias and factors are the ridge-penalised maximum of
the likelihood of the last events. With no factors this is item bias plus recent user level.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from strategies.personal.recommenders.protocol import unfitted
from strategies.personal.recommenders.training import batches, kept_best, seeded, step
from tasks.recommendation.interactions import Floats, Interactions, Queries
from tasks.recommendation.metrics import log_loss
from tasks.recommendation.splits import Split

NEWTON_STEPS = 4
CHUNK = 1024
"""Histories solved together."""


@dataclass(frozen=True)
class FactorSettings:
    """Sizes and search of the factorisation."""

    factors: int = 16
    lengths: tuple[int, ...] = (20, 50, 100)
    """Recent events that the user part may be fitted to; validation chooses."""
    ridges: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Penalties of the user's factors, chosen in the same way."""
    bias_ridge: float = 0.2
    rate: float = 5e-3
    batch: int = 1024
    decay: float = 0.03
    """L2 penalty of factors and biases per observed row, as a multiple of the squared entries that the row uses."""
    epochs: int = 60
    patience: int = 3
    """Checks, one in two epochs, without progress before the fit ends."""


class _Tables(nn.Module):
    def __init__(self, users: int, items: int, factors: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.users = nn.Parameter(torch.randn(users, 1 + factors) * 0.05)
        self.items = nn.Parameter(torch.randn(items, 1 + factors) * 0.05)

    def forward(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the squared size of what was used."""
        user, item = self.users[users], self.items[items]
        logits = self.mean + user[:, 0] + item[:, 0] + (user[:, 1:] * item[:, 1:]).sum(1)
        return logits, (user.square().sum(1) + item.square().sum(1))


class FoldedFactors:
    """Matrix factorisation with fold-in on recent history; `factors=0` leaves the recent level."""

    def __init__(self, settings: FactorSettings | None = None) -> None:
        self.settings = settings or FactorSettings()
        self.name = "MF, recent fold-in" if self.settings.factors else "item + recent level"
        self._items: Tensor | None = None
        self._mean = 0.0
        self._length, self._ridge = self.settings.lengths[-1], self.settings.ridges[0]

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        """Learn item factors on training rows; validation stops, and chooses history length and ridge."""
        with seeded(seed):
            self._learn(log, split)

    def _learn(self, log: Interactions, split: Split) -> None:
        tables = _Tables(len(log.user_names), len(log.catalogue), self.settings.factors)
        optimizer = torch.optim.Adam(tables.parameters(), lr=self.settings.rate)
        columns = [torch.from_numpy(x) for x in (log.users, log.items, log.likes.astype(np.float32))]
        middle = self.settings.lengths[len(self.settings.lengths) // 2]

        def epoch() -> None:
            for _ in range(2):
                for batch in batches(split.train, self.settings.batch):
                    users, items, likes = (column[batch] for column in columns)
                    logits, size = tables(users, items)
                    loss = functional.binary_cross_entropy_with_logits(logits, likes)
                    step(optimizer, loss + self.settings.decay * size.mean())

        def check() -> float:
            self._keep(tables, middle, self.settings.ridges[0])
            return self._loss(log, split)

        kept_best(tables, epoch, check, epochs=self.settings.epochs // 2, patience=self.settings.patience)
        choices = [(length, ridge) for length in self.settings.lengths for ridge in self.settings.ridges]
        losses = []
        for length, ridge in choices:
            self._keep(tables, length, ridge)
            losses.append(self._loss(log, split))
        self._keep(tables, *choices[int(np.argmin(losses))])

    def _keep(self, tables: _Tables, length: int, ridge: float) -> None:
        self._items, self._mean = tables.items.detach(), float(tables.mean)
        self._length, self._ridge = length, ridge

    def state(self) -> dict[str, Tensor]:
        """Return what was learned."""
        numbers = (self._mean, float(self._length), self._ridge)
        return {"items": self._learned(), "numbers": torch.tensor(numbers, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what was learned before."""
        mean, length, ridge = state["numbers"].tolist()
        self._items, self._mean, self._length, self._ridge = state["items"], mean, int(length), ridge

    def _loss(self, log: Interactions, split: Split) -> float:
        held = split.validation
        return log_loss(log.likes[held], self.logits(log, log.queries(held)))

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        """Return log odds from the user part that the recent history gives."""
        items = self._learned()[queries.items].double()
        user = torch.from_numpy(self.user_vectors(log, queries))
        return (self._mean + items[:, 0] + user[:, 0] + (user[:, 1:] * items[:, 1:]).sum(1)).numpy()

    def user_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return bias and factors of the users, `[queries, 1 + factors]`; zeros without a history."""
        self._learned()
        ends = np.stack([queries.first, queries.end], axis=1)
        # Ranking asks about many items of one history; it is solved once.
        distinct, place = np.unique(ends, axis=0, return_inverse=True)
        whole = Queries(distinct[:, 0], distinct[:, 1], *(np.zeros(len(distinct), dtype=np.int64),) * 2)
        parts = [self._solved(log, whole.take(slice(i, i + CHUNK))) for i in range(0, len(whole), CHUNK)]
        return torch.cat(parts).double().numpy()[place.reshape(-1)]

    def pair_vectors(self, log: Interactions, queries: Queries) -> Floats:
        """Return user part and item part side by side, `[queries, 2 + 2 factors]`."""
        return np.concatenate(
            [self.user_vectors(log, queries), self._learned()[queries.items].double().numpy()], axis=1
        )

    def _learned(self) -> Tensor:
        if self._items is None:
            raise unfitted(self.name)
        return self._items

    def _solved(self, log: Interactions, queries: Queries) -> Tensor:
        """Fit the user part to each history by Newton's method."""
        rows = queries.latest(self._length)
        seen = torch.from_numpy(rows >= 0)
        items = self._learned()[torch.from_numpy(log.items[rows])]
        likes = torch.from_numpy(log.likes[rows]).float()
        known = self._mean + items[:, :, 0]
        inputs = torch.cat([torch.ones_like(items[:, :, :1]), items[:, :, 1:]], dim=2) * seen[:, :, None]
        ridge = torch.full((inputs.shape[2],), self._ridge)
        ridge[0] = self.settings.bias_ridge
        user = torch.zeros(len(queries), inputs.shape[2])
        for _ in range(NEWTON_STEPS):
            share = torch.sigmoid(known + torch.bmm(inputs, user[:, :, None])[:, :, 0])
            slope = torch.bmm(inputs.transpose(1, 2), (likes - share)[:, :, None])[:, :, 0] - ridge * user
            bend = torch.bmm(inputs.transpose(1, 2), inputs * (share * (1 - share))[:, :, None]) + torch.diag(ridge)
            user = user + torch.linalg.solve(bend, slope)
        return user


def recent_level() -> FoldedFactors:
    """Item bias plus the user's level over the last events: what any personal method has to beat."""
    return FoldedFactors(FactorSettings(factors=0, lengths=(10, 20, 50), ridges=(1.0,)))
