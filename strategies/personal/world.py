"""What all arms of one seed share: recommenders, their scores of training rows, a language model."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from lora.config import AdapterConfig
from lora.errors import DataError, ModelError
from lora.targets import find_sites
from strategies.personal.asking import Asking
from strategies.personal.config import ComparisonConfig, PersonalConfig
from strategies.personal.fitting import cross_fitted, without_sample
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.boosted import Boosted
from strategies.personal.recommenders.din import Din
from strategies.personal.recommenders.factors import FoldedFactors
from strategies.personal.recommenders.protocol import Recommender, Representing
from strategies.personal.recommenders.sasrec import Sasrec
from strategies.personal.representation import Drawn, Recommended, Representation
from strategies.personal.retriever import SemanticRetriever
from strategies.personal.variants import equal_rank, variant, widened
from tasks.config import ModelConfig
from tasks.models import BaseModel, load_base
from tasks.recommendation.config import ReadingModelConfig
from tasks.recommendation.interactions import Floats, Interactions, Ints
from tasks.recommendation.reader import train_reader
from tasks.recommendation.splits import Split
from tasks.recommendation.texts import embedded

RECOMMENDERS: Mapping[str, Callable[[], Recommender]] = {
    "MF": FoldedFactors,
    "DIN": Din,
    "SASRec": Sasrec,
    "boosted": Boosted,
}
Listen = Callable[[Mapping[str, Any]], None]
"""Called with one record for every part that is done: its `kind`, `seed`, `name`, and figures."""
BaseOf = Callable[[Interactions, Split, int], BaseModel]
"""(log, split, seed) -> the language model of a seed."""
_ENCODERS = ("minilm", "tiny-bert")
_READER = "reader"


def silent(record: Mapping[str, Any]) -> None:
    """Listen to nothing."""


def base_of(config: ReadingModelConfig) -> BaseOf:
    """Return what makes the language model: a reader is trained for every seed, others are loaded once, now.

    Raises ModelError for a model that cannot be loaded.
    """
    if config.path is None and config.name == _READER:
        return lambda log, split, seed: train_reader(log, split, seed=seed)
    encoder = config.encoder
    if encoder is None:
        encoder = config.path is None and config.name in _ENCODERS
    loaded = load_base(config, causal=not encoder)
    return lambda log, split, seed: loaded


@dataclass(frozen=True)
class World:
    """One seed's recommenders, frozen, and language model, unadapted."""

    log: Interactions
    split: Split
    members: Mapping[str, Recommender]
    """The stack's, by name."""
    routers: tuple[Representing, ...]
    scorer: Recommender
    training_scores: Floats
    base: BaseModel
    seed: int

    @classmethod
    def made(
        cls, log: Interactions, split: Split, comparison: ComparisonConfig, *, base: BaseOf, sample: int, seed: int,
        listen: Listen = silent,
    ) -> "World":  # fmt: skip
        """Fit recommenders on the training rows; those that route, and the language model, on the rows without the
        `sample` that adapters will see (`without_sample`). Raises DataError where too few are left.
        """
        rest = without_sample(split, sample, seed=seed)
        check_rows(log, rest.train, f"training rows besides the {sample} of personal.sample")
        members: dict[str, Recommender] = {}
        for name in comparison.recommenders:
            members[name] = RECOMMENDERS[name]()
            members[name].fit(log, split, seed=seed)
            listen({"kind": "fitted", "seed": seed, "name": name})
        routers = tuple(_router(name, log, rest, seed) for name in comparison.routers)
        listen({"kind": "fitted", "seed": seed, "name": f"routing by {' and '.join(comparison.routers)}"})
        make = RECOMMENDERS[comparison.scorer]
        scores = cross_fitted(make, log, split, folds=comparison.folds, seed=seed)
        listen({"kind": "fitted", "seed": seed, "name": f"{comparison.scorer} on {comparison.folds} folds"})
        model = base(log, rest, seed)
        listen({"kind": "fitted", "seed": seed, "name": f"language model {model.reference}"})
        return cls(log, split, members, routers, members[comparison.scorer], scores, model, seed)

    def arm(self, name: str | None, config: PersonalConfig, adapter: AdapterConfig) -> Personalized:
        """Make an untrained arm on a copy of the base: a variant by name, or (None) RecLoRA as it is configured.

        Raises ConfigError for an unknown variant.
        """
        own = config if name is None else variant(name).personal(config)
        if name is not None and variant(name).widened:
            adapter = self._widened(config, adapter, own=own.frame == "own")
        base = replace(self.base, model=copy.deepcopy(self.base.model))
        chosen = partial(self.retriever.similar, count=own.history) if own.told == "similar" else None
        asking = Asking(
            base, scorer=self.scorer, base_score=own.base_score, history=own.history, max_length=own.max_length,
            chosen=chosen,
        )  # fmt: skip
        representation: Representation = Recommended(self.routers, own.routing)
        if own.gate == "random":
            representation = Drawn(width=len(find_sites(base.model, adapter.targets)) * own.meta_loras, seed=self.seed)
        return Personalized(base, adapter, own, asking=asking, representation=representation, name=name or "RecLoRA")

    @cached_property
    def retriever(self) -> SemanticRetriever:
        """What finds a short history by the item texts' MiniLM vectors, whatever model reads it."""
        minilm = load_base(ModelConfig(name="minilm", device="cpu"), causal=False)
        return SemanticRetriever(embedded(self.log.catalogue.texts, minilm))

    def fitted(self, name: str | None, config: PersonalConfig, adapter: AdapterConfig) -> Personalized:
        """Make an arm and train it."""
        arm = self.arm(name, config, adapter)
        arm.fit(self.log, self.split, seed=self.seed, training_scores=self.training_scores)
        return arm

    def _widened(self, config: PersonalConfig, adapter: AdapterConfig, *, own: bool) -> AdapterConfig:
        """Return the adapter at the rank at which a single LoRA trains as many numbers as `config` does."""
        rows = self.log.queries(self.split.train[:8])
        probe = Recommended(self.routers, config.routing)
        probe.fit(self.log, rows)
        sites = find_sites(self.base.model, adapter.targets)
        inputs = probe(self.log, rows).shape[1]
        return widened(adapter, equal_rank(sites, config, rank=adapter.rank, inputs=inputs, own=own))


def _router(name: str, log: Interactions, rest: Split, seed: int) -> Representing:
    member = RECOMMENDERS[name]()
    member.fit(log, rest, seed=seed)
    return _representing(member)


def check_rows(log: Interactions, rows: Ints, what: str) -> None:
    """Raise DataError where rows have not both likes and dislikes."""
    liked = int(log.likes[rows].sum())
    if not 0 < liked < len(rows):
        raise DataError(
            f"the {what} have {liked} likes in {len(rows)} rows, and both likes and dislikes are needed; give more "
            "ratings, or set ratings.like_from between them"
        )


def _representing(member: Recommender) -> Representing:
    if isinstance(member, Representing):
        return member
    raise ModelError(f"recommender {member.name} has no vectors to route by; use MF, DIN or SASRec")
