"""RecLoRA beside one LoRA for everybody, recommenders and their stack: figures of the test rows, seed by seed."""

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora.config import AdapterConfig
from strategies.personal.config import ComparisonConfig, PersonalConfig
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.protocol import Recommender
from strategies.personal.recommenders.remembered import Remembered
from strategies.personal.recommenders.stack import Stack
from strategies.personal.router import GateReport
from strategies.personal.world import Listen, World, check_rows, silent
from tasks.recommendation.candidates import sampled
from tasks.recommendation.interactions import Floats, Interactions, Ints, Queries
from tasks.recommendation.metrics import Interval, Labels, likes, paired_bootstrap, ranking, ranks
from tasks.recommendation.splits import Split

RECOMMENDER, SINGLE, RECLORA = "recommender", "single-lora", "reclora"
STACK, STACK_WITH = "stack", "stack-with-reclora"
SINGLE_VARIANT = "single-lora-equal-parameters"


@dataclass
class Found:
    """Figures of one arm, one entry a seed, and its log odds of the test rows."""

    figures: dict[str, list[float]] = field(default_factory=dict)
    logits: list[Floats] = field(default_factory=list)
    stacked: list[Floats] = field(default_factory=list)
    rerouted: list[Floats] = field(default_factory=list)
    """Log odds with another user's gate."""
    evened: list[Floats] = field(default_factory=list)
    """Log odds with equal weights in place of the gate's."""

    def add(self, **values: float) -> None:
        """Note figures of one seed."""
        for name, value in values.items():
            self.figures.setdefault(name, []).append(value)

    def mean(self, name: str) -> float | None:
        """Return the mean over the seeds where it is defined; None where it was not measured."""
        values = self._defined(name)
        return statistics.fmean(values) if values else None

    def spread(self, name: str) -> float | None:
        """Return the sample standard deviation over seeds; None for fewer than two."""
        values = self._defined(name)
        return statistics.stdev(values) if len(values) > 1 else None

    def _defined(self, name: str) -> list[float]:
        """Return the seeds' figures but NaN: adapters that stayed at zero have no cosine."""
        return [value for value in self.figures.get(name, ()) if not math.isnan(value)]

    def told(self, name: str, digits: int = 4) -> str:
        """Return mean and spread in words; nothing where it was not measured."""
        mean, spread = self.mean(name), self.spread(name)
        return "" if mean is None else f"{mean:.{digits}f}" + ("" if spread is None else f" ±{spread:.{digits}f}")


def note(found: dict[str, Found], name: str, labels: Labels, logits: Floats) -> Found:
    """Note the scores of one arm and seed."""
    each = found.setdefault(name, Found())
    scores = likes(labels, logits)
    each.logits.append(logits)
    each.add(auc=scores.auc, log_loss=scores.log_loss, accuracy=scores.accuracy)
    return each


@dataclass(frozen=True)
class Asked:
    """What everybody is asked: likes of the test rows, and what comes next among candidates."""

    queries: Queries
    labels: Labels
    users: Ints
    others: Queries
    """The same questions on behalf of other users: what a swap test asks."""
    ranked: Queries
    """Candidates of the ranked rows, one after another; none where a user has rated every item."""
    width: int
    """Candidates of a ranked row."""

    @classmethod
    def of(cls, log: Interactions, split: Split, comparison: ComparisonConfig, *, seed: int) -> "Asked":
        """Draw the rows and candidates of rankings, and who is swapped with whom."""
        rng = np.random.default_rng(seed)
        queries = log.queries(split.test)
        rows = np.sort(rng.permutation(split.test)[: comparison.ranked])
        width = min(comparison.candidates, _unrated(log, rows))
        candidates = sampled(log, rows, count=width, seed=seed) if width else np.empty((0, 1), dtype=np.int64)
        ranked = log.queries(rows[: len(candidates)]).about(candidates)
        swapped = queries.with_history_of(swaps(log.users[split.test], rng))
        return cls(queries, log.likes[split.test], log.users[split.test], swapped, ranked, 1 + width)

    def ranking(self, one: Recommender, log: Interactions) -> dict[str, float]:
        """Return NDCG@10, Hit@10 and MRR of one recommender; nothing where there is nothing to rank."""
        if not len(self.ranked):
            return {}
        places = ranking(ranks(one.logits(log, self.ranked).reshape(-1, self.width)))
        return {"ndcg10": places.ndcg10, "hit10": places.hit10, "mrr": places.mrr}


def _unrated(log: Interactions, rows: Ints) -> int:
    """Return how many items the busiest of the rows' users never rates."""
    rated = (log.items[log.starts[user] : log.starts[user + 1]] for user in np.unique(log.users[rows]))
    return len(log.catalogue) - max(len(np.unique(items)) for items in rated)


