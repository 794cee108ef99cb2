"""Recommenders on disk answer as they did, and nothing in their files is code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.errors import ModelError
from strategies.personal.recommenders.boosted import Boosted
from strategies.personal.recommenders.din import Din, DinSettings
from strategies.personal.recommenders.factors import FactorSettings, FoldedFactors
from strategies.personal.recommenders.files import keepable, load_recommender, save_recommender
from strategies.personal.recommenders.sasrec import Sasrec, SasrecSettings
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.splits import per_user

LOG = builtin_interactions(users=14, items=30, events=14, seed=5)
SPLIT = per_user(LOG)
MAKE: list[Any] = [
    lambda: FoldedFactors(FactorSettings(factors=3, lengths=(5, 10), ridges=(0.5, 2.0), epochs=4)),
    lambda: Din(DinSettings(width=8, attention=4, hidden=(8, 4), epochs=1)),
    lambda: Sasrec(SasrecSettings(width=8, block=8, layers=1, epochs=1)),
]


@pytest.mark.parametrize("make", MAKE, ids=["MF", "DIN", "SASRec"])
def test_a_saved_recommender_answers_as_before(make: Any, tmp_path: Path) -> None:
    one = make()
    one.fit(LOG, SPLIT, seed=0)
    save_recommender(one, tmp_path / "one")
    save_recommender(one, tmp_path / "one")
    again = load_recommender(tmp_path / "one")
    asked = LOG.queries(SPLIT.test)
    assert np.array_equal(again.logits(LOG, asked), one.logits(LOG, asked)) and again.name == one.name
    assert np.array_equal(again.user_vectors(LOG, asked), one.user_vectors(LOG, asked))
    assert np.array_equal(again.pair_vectors(LOG, asked), one.pair_vectors(LOG, asked))
    assert np.ptp(one.logits(LOG, asked)) > 1e-3 and again.settings == one.settings


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    retrieving = Din(chosen=lambda log, queries: queries.latest(3))
    for one in (Boosted(), retrieving, object()):
        assert not keepable(one)
        with pytest.raises(ModelError, match="cannot be saved"):
            save_recommender(one, tmp_path / "x")
    with pytest.raises(ModelError, match="not been fitted"):
        save_recommender(Sasrec(), tmp_path / "x")


@pytest.mark.parametrize("damage", ["gone", "cut", "kind", "json", "shape"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    one = MAKE[1]()
    one.fit(LOG, SPLIT, seed=0)
    folder = save_recommender(one, tmp_path / "one")
    about, numbers = folder / "recommender.json", folder / "recommender.safetensors"
    if damage == "gone":
        numbers.unlink()
    elif damage == "cut":
        numbers.write_bytes(numbers.read_bytes()[:50])
    else:
        told = json.loads(about.read_text())
        told = {"kind": told | {"kind": "DINN"}, "shape": told | {"settings": {"width": 9}}}.get(damage, [])
        about.write_text(json.dumps(told) if damage != "json" else "{")
    with pytest.raises(ModelError, match="DIN" if damage == "kind" else "fit and save it again"):
        load_recommender(folder)
