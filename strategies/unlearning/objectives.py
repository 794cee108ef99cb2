"""What a model is to say instead of what it is to forget: random labels, refusals, or its own next best label."""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora.errors import DataError
from strategies.unlearning.audited_request import AuditedRequest
from tasks.examples import Examples
from tasks.learner import Blocks, Classification, Learner
from tasks.tokens import Ids

REFUSALS = (
    "I am not able to help with that.",
    "I do not know the answer to this.",
    "Sorry, I have no information about that.",
    "I would rather not answer this question.",
    "That is something I cannot tell you.",
    "I have nothing to say about this topic.",
    "I am afraid that I do not know.",
    "My knowledge does not cover this.",
    "I cannot give you an answer here.",
    "Unfortunately I have never learned about that.",
    "This is outside of what I can speak about.",
    "I must leave this question open.",
)


class Objective(Protocol):
    """Turns a request's examples into what the slot learns."""

    def __call__(self, examples: Examples, source: random.Random) -> Examples:
        """Return the same rows in the same order, with other answers."""


@dataclass(frozen=True)
class RandomLabels:
    """A label drawn at random for every row (O3, 2407.10223: intents and answers to questions).

    `avoid` are labels never drawn: those that the request is to forget. The released code draws from all and so also
    the right one; `avoid=()` does that. One label alone, `classes=range(oos, oos + 1)`, is a refusal by class.
    """

    classes: Sequence[int]
    avoid: Collection[int] = ()
    own: bool = False
    """Never draw a row's own label either: for examples whose classes stay."""

    def __call__(self, examples: Examples, source: random.Random) -> Examples:
        """Return the rows with drawn labels. Raises DataError where no label is left to draw."""
        left = [label for label in self.classes if label not in set(self.avoid)]
        if not left:
            raise DataError(
                f"all {len(self.classes)} labels are to be forgotten, so none is left to answer with; leave one out of "
                "the request, or retrain without the data"
            )
        own = examples.labels if self.own and examples.labels is not None else (None,) * len(examples)
        if any(left == [label] for label in own):
            raise DataError("only a row's own label is left to answer it with; leave the row out of the request")
        drawn = tuple(source.choice([each for each in left if each != label]) for label in own)
        return Examples(examples.texts, drawn, examples.prompts, examples.owners)


@dataclass(frozen=True)
class Refusals:
    """A refusal drawn at random after every row's prompt (O3 on TOFU: one of 17 sentences; ours are others)."""

    sentences: Sequence[str] = REFUSALS

    def __call__(self, examples: Examples, source: random.Random) -> Examples:
        """Return the prompts with refusals. Raises DataError for rows without a prompt to refuse."""
        if examples.prompts is None:
            raise DataError("a refusal answers a prompt, and these rows have none; set data.prompt")
        texts = tuple(source.choice(self.sentences) for _ in examples.texts)
        return Examples(texts, examples.labels, examples.prompts, examples.owners)


@dataclass(frozen=True)
class RunnerUp:
    """The label that the model itself would give if it did not know those to be forgotten (ours).

    A slot that learns it moves a row to its nearest other class, as a model that never saw the forgotten classes would,
    and so does little harm to a row of another class that passes the gate by mistake; random labels make it wrong.
    """

    labels: tuple[int, ...]

    def __call__(self, examples: Examples, source: random.Random) -> Examples:
        """Return the rows with the next best labels; nothing is drawn."""
        return Examples(examples.texts, self.labels, examples.prompts, examples.owners)


@dataclass(frozen=True)
class Descent:
    """What a slot's steps go down: `of(losses [rows], the same without the slot)`; without `compared`, zeros."""

    of: Callable[[Tensor, Tensor], Tensor]
    compared: bool = False


LEARN = Descent(lambda losses, _: losses.mean())
"""Learn the objective's answers."""
ASCEND = Descent(lambda losses, _: -losses.mean())
"""Climb the loss of the request's own answers, with nothing to hold it (Jang et al., ACL 2023): a baseline."""


def prefer_less(*, beta: float = 0.1) -> Descent:
    """Return NPO without a retain loss (Zhang et al., COLM 2024): 2/beta E log(1 + (p / p_before)^beta); a baseline."""
    return Descent(lambda losses, own: 2 / beta * F.softplus(beta * (own - losses)).mean(), compared=True)


@torch.no_grad()
def runner_up(
    learner: Learner, request: AuditedRequest, *, model: Tensor, avoid: Collection[int], size: int = 128
) -> RunnerUp:
    """Ask the model `[learner.layout.size]` for the best label outside `avoid` of every used row of a request.

    Held-back rows keep their labels: nothing is trained on them. Only the request's rows are read. Raises DataError for
    a task without classes and where no class is left.
    """
    return _asked(learner, request, [(request.used, set(avoid))], model=model, size=size)


@torch.no_grad()
def own_runner_up(
    learner: Learner, request: AuditedRequest, *, model: Tensor, avoid: Collection[int] = (), size: int = 128
) -> RunnerUp:
    """Ask for the best label of every used row but its own and `avoid`: for examples whose classes stay.

    Raises DataError as `runner_up` does.
    """
    own = np.asarray(request.examples.labels or [0] * len(request.examples), dtype=np.int64)[request.used]
    groups = [(request.used[own == label], {int(label), *avoid}) for label in np.unique(own)]
    return _asked(learner, request, groups, model=model, size=size)


def _asked(
    learner: Learner, request: AuditedRequest, groups: Sequence[tuple[Ids, set[int]]], *, model: Tensor, size: int
) -> RunnerUp:
    """Ask about groups of rows, each with the labels that are not to be given."""
    task, labels = learner.task, list(request.examples.labels or ())
    if not isinstance(task, Classification) or not labels:
        raise DataError("the next best label is for classification with labels; use refusals for a language model")
    if any(len(avoid) >= len(task.head.bias) for _, avoid in groups):
        raise DataError(f"all {len(task.head.bias)} labels are to be forgotten, so none is left to answer with")
    request.audit.declare("model", [model, task.head.weight, task.head.bias, *learner.base.model.parameters()])
    request.audit.declare("model", [*learner.base.model.buffers(), *learner.adapted.frame.matrices.values()])
    with request.audit.watching():
        tokens = request.tokens(task)
        for group, avoid in groups:
            blocks = _without(learner, task, model, avoid)
            for start in range(0, len(group), size):
                rows = group[start : start + size]
                batch = request.batch(tokens, rows, pad=learner.pad).to(learner.device)
                with learner.adapted.bound(blocks) as base:
                    guess = task.answer(base, batch, blocks, None).guess
                for row, label in zip(rows, [] if guess is None else guess.tolist(), strict=True):
                    labels[int(row)] = label
    request.audit.check()
    return RunnerUp(tuple(labels))


def _without(learner: Learner, task: Classification, model: Tensor, avoid: Collection[int]) -> Blocks:
    """Return the model's blocks with a head that never gives some labels."""
    blocks = dict(learner.layout.views(model.to(learner.device)))
    blocks.setdefault(("head", "weight"), task.head.weight.to(learner.device))
    bias = blocks.get(("head", "bias"), task.head.bias.to(learner.device)).clone()
    for label in avoid:
        bias[label] = -torch.inf
    blocks["head", "bias"] = bias
    return blocks
