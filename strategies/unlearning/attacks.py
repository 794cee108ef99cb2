"""Ways to find out that forgetting was superficial: probes of the features, membership inference, relearning."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lora.config import Section
from lora.errors import DataError
from strategies.unlearning.classifier import Classifier, Featured, gathered, recycled, step
from strategies.unlearning.measures import Answers, Floats
from tasks.encoders import Rows, labels_of

LEAST_SPREAD = 1e-3
"""Smallest standard deviation of a row's confidence among models, in log odds."""


def probe(model: Featured, train: Rows, test: Rows) -> float:
    """Return the accuracy on `test` of a linear classifier fitted to features of `train`.

    With rows of the forgotten classes alone it says what a new head would recover; compare with a model that was
    retrained without them, whose features also tell classes apart that it never saw. Raises DataError for fewer than
    two classes.
    """
    _check_classes(train)
    made = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    made.fit(model.features(train).numpy(), labels_of(train))
    return float(made.score(model.features(test).numpy(), labels_of(test)))


def nearest_prototype(model: Featured, train: Rows, test: Rows) -> float:
    """Return the accuracy on `test` of the nearest class mean of `train`; raises as `probe` does."""
    _check_classes(train)
    made = NearestCentroid().fit(model.features(train).numpy(), labels_of(train))
    return float(made.score(model.features(test).numpy(), labels_of(test)))


def _check_classes(rows: Rows) -> None:
    if len(np.unique(labels_of(rows))) < 2:
        raise DataError(
            "a probe tells classes apart: give rows of two or more, such as the forgotten and one that stays"
        )


def membership_auc(members: Floats, others: Floats) -> float:
    """Return how well a score tells members from others: 0.5 is nothing, 1 (or 0) is everything.

    Raises DataError where either is empty.
    """
    if len(members) == 0 or len(others) == 0:
        raise DataError("membership inference needs rows that were trained on and rows that never were")
    truth = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    return float(roc_auc_score(truth, np.concatenate([members, others])))


def loss_membership(members: Answers, others: Answers) -> float:
    """Return the AUC of minus the loss: of rows that were learned and then forgotten against rows never seen.

    Both should be of the same classes, or the AUC tells classes apart.
    """
    return membership_auc(-members.losses(), -others.losses())


def lira_membership(members: Answers, others: Answers, *, without: Sequence[tuple[Answers, Answers]]) -> float:
    """Return the AUC of a likelihood-ratio attack against models retrained without either kind of row.

    Offline LiRA (Carlini et al., 2022): a row's score is how many standard deviations its confidence lies above that of
    the retrained models on the same row. `without` holds their answers to members and others. With fewer than eight
    models the deviation is pooled over rows, as the paper does for few. Raises DataError without two models.
    """
    if len(without) < 2:
        raise DataError(f"{len(without)} retrained models: a spread among them needs two or more")
    scores = []
    for place, asked in enumerate((members, others)):
        out = np.stack([pair[place].confidence() for pair in without])
        spread = out.std(axis=0, ddof=1)
        if len(without) < 8:
            spread = np.full_like(spread, np.sqrt(np.mean(spread**2)))
        scores.append((asked.confidence() - out.mean(axis=0)) / np.maximum(spread, LEAST_SPREAD))
    return membership_auc(*scores)


class RelearningConfig(Section):
    """An attacker with some rows of the forgotten classes, who trains all weights on them."""

    rate: float = Field(1e-4, gt=0)
    """AdamW's rate, constant."""
    batch: int = Field(16, ge=1)
    """Rows of a step."""
    steps: int = Field(50, ge=1)
    """Most steps."""
    every: int = Field(5, ge=1)
    """Steps between measurements."""


@dataclass(frozen=True)
class Relearning:
    """Accuracy on unseen rows of the forgotten classes after so many steps, and when it reached the target."""

    curve: tuple[tuple[int, float], ...]
    steps: int | None
    """None: never within the steps of the attack."""


def relearn(
    classifier: Classifier, rows: Rows, unseen: Rows, *, target: float, config: RelearningConfig, seed: int
) -> Relearning:
    """Train a copy of the classifier on `rows` until its accuracy on `unseen` is `target`; it stays as it is.

    Compare with a classifier that was retrained without them: what is forgotten takes as many steps as what was
    never known.
    """
    student = classifier.copied()
    rows, unseen = student.encoder.prepared(rows), student.encoder.prepared(unseen)
    wanted = set(labels_of(unseen).tolist())
    curve = [(0, Answers.of(student, unseen).accuracy(wanted))]
    drawn = recycled(len(rows), config.batch, rng=np.random.default_rng(seed))
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.rate, fused=True)
    while curve[-1][1] < target and curve[-1][0] < config.steps:
        student.training(dropout=False)
        taken = min(config.every, config.steps - curve[-1][0])
        for _ in range(taken):
            batch = gathered(student, rows, next(drawn))
            step(optimizer, F.cross_entropy(student.answer(batch.inputs)[1], batch.labels))
        student.evaluating()
        curve.append((curve[-1][0] + taken, Answers.of(student, unseen).accuracy(wanted)))
    return Relearning(tuple(curve), curve[-1][0] if curve[-1][1] >= target else None)
