"""GS-LoRA and GS-LoRA++: a fresh adapter on the feed-forward networks forgets a request, sparse by block.

Zhao et al., "Continual Forgetting for Pre-trained Vision Models", CVPR 2024 (arXiv 2403.11530); GS-LoRA++, T-PAMI 2026
(arXiv 2501.09705). As the released code: an adapter on both linear layers of every block's feed-forward network, drawn
anew for every request and merged after it; a group's norm without a weight for its size; the prototype loss on the
features before the head. Otherwise than the code: prototypes are the original model's (as the paper says), the head is
a plain softmax with a bound that fits it, every row is bounded and not the mean of a batch, the group lasso takes a
proximal step and waits until rows are forgotten, and there is no moving average (the code's evaluates the base).
"""

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.codec import Part
from lora.config import AdapterConfig
from lora.errors import DataError
from lora.merge import merge
from lora.model import AdaptedModel
from strategies.unlearning.class_request import BlockNorms, ClassRequest, Outcome, Tracing
from strategies.unlearning.classifier import Classifier, Gathered, cosine, gathered, passes, recycled, step
from strategies.unlearning.config import BudgetConfig, GsLoraConfig
from strategies.unlearning.group_lasso import ProximalGroups, grouped, norm, penalty, update_norms
from strategies.unlearning.prototypes import Prototypes
from tasks.encoders import Rows

RECENT = 8
"""Most steps that `wait` looks back over; fewer where a pass has fewer."""

Factors = dict[tuple[Part, str], nn.Parameter]


def forget_bound(config: GsLoraConfig, classes: int) -> float:
    """Return BND, nats: where the loss of a forgotten row need rise no further."""
    return config.bound * math.log(classes)


def bounded_forgetting(losses: Tensor, bound: float, *, by_example: bool) -> Tensor:
    """Return the forget loss: mean of ReLU(BND - CE) over rows, or ReLU(BND - mean CE) (the released code)."""
    return F.relu(bound - losses).mean() if by_example else F.relu(bound - losses.mean())


def holding(logits: Tensor, gone: Tensor, bound: float) -> Tensor:
    """Return the mean over rows of ReLU(BND + log p(any forgotten class)), nats.

    Not in the papers, whose losses know nothing of earlier requests. It asks for no row of theirs: whatever is asked,
    the forgotten classes are not to be the answer.
    """
    return F.relu(bound + logits[:, gone].logsumexp(1) - logits.logsumexp(1)).mean()


@dataclass
class Proposal:
    """A trained adapter that is not merged: the base holds the same bits as before, and answers with it.

    Measure it as any classifier, then `merge` or `discard` it, once.
    """

    classifier: Classifier
    adapted: AdaptedModel
    factors: Factors
    outcome: Outcome[Classifier]

    def logits(self, rows: Rows) -> Tensor:
        """Return logits `[rows, classes]` of the base with the adapter."""
        with self.adapted.bound(self.factors):
            return self.classifier.logits(rows)

    def features(self, rows: Rows) -> Tensor:
        """Return features `[rows, width]` of the base with the adapter."""
        with self.adapted.bound(self.factors):
            return self.classifier.features(rows)

    def merge(self) -> Outcome[Classifier]:
        """Fold the adapter into the weights; the classifier answers as the proposal did, and takes a new one."""
        merge(self.adapted, self.factors)
        return self.outcome

    def discard(self) -> Classifier:
        """Take the adapter out and return the classifier as it was."""
        self.adapted.detach()
        return self.classifier


class GsLora:
    """The method with its settings; no state is kept between requests."""

    def __init__(self, config: GsLoraConfig | None = None, *, name: str | None = None) -> None:
        self.config = config or GsLoraConfig()
        self.name = name or ("GS-LoRA++" if self.config.prototypes else "GS-LoRA")

    def forget(
        self, classifier: Classifier, request: ClassRequest, budget: BudgetConfig, *, seed: int
    ) -> Outcome[Classifier]:
        """Train an adapter and merge it."""
        return self.propose(classifier, request, budget, seed=seed).merge()

    def propose(self, classifier: Classifier, request: ClassRequest, budget: BudgetConfig, *, seed: int) -> Proposal:
        """Train a fresh adapter on a copy of the classifier; only its factors move.

        Raises DataError for a class that the classifier lacks, and for GS-LoRA++ without prototypes.
        """
        request.check(classifier.classes)
        if self.config.prototypes and request.prototypes is None:
            raise DataError("GS-LoRA++ needs prototypes of the original model; take them with Prototypes.of")
        begun = time.process_time()
        training = _Training(self.config, classifier.copied(), request, budget, seed=seed)
        training.run()
        outcome = Outcome(
            training.classifier,
            self.name,
            steps=training.total,
            cpu_s=time.process_time() - begun,
            trace=training.traced.trace,
            blocks=training.norms(),
        )
        return Proposal(training.classifier, training.adapted, training.factors, outcome)


