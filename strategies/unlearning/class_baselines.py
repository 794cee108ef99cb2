"""What GS-LoRA is measured against: methods that train the whole classifier, on the same steps and the same rows.

All of them go without dropout, so that the steps see what a user would. A rate too high for one method says
nothing of it: every method has its own, to be chosen on validation rows.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import ConfigError, nearest
from strategies.unlearning.class_request import ClassRequest, Method, Outcome, Tracing
from strategies.unlearning.classifier import Classifier, Gathered, cosine, fit, gathered, passes, recycled, step
from strategies.unlearning.config import BudgetConfig, FitConfig, GsLoraConfig
from strategies.unlearning.gs_lora import bounded_forgetting, forget_bound


@dataclass(frozen=True)
class Drawn:
    """The rows of one step, the classifier's present answers to them, and how much of the training is over (0 to 1)."""

    student: Classifier
    forget: Gathered
    retain: Gathered
    progress: float

    def of_forgotten(self, values: Tensor) -> Tensor:
        """Pick the entries `[rows, ...]` of the rows to forget from those of all such rows."""
        return values[torch.from_numpy(self.forget.places).to(values.device)].to(self.student.device)

    def forget_logits(self) -> Tensor:
        """Answer the rows to forget; gradients flow."""
        return self.student.answer(self.forget.inputs)[1]

    def forget_losses(self) -> Tensor:
        """Return the cross entropy of every row to forget, `[rows]`."""
        return F.cross_entropy(self.forget_logits(), self.forget.labels, reduction="none")

    def retain_logits(self) -> Tensor:
        """Answer the retained rows; gradients flow."""
        return self.student.answer(self.retain.inputs)[1]

    def retain_loss(self) -> Tensor:
        """Return the mean cross entropy of the retained rows."""
        return F.cross_entropy(self.retain_logits(), self.retain.labels)


class Objective(Protocol):
    """What a method goes down; one optimizer step for every loss it yields."""

    def losses(self, drawn: Drawn) -> Iterator[Tensor]:
        """Yield the losses of one step."""


Maker = Callable[[Classifier, ClassRequest, int], Objective]
"""Makes a method's objective of the classifier as it was before the request (its own copy), the request and a seed."""


class GradientAscent:
    """Climb the loss of the forgotten rows, with nothing to hold the rest (Jang et al., ACL 2023)."""

    def __init__(self, before: Classifier, request: ClassRequest, seed: int) -> None: ...

    def losses(self, drawn: Drawn) -> Iterator[Tensor]:
        """Yield minus the forget loss."""
        yield -drawn.forget_losses().mean()


class GradientDifference:
    """Climb the loss of the forgotten rows and go down that of the retained (Liu et al., CoLLAs 2022)."""

    def __init__(self, before: Classifier, request: ClassRequest, seed: int) -> None: ...

    def losses(self, drawn: Drawn) -> Iterator[Tensor]:
        """Yield the difference."""
        yield drawn.retain_loss() - drawn.forget_losses().mean()


class NegativePreference:
    """NPO with a retain loss (Zhang et al., COLM 2024): 2/beta E log(1 + (p / p_before)^beta)."""

    beta = 0.1

    def __init__(self, before: Classifier, request: ClassRequest, seed: int) -> None:
        labels = torch.from_numpy(np.asarray(request.forget.labels, dtype=np.int64))
        self.before = -F.cross_entropy(before.logits(request.forget), labels, reduction="none")

    def losses(self, drawn: Drawn) -> Iterator[Tensor]:
        """Yield the preference loss and the retain loss."""
        ratio = -drawn.forget_losses() - drawn.of_forgotten(self.before)
        yield 2 / self.beta * F.softplus(self.beta * ratio).mean() + drawn.retain_loss()


class RandomLabels:
    """Learn another label for every forgotten row: preference optimisation, of a classifier. Labels are drawn once."""

    def __init__(self, before: Classifier, request: ClassRequest, seed: int) -> None:
        others = np.setdiff1d(np.arange(before.classes), request.classes)
        drawn = np.random.default_rng(seed).choice(others, size=len(request.forget))
        self.labels = torch.from_numpy(drawn)

    def losses(self, drawn: Drawn) -> Iterator[Tensor]:
        """Yield the loss with the other labels, and the retain loss."""
        yield F.cross_entropy(drawn.forget_logits(), drawn.of_forgotten(self.labels)) + drawn.retain_loss()


class Scrub:
    """SCRUB (Kurmanji et al., NeurIPS 2023): away from the teacher on forgotten rows, near it on retained ones.

    A step away and a step near take turns for the first part of the training, then only steps near.
    """

    away = 0.6
    """Part of the training with steps away."""
    retained = 1.0
    """Weight of the retained rows' own labels beside the teacher."""

    def __init__(self, before: Classifier, request: ClassRequest, seed: int) -> None:
        self.forget = F.log_softmax(before.logits(request.forget), dim=1)
        self.retain = F.log_softmax(before.logits(request.retain), dim=1)

    def losses(self, drawn: Drawn) -> Iterator[Tensor]:
        """Yield the step away while it is time, and the step near."""
        if drawn.progress < self.away:
            yield -_from_teacher(self.forget, drawn.forget, drawn.forget_logits())
        logits = drawn.retain_logits()
        near = _from_teacher(self.retain, drawn.retain, logits)
        yield near + self.retained * F.cross_entropy(logits, drawn.retain.labels)


