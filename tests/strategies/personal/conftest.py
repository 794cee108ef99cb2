"""A small world with a fitted recommender and an untrained reader, made once."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lora.config import AdapterConfig
from strategies.personal.asking import Asking
from strategies.personal.config import PersonalConfig
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.factors import FactorSettings, FoldedFactors
from strategies.personal.representation import Drawn, Recommended
from tasks.models import BaseModel
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.reader import ReaderSettings, new_reader
from tasks.recommendation.splits import Split, per_user

READER = ReaderSettings(vocabulary=400, width=16, layers=1, heads=2, hidden=24)


@dataclass(frozen=True)
class SmallWorld:
    log: Interactions
    split: Split
    mf: FoldedFactors
    base: BaseModel

    def copied(self) -> BaseModel:
        return replace(self.base, model=copy.deepcopy(self.base.model))

    def arm(self, *, base: BaseModel | None = None, **changes: Any) -> Personalized:
        """An untrained arm over a copy of the base."""
        base = base or self.copied()
        config = PersonalConfig(**{"meta_loras": 3, "sample": 128, "epochs": 1, "checks": 64, "history": 2, **changes})
        representation: Any = Recommended([self.mf], config.routing)
        if config.gate == "random":
            representation = Drawn(width=7 * config.meta_loras)
        asking = Asking(base, scorer=self.mf, base_score=config.base_score, history=config.history)
        return Personalized(base, AdapterConfig(rank=2, alpha=3), config, asking=asking, representation=representation)

    def tried(self, **changes: Any) -> Personalized:
        """An arm whose parts were set at random after a short fit: it answers differently for every user."""
        one = self.arm(**changes)
        one.fit(self.log, self.split, seed=0)
        source = torch.Generator().manual_seed(0)
        with torch.no_grad():
            one.parts.meta.b.copy_(torch.randn(one.parts.meta.b.shape, generator=source))
        return one


@pytest.fixture(scope="session")
def world() -> SmallWorld:
    log = builtin_interactions(users=30, items=60, events=30, seed=3)
    split = per_user(log)
    mf = FoldedFactors(FactorSettings(factors=4, lengths=(10, 20), ridges=(1.0,), epochs=10))
    mf.fit(log, split, seed=0)
    return SmallWorld(log, split, mf, new_reader(log, READER))