class _Training:
    """One request's adapter while it trains."""

    def __init__(
        self, config: GsLoraConfig, classifier: Classifier, request: ClassRequest, budget: BudgetConfig, *, seed: int
    ) -> None:
        self.config, self.classifier, self.request, self.budget = config, classifier, request, budget
        self.total = request.steps(budget)
        self.rng = np.random.default_rng(seed)
        shape = AdapterConfig(rank=config.rank, alpha=config.alpha, targets="ffn", frame_seed=seed)
        self.adapted = AdaptedModel.attach(classifier.encoder.module, shape)
        self.factors = _fresh(self.adapted)
        device = classifier.device
        self.gone = torch.tensor(request.gone, device=device)
        known = request.prototypes if config.prototypes else None
        self.prototypes = None if known is None else known.to(device)
        self.groups = grouped(self.factors, config.group)
        self.optimizer = torch.optim.AdamW(self.factors.values(), lr=config.rate, weight_decay=config.weight_decay)
        self.proximal = ProximalGroups(self.groups, self.optimizer)
        self.traced = Tracing(passes(len(request.retain), budget.batch))
        self.started = False
        self.reached: deque[float] = deque(maxlen=min(self.traced.every, RECENT))
        self.factor_norms: list[Mapping[str, float]] = []
        self.updates: list[Mapping[str, float]] = []

    def run(self) -> None:
        """Take every step of the budget."""
        prepared = [self.classifier.encoder.prepared(rows) for rows in (self.request.forget, self.request.retain)]
        drawn = [(rows, recycled(len(rows), self.budget.batch, rng=self.rng)) for rows in prepared]
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda now: cosine(now, self.total))
        self._note()
        for number in range(self.total):
            weight = self._sparsity(number)
            if not self.proximal.alive:
                break
            with self.adapted.bound(self.factors):
                gone, kept = (gathered(self.classifier, rows, next(places)) for rows, places in drawn)
                parts = self._losses(gone, kept)
                loss = parts["loss"]
                if self.config.structure == "subgradient":
                    loss = loss + weight * penalty(self.groups)
                step(self.optimizer, loss)
            if self.config.structure == "proximal":
                self.proximal.step(weight)
            schedule.step()
            self.reached.append(float(parts["at_bound"]))
            if self.traced.add(**{name: float(value.detach()) for name, value in parts.items()}):
                self._note()

    def _sparsity(self, number: int) -> float:
        """Return the weight of the group lasso at a step; once started it stays."""
        full = len(self.reached) == self.reached.maxlen
        reached = self.config.wait == 0 or (full and float(np.mean(self.reached)) >= self.config.wait)
        self.started = self.started or (number >= self.config.warmup * self.total and reached)
        return self.config.sparsity if self.started else 0.0

    def _losses(self, forget: Gathered, retain: Gathered) -> dict[str, Tensor]:
        bound = forget_bound(self.config, self.classifier.classes)
        kept, kept_logits = self.classifier.answer(retain.inputs)
        gone, gone_logits = self.classifier.answer(forget.inputs)
        staying = F.cross_entropy(kept_logits, retain.labels)
        losses = F.cross_entropy(gone_logits, forget.labels, reduction="none")
        by_example = self.config.bound_by == "example"
        leaving = bounded_forgetting(losses, bound, by_example=by_example)
        loss = staying + self.config.forget_weight * leaving
        found = {"retain": staying, "forget": losses.mean(), "bounded": leaving}
        reached = losses if by_example else losses.mean()
        found["at_bound"] = (reached >= bound).float().mean()
        if self.config.hold_weight:
            bound = self.config.hold_bound * math.log(self.classifier.classes)
            found["held"] = holding(torch.cat([gone_logits, kept_logits]), self.gone, bound)
            loss = loss + self.config.hold_weight * found["held"]
        if self.prototypes is not None:
            held = prototype_loss(self.config, self.prototypes, (gone, forget.labels), (kept, retain.labels))
            found["prototypes"] = held
            loss = loss + held
        return {"loss": loss, **found}

    def _note(self) -> None:
        self.factor_norms.append({name: float(norm(group).detach()) for name, group in self.groups.items()})
        self.updates.append(update_norms(self.adapted, self.factors, self.config.group))

    def norms(self) -> BlockNorms:
        """Return the norms over time and the groups that carry the update."""
        last = self.updates[-1]
        least = self.config.selected_share * max(last.values()) if self.config.structure == "subgradient" else 0.0
        selected = tuple(name for name, value in last.items() if value > least)
        return BlockNorms(self.factor_norms, self.updates, selected)


def prototype_loss(
    config: GsLoraConfig, prototypes: Prototypes, forget: tuple[Tensor, Tensor], retain: tuple[Tensor, Tensor]
) -> Tensor:
    """Return w_f ReLU(BND_pro - D(forget)) + w_r D(retain), D in units of the mean divergence between classes.

    Pairs are features `[rows, width]` and labels `[rows]`. The unit makes the weights mean the same for features of any
    scale: those of a text encoder here lie on a sphere, where D is hundredths of a nat.
    """
    unit = prototypes.between()
    bound = config.prototype_bound or unit
    push = F.relu(bound - prototypes.divergence(*forget)) if bool(prototypes.known[forget[1]].any()) else 0.0
    pull = prototypes.divergence(*retain, beyond_spread=config.prototype_spread)
    return (config.prototype_forget * push + config.prototype_retain * pull) / unit


def _fresh(adapted: AdaptedModel) -> Factors:
    """Return a drawn A and a zero B of every site, both to be trained."""
    start: dict[tuple[Part, str], Tensor] = {}
    for site in adapted.sites:
        start["A", site.name] = adapted.frame.matrices[site.name].clone()
        start["B", site.name] = torch.zeros(site.d_out, adapted.frame.rank, device=start["A", site.name].device)
    return {key: nn.Parameter(value) for key, value in start.items()}
