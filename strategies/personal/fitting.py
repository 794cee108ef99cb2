"""Few2Many: the recommender has learned from everything; meta-LoRAs and gates learn from a small sample."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from lora.errors import ModelError
from strategies.personal.asking import Asked
from strategies.personal.recommenders.protocol import Recommender
from strategies.personal.recommenders.training import batches, seeded
from tasks.recommendation.answers import loss, packed
from tasks.recommendation.interactions import Floats, Interactions, Ints
from tasks.recommendation.metrics import auc, log_loss
from tasks.recommendation.splits import Split

if TYPE_CHECKING:
    from strategies.personal.personalized import Personalized


def few(rows: Ints, count: int, *, seed: int) -> Ints:
    """Draw `count` rows uniformly, or all where there are fewer; a larger draw holds the smaller ones."""
    drawn = np.random.default_rng(seed).permutation(len(rows))[:count]
    return np.sort(rows[drawn])


def without_sample(split: Split, count: int, *, seed: int) -> Split:
    """Leave the rows that adapters will learn from (`few`, with the same seed) out of the training rows.

    What is fitted on the rest, such as a reader or recommenders whose vectors have seen the target, does not know the
    sample's answers; adapters that learned beside one that does would learn to repeat it.
    """
    return replace(split, train=np.setdiff1d(split.train, few(split.train, count, seed=seed)))


def cross_fitted(
    make: Callable[[], Recommender], log: Interactions, split: Split, *, folds: int = 3, seed: int = 0
) -> Floats:
    """Return log odds of the training rows, each from a recommender that did not learn from that row, `[len(log)]`.

    NaN elsewhere. What is trained beside a recommender must see scores as they will be for new rows: those of rows
    that it has learned from are too good, and leave too little to learn. Raises ModelError for fewer than 2 folds.
    """
    if folds < 2:
        raise ModelError(f"folds={folds}: every row needs a model that did not see it; give 2 or more")
    found = np.full(len(log), np.nan)
    fold = np.random.default_rng(seed).permutation(len(split.train)) % folds
    for number in range(folds):
        recommender = make()
        inside = Split(f"{split.name}, fold {number}", split.train[fold != number], split.validation, split.test)
        recommender.fit(log, inside, seed=seed)
        rows = split.train[fold == number]
        found[rows] = recommender.logits(log, log.queries(rows))
    return found


class Fitting:
    """One training of a `Personalized`."""

    def __init__(
        self, owner: "Personalized", log: Interactions, split: Split, *, seed: int, scores: Floats | None
    ) -> None:
        self.owner, self.config, self.log, self.seed = owner, owner.config, log, seed
        self.rows = few(split.train, self.config.sample, seed=seed)
        self.held = few(split.validation, self.config.checks, seed=0)
        queries, held = log.queries(self.rows), log.queries(self.held)
        owner.representation.fit(log, queries)
        self.vectors = owner.representation(log, queries).to(owner.base.placement.device)
        self.held_vectors = owner.representation(log, held).to(owner.base.placement.device)
        self.asked = owner.asking(log, queries, scores=None if scores is None else _known(scores, self.rows))
        self.held_asked = owner.asking(log, held)
        self.labels = log.likes[self.rows]

    def run(self) -> None:
        """Train, and keep the state of the best check; that of the start is one of them."""
        with seeded(self.seed):
            parts = self.owner.build(inputs=self.vectors.shape[1], seed=self.seed)
            self._calibrate()
            modules = parts.modules()
            optimizer, schedule = self._optimizer()
            self.owner.curve = [self._check()]
            best = copy.deepcopy(modules.state_dict())
            for _ in range(self.config.epochs):
                modules.train()
                for chosen in self._batches():
                    self._step(chosen, optimizer)
                    schedule.step()
                modules.eval()
                self.owner.curve.append(self._check())
                if self.owner.curve[-1] == min(self.owner.curve):
                    best = copy.deepcopy(modules.state_dict())
            modules.load_state_dict(best)
            modules.eval().requires_grad_(False)

    def _calibrate(self) -> None:
        """Weigh the recommender and the unadapted model by logistic regression: where every arm starts from."""
        parts = self.owner.parts
        parts.modules().eval()
        if len(np.unique(self.labels)) < 2:
            return
        odds = self._unadapted(self.asked)
        columns = np.stack([self.asked.offsets, odds], axis=1)
        fitted = LogisticRegression(C=100.0).fit(columns, self.labels)
        with torch.no_grad():
            calibration = parts.calibration
            calibration.bias.fill_(float(fitted.intercept_[0]))
            calibration.offset.fill_(float(fitted.coef_[0, 0]))
            # An encoder's head starts at zero: there is nothing to weigh yet, and a weight of zero would stay.
            calibration.language.fill_(float(fitted.coef_[0, 1]) if odds.any() else 1.0)

    def _unadapted(self, asked: Asked) -> Floats:
        plain = Asked(asked.tokens, np.zeros(len(asked)))
        calibration = self.owner.parts.calibration
        found = self.owner.answered(plain, lambda rows: self.owner.mixed(self.vectors[rows]))
        return (found - float(calibration.bias.detach())) / float(calibration.language.detach())

    def _optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        parts, config = self.owner.parts, self.config
        adapters = [*parts.meta.parameters(), *parts.answering.parameters(), *parts.calibration.parameters()]
        groups = [{"params": adapters, "lr": config.rate}]
        if gates := [*parts.gate.parameters()]:
            groups.append({"params": gates, "lr": config.gate_rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=config.decay)
        steps = max(1, config.epochs * -(-len(self.rows) // config.batch))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))

    def _batches(self) -> Iterator[Ints]:
        return batches(np.arange(len(self.rows)), self.config.batch)

    def _step(self, chosen: Ints, optimizer: torch.optim.Optimizer) -> None:
        owner = self.owner
        batch = packed(self.asked.tokens, chosen, pad=owner.parts.answering.pad)
        scores = owner.scored(batch, self.asked.offsets[chosen], owner.mixed(self.vectors[torch.from_numpy(chosen)]))
        labels = torch.from_numpy(self.labels[chosen].astype(np.float32)).to(scores.device)
        optimizer.zero_grad()
        torch.autograd.backward([loss(scores, labels)])
        optimizer.step()

    def _check(self) -> float:
        odds = self.owner.answered(self.held_asked, lambda rows: self.owner.mixed(self.held_vectors[rows]))
        return log_loss(self.log.likes[self.held], odds)


def _known(scores: Floats, rows: Ints) -> Floats:
    if not np.isfinite(scores[rows]).all():
        raise ModelError("training_scores lacks some training rows; make it by cross_fitted(..., log, split)")
    return scores[rows]


@dataclass(frozen=True)
class CurvePoint:
    """How well an arm does that saw `sample` rows."""

    sample: int
    auc: float
    log_loss: float
    kept_epoch: int
    """0 where no adapter was better than any on validation."""
    logits: Floats
    """The log odds of the rows that were asked about."""


def learning_curve(
    make: Callable[[int], "Personalized"],
    log: Interactions,
    split: Split,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    training_scores: Floats | None = None,
    rows: Ints | None = None,
) -> list[CurvePoint]:
    """Fit `make(sample)` for every sample size and ask it about `rows` (the test rows); smaller samples are in larger.

    The base is handed back after each.
    """
    asked = split.test if rows is None else rows
    points = []
    for size in sizes:
        one = make(size)
        one.fit(log, split, seed=seed, training_scores=training_scores)
        odds, labels = one.logits(log, log.queries(asked)), log.likes[asked]
        points.append(CurvePoint(size, auc(labels, odds), log_loss(labels, odds), int(np.argmin(one.curve)), odds))
        one.adapted.detach()
    return points
