"""A directory of a few users for life, over a small reader whose mixtures are drawn at random."""

from pathlib import Path

import numpy as np
import torch

from lora.config import AdapterConfig
from strategies.personal.asking import Asking
from strategies.personal.config import PersonalConfig
from strategies.personal.events import Event
from strategies.personal.lifelong import LifelongUsers
from strategies.personal.personalized import Personalized
from strategies.personal.recommenders.factors import FactorSettings, FoldedFactors
from strategies.personal.representation import Recommended
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.reader import ReaderSettings, new_reader
from tasks.recommendation.splits import per_user

READER = ReaderSettings(vocabulary=200, width=16, layers=1, heads=2, hidden=24)


def small_reader() -> tuple[Personalized, Interactions]:
    """Return a reader that answers differently for every user, and the interactions it knows."""
    log = builtin_interactions(users=12, items=40, events=16, seed=3)
    split = per_user(log)
    mf = FoldedFactors(FactorSettings(factors=4, lengths=(10,), ridges=(1.0,), epochs=4))
    mf.fit(log, split, seed=0)
    base = new_reader(log, READER)
    config = PersonalConfig(meta_loras=2, sample=32, epochs=1, checks=16, history=2)
    asking = Asking(base, scorer=mf, base_score=config.base_score, history=config.history)
    one = Personalized(
        base, AdapterConfig(rank=2), config, asking=asking, representation=Recommended([mf], config.routing)
    )
    one.fit(log, split, seed=0)
    with torch.no_grad():
        one.parts.meta.b.copy_(torch.randn(one.parts.meta.b.shape, generator=torch.Generator().manual_seed(0)))
    return one, log


def known_users(directory: Path, *, count: int = 4) -> list[str]:
    """Make the directory with the first events of some users; returns their names."""
    personal, log = small_reader()
    with_events = range(count)
    rows = np.concatenate([np.arange(log.starts[user], log.starts[user + 1])[:6] for user in with_events])
    rows = rows[np.argsort(log.times[rows], kind="stable")]
    users = LifelongUsers(personal, log, directory=directory)
    try:
        columns = zip(log.users[rows], log.items[rows], log.ratings[rows], log.times[rows], strict=True)
        names = log.catalogue.names
        users.observe_many([Event(log.user_names[u], names[i], float(r), int(t)) for u, i, r, t in columns])
        return users.names()
    finally:
        users.close()