def swaps(users: Ints, rng: np.random.Generator) -> Ints:
    """Return for every row the place of a row of another user, drawn uniformly; of the own one where all are."""
    found = rng.permutation(len(users))
    for place in np.flatnonzero(users[found] == users):
        others = np.flatnonzero(users != users[place])
        if len(others):
            found[place] = rng.choice(others)
    return found


def check_split(log: Interactions, split: Split) -> None:
    """Raise DataError where a part of the split has not both likes and dislikes."""
    for name in ("train", "validation", "test"):
        check_rows(log, getattr(split, name), f"{name} rows of the {split.name} split")


@dataclass
class Comparison:
    """Every arm over all seeds so far."""

    log: Interactions
    split: Split
    asked: Asked
    comparison: ComparisonConfig
    found: dict[str, Found] = field(default_factory=dict)
    gates: list[GateReport] = field(default_factory=list)

    def run(
        self, world: World, config: PersonalConfig, adapter: AdapterConfig, *, listen: Listen = silent
    ) -> dict[str, Personalized]:
        """Fit and ask every arm of one seed; returns the single LoRA and RecLoRA."""
        members = [Remembered(member) for member in world.members.values()]
        for name, member in zip(world.members, members, strict=True):
            self._note(name, member, world, listen)
        self._note(RECOMMENDER, world.scorer, world, listen)
        stack = Stack(members, fitted=True)
        stack.fit(self.log, self.split, seed=world.seed)
        self._note(STACK, stack, world, listen)
        arms = {name: self._fitted(name, world, config, adapter, listen) for name in self._names()}
        together = Stack([*members, arms[RECLORA]], fitted=True, name=STACK_WITH)
        together.fit(self.log, self.split, seed=world.seed)
        self._note(STACK_WITH, together, world, listen)
        ranked: dict[str, Recommender] = {
            RECOMMENDER: world.scorer, SINGLE: arms[SINGLE], RECLORA: arms[RECLORA], STACK: stack, STACK_WITH: together
        }  # fmt: skip
        for name, one in ranked.items():
            self.found[name].add(**self.asked.ranking(one, self.log))
        figures = {name: each.figures.get("ndcg10", [None])[-1] for name, each in self.found.items() if name in ranked}
        listen({"kind": "ranked", "seed": world.seed, "name": "rankings", "ndcg10": figures})
        return {name: arms[name].one for name in (SINGLE, RECLORA)}

    def _names(self) -> list[str]:
        return [SINGLE, *(name for name in self.comparison.arms if name != SINGLE_VARIANT), RECLORA]

    def _note(self, name: str, one: Recommender, world: World, listen: Listen, **more: Any) -> Found:
        each = note(self.found, name, self.asked.labels, one.logits(self.log, self.asked.queries))
        shown = {figure: each.figures[figure][-1] for figure in ("auc", "log_loss")}
        listen({"kind": "arm", "seed": world.seed, "name": name, **shown, **more})
        return each

    def _fitted(
        self, name: str, world: World, config: PersonalConfig, adapter: AdapterConfig, listen: Listen
    ) -> Remembered[Personalized]:
        begun = time.perf_counter()
        variant = {SINGLE: SINGLE_VARIANT, RECLORA: None}.get(name, name)
        arm = world.fitted(variant, config, adapter)
        seconds = round(time.perf_counter() - begun, 3)
        curve = {"numbers": arm.trained_parameters, "curve": arm.curve, "seconds": seconds}
        one = Remembered(arm)
        each = self._note(name, one, world, listen, **curve)
        each.add(numbers=arm.trained_parameters, kept_epoch=int(np.argmin(arm.curve)), seconds=seconds)
        if name == RECLORA:
            self._question(arm, each)
        return one

    def _question(self, arm: Personalized, each: Found) -> None:
        """Ask what the gate does, and how much worse another user's is."""
        self.gates.append(arm.routing(self.log, self.asked.queries))
        own, others = each.figures["auc"][-1], self.asked.others
        routed = likes(self.asked.labels, arm.logits(self.log, self.asked.queries, routed_as=others))
        whole = likes(self.asked.labels, arm.logits(self.log, others))
        each.add(swap_auc_drop=own - routed.auc, swap_history_auc_drop=own - whole.auc)

    def difference(self, one: str, other: str, *, seed: int = 0) -> Interval:
        """Return how much more AUC `one` has than `other`, the mean over seeds, with its interval over users."""
        pair = (np.stack(self.found[name].logits) for name in (one, other))
        draws, asked = self.comparison.draws, self.asked
        return paired_bootstrap(asked.labels, *pair, users=asked.users, draws=draws, seed=seed)