def _from_teacher(teacher: Tensor, rows: Gathered, logits: Tensor) -> Tensor:
    target = teacher[torch.from_numpy(rows.places)].to(logits.device)
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)


class ElasticWeights:
    """The bounded forget loss with every weight anchored by its Fisher information (EWC*, as GS-LoRA's authors do).

    The diagonal is taken on retained rows, row by row, with their own labels (empirical Fisher).
    """

    strength = 100.0
    rows = 32
    """Most retained rows of the Fisher information."""

    def __init__(self, before: Classifier, request: ClassRequest, seed: int) -> None:
        self.bound = forget_bound(GsLoraConfig(), before.classes)
        self.start = [weight.detach().clone() for weight in before.parameters()]
        self.fisher = [torch.zeros_like(weight) for weight in self.start]
        rows = before.encoder.prepared(request.retain)
        chosen = np.random.default_rng(seed).permutation(len(rows))[: self.rows]
        before.training(dropout=False)
        for place in chosen:
            row = gathered(before, rows, np.array([place]))
            loss = F.cross_entropy(before.answer(row.inputs)[1], row.labels)
            found = torch.autograd.grad(loss, before.parameters(), allow_unused=True)
            for total, gradient in zip(self.fisher, found, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=1 / len(chosen))
        before.evaluating()

    def losses(self, drawn: Drawn) -> Iterator[Tensor]:
        """Yield retain loss, forget loss and anchor."""
        moved = zip(self.fisher, drawn.student.parameters(), self.start, strict=True)
        anchor = torch.stack([(fisher * (weight - start).square()).sum() for fisher, weight, start in moved]).sum()
        leaving = bounded_forgetting(drawn.forget_losses(), self.bound, by_example=True)
        yield drawn.retain_loss() + leaving + 0.5 * self.strength * anchor


@dataclass(frozen=True)
class Tuned:
    """A baseline that trains all weights down an objective."""

    name: str
    maker: Maker
    rate: float
    weight_decay: float = 0.0

    def forget(
        self, classifier: Classifier, request: ClassRequest, budget: BudgetConfig, *, seed: int
    ) -> Outcome[Classifier]:
        """Train a copy of the classifier with AdamW, its rate falling along a cosine."""
        request.check(classifier.classes)
        begun = time.process_time()
        student = classifier.copied()
        objective = self.maker(student, request, seed)
        total = request.steps(budget)
        traced = Tracing(passes(len(request.retain), budget.batch))
        student.training(dropout=False)
        weights = student.parameters()
        optimizer = torch.optim.AdamW(weights, lr=self.rate, weight_decay=self.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda now: cosine(now, total))
        for number, (forget, retain) in enumerate(_steps(student, request, budget, seed=seed)):
            found = []
            for loss in objective.losses(Drawn(student, forget, retain, number / total)):
                step(optimizer, loss)
                found.append(float(loss.detach()))
            schedule.step()
            traced.add(loss=sum(found))
        student.evaluating()
        return Outcome(student, self.name, total, time.process_time() - begun, traced.trace)


def _steps(
    student: Classifier, request: ClassRequest, budget: BudgetConfig, *, seed: int
) -> Iterator[tuple[Gathered, Gathered]]:
    """Yield the rows of every step, the same for every method of a seed."""
    rng = np.random.default_rng(seed)
    parts = [student.encoder.prepared(rows) for rows in (request.forget, request.retain)]
    drawn = [(rows, recycled(len(rows), budget.batch, rng=rng)) for rows in parts]
    for _ in range(request.steps(budget)):
        forget, retain = (gathered(student, rows, next(places)) for rows, places in drawn)
        yield forget, retain


@dataclass(frozen=True)
class Retrain:
    """Train the classifier that never saw the task on the replay sample, for as many steps as the others take."""

    config: FitConfig = field(default_factory=FitConfig)
    name: str = "retrain"

    def forget(
        self, classifier: Classifier, request: ClassRequest, budget: BudgetConfig, *, seed: int
    ) -> Outcome[Classifier]:
        """Return a classifier that shares no trained weight with the one that is given."""
        request.check(classifier.classes)
        begun = time.process_time()
        fresh = classifier.fresh(seed)
        settings = self.config.model_copy(update={"batch": budget.batch})
        steps = fit(fresh, request.retain, settings, seed=seed, steps=request.steps(budget))
        return Outcome(fresh, self.name, steps, time.process_time() - begun)


OBJECTIVES: Mapping[str, tuple[Maker, float]] = {
    "gradient ascent": (GradientAscent, 2e-5),
    "gradient difference": (GradientDifference, 5e-5),
    "NPO": (NegativePreference, 1e-4),
    "random labels": (RandomLabels, 1e-4),
    "SCRUB": (Scrub, 5e-5),
    "EWC": (ElasticWeights, 1e-4),
}
"""The baselines that tune, each with a rate to start from."""


def baseline(name: str, *, rate: float | None = None) -> Method:
    """Return a baseline by name. Raises ConfigError for an unknown one."""
    if name == "retrain":
        return Retrain() if rate is None else Retrain(FitConfig(rate=rate))
    if name not in OBJECTIVES:
        raise ConfigError(f"no baseline is called '{name}'{nearest(name, {'retrain', *OBJECTIVES})}")
    maker, usual = OBJECTIVES[name]
    return Tuned(name, maker, rate or usual)
