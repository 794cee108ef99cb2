"""A personalised model: exports, isolation, the future, slots, files, and learning itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import PeftModel

from lora.errors import FrameMismatch, ModelError
from strategies.personal.asking import Asking
from strategies.personal.files import load_personalized, save_personalized
from strategies.personal.fitting import cross_fitted, few, learning_curve, without_sample
from strategies.personal.personalized import shared_run
from strategies.personal.recommenders.factors import FactorSettings, FoldedFactors
from strategies.personal.recommenders.stack import Stack
from strategies.personal.representation import Recommended
from tasks.config import ModelConfig
from tasks.models import load_base
from tasks.recommendation.answers import beginnings
from tasks.recommendation.interactions import Queries
from tasks.recommendation.metrics import auc
from tasks.recommendation.prompts import ANSWERS
from tasks.recommendation.splits import Split

FORMS = [
    {"mixing": mixing, "frame": frame, "routing": routing}
    for mixing in ("product", "factor")
    for frame in ("shared", "own")
    for routing in ("user", "pair")
]


def named(form: dict[str, str]) -> str:
    return "-".join(form.values())


def asked(world: Any, count: int = 12) -> Queries:
    """Queries of many users."""
    queries: Queries = world.log.queries(world.split.test[:: len(world.split.test) // count][:count])
    return queries


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_peft_answers_as_the_mixture_that_was_exported(world: Any, form: dict[str, str], tmp_path: Path) -> None:
    one, queries = world.tried(**form), asked(world, 3)
    vectors = one.representation(world.log, queries)
    tokens = one.asking(world.log, queries).tokens
    no, yes = (world.base.tokenizer(answer)["input_ids"][0] for answer in ANSWERS)
    exact = one.answered(one.asking(world.log, queries), lambda found: one.mixed(vectors[found]))
    for row in range(3):
        directory = one.export(vectors[row], tmp_path / f"{row}")
        twin = PeftModel.from_pretrained(world.copied().model, str(directory)).eval()
        with torch.no_grad():
            logits = twin(input_ids=torch.from_numpy(tokens.ids[row])[None]).logits[0, -1]
        scale = one.parts.calibration
        offset = float(one.asking(world.log, queries).offsets[row])
        theirs = float(scale.offset * offset + scale.language * (logits[yes] - logits[no]) + scale.bias)
        assert theirs == pytest.approx(exact[row], abs=2e-5)
    rank = 6 if (form["mixing"], form["frame"]) == ("product", "own") else 2
    assert f'"r": {rank},' in (directory / "adapter_config.json").read_text()
    assert (directory / "answering.json").is_file()
    assert np.ptp(exact) > 1e-3


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_one_users_routing_changes_no_bit_of_anothers_answer(world: Any, form: dict[str, str]) -> None:
    one, queries = world.tried(**form), asked(world)
    vectors = one.representation(world.log, queries)
    questions = one.asking(world.log, queries)
    before = one.answered(questions, lambda found: one.mixed(vectors[found]))
    vectors[4] = -vectors[4]
    after = one.answered(questions, lambda found: one.mixed(vectors[found]))
    assert after[4] != before[4]
    assert np.array_equal(np.delete(after, 4), np.delete(before, 4))


@pytest.mark.parametrize("routing", ["user", "pair"])
def test_over_a_shared_frame_products_and_factors_train_and_answer_alike(world: Any, routing: str) -> None:
    found = []
    for mixing in ("product", "factor"):
        one = world.arm(mixing=mixing, frame="shared", routing=routing, rate=0.02)
        one.fit(world.log, world.split, seed=0)
        kept = one.parts.meta.b.detach()
        found.append((one.curve, kept, one.logits(world.log, asked(world))))
    (curve, kept, odds), (other_curve, other_kept, other_odds) = found
    assert curve == other_curve
    assert len(set(curve)) > 1
    assert torch.equal(kept, other_kept)
    assert np.array_equal(odds, other_odds)


ARMS: dict[str, Any] = {}


@pytest.mark.parametrize("form", FORMS[::3], ids=named)
@hypothesis_settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_future_changes_no_answer(world: Any, form: dict[str, str], seed: int) -> None:
    one = ARMS.setdefault(named(form), world.tried(**form)) if named(form) not in ARMS else ARMS[named(form)]
    rng = np.random.default_rng(seed)
    log, now = world.log, int(rng.choice(world.log.times))
    late = np.flatnonzero(log.times >= now)
    ratings, items = log.ratings.copy(), log.items.copy()
    ratings[late], items[late] = rng.permutation(ratings[late]), rng.permutation(items[late])
    pairs = zip(log.starts[:-1], log.starts[1:], strict=True)
    ends = np.array([start + np.searchsorted(log.times[start:end], now) for start, end in pairs])
    queries = Queries(log.starts[:-1], ends, rng.integers(60, size=30), np.full(30, now))
    changed = replace(log, ratings=ratings, items=items)
    assert np.array_equal(one.logits(log, queries), one.logits(changed, queries))


def test_a_users_mixture_is_a_slot(world: Any) -> None:
    one, queries = world.tried(), asked(world)
    slots = one.adapter_of(one.representation(world.log, queries))
    assert slots.shape == (12, one.parts.meta.layout.size)
    np.testing.assert_allclose(
        one.logits_of_slots(world.log, queries, slots), one.logits(world.log, queries), rtol=1e-6, atol=1e-6
    )
    alone = one.adapter_of(one.representation(world.log, queries)[3])
    torch.testing.assert_close(alone, slots[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [{"routing": "pair"}, {"frame": "own"}])
def test_what_is_no_slot_is_refused_as_one(world: Any, form: dict[str, str]) -> None:
    one = world.tried(**form)
    with pytest.raises(ModelError, match="only with routing: user and frame: shared"):
        one.adapter_of(one.representation(world.log, asked(world)))


def test_candidates_of_one_user_share_a_mixture(world: Any) -> None:
    one = world.tried()
    candidates = np.random.default_rng(0).integers(60, size=(4, 7))
    many = asked(world, 4).about(candidates)
    assert shared_run(many) == 7 and shared_run(asked(world, 4)) == 1
    assert shared_run(many.take(slice(0, 9))) == 1
    alone = np.concatenate([one.logits(world.log, many.take(slice(i, i + 1))) for i in range(28)])
    np.testing.assert_allclose(one.logits(world.log, many), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"mixing": "product", "frame": "own"}, {"gate": "uniform"}], ids=str)
def test_histories_of_candidates_are_read_once_and_answers_are_the_same(world: Any, changes: dict[str, Any]) -> None:
    one = world.tried(**changes)
    # Two groups of many candidates, and one of a user whose history is too short to be worth it.
    many = asked(world, 3).about(np.random.default_rng(0).integers(60, size=(3, 60)))
    tokens = one.asking(world.log, many).tokens
    assert beginnings(tokens, group=60).any()
    alone = np.concatenate([one.logits(world.log, many.take(slice(i, i + 1))) for i in range(0, 180, 7)])
    np.testing.assert_allclose(one.logits(world.log, many)[::7], alone, rtol=1e-4, atol=1e-5)


def test_a_swapped_gate_moves_the_mixture_and_nothing_else(world: Any) -> None:
    one, queries = world.tried(), asked(world)
    other = queries.with_history_of(np.roll(np.arange(12), 1))
    swapped = one.logits(world.log, queries, routed_as=other)
    vectors = one.representation(world.log, other)
    by_hand = one.answered(one.asking(world.log, queries), lambda found: one.mixed(vectors[found]))
    assert np.array_equal(swapped, by_hand)
    assert not np.allclose(swapped, one.logits(world.log, queries))


def test_a_gate_can_be_made_even_and_the_trained_one_stays(world: Any) -> None:
    one, queries = world.tried(), asked(world)
    before = one.logits(world.log, queries)
    even = one.evenly()
    weights = torch.full((len(one.adapted.sites), 12, one.config.meta_loras), 1 / one.config.meta_loras)
    by_hand = one.answered(one.asking(world.log, queries), lambda found: one.parts.meta.blocks(weights[:, found]))
    np.testing.assert_allclose(even.logits(world.log, queries), by_hand, rtol=1e-5, atol=1e-5)
    assert np.array_equal(one.logits(world.log, queries), before) and not np.allclose(by_hand, before)


@pytest.mark.parametrize("changes", [{"gate": "uniform"}, {"meta_loras": 1, "gate": "uniform"}])
def test_without_a_choice_everybody_gets_one_mixture(world: Any, changes: dict[str, Any]) -> None:
    one, queries = world.tried(**changes), asked(world)
    other = queries.with_history_of(np.roll(np.arange(12), 1))
    assert np.array_equal(one.logits(world.log, queries), one.logits(world.log, queries, routed_as=other))


def test_random_weights_stay_a_users_own_as_time_goes_on(world: Any) -> None:
    one = world.tried(gate="random")
    queries = world.log.queries(np.flatnonzero(world.log.users == 5))
    weights = one.weights(world.log, queries)
    assert torch.equal(weights, weights[:, :1].expand_as(weights))
    assert not torch.equal(weights[:, 0], one.weights(world.log, asked(world))[:, 0])


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=named)
def test_what_is_saved_answers_the_same(world: Any, form: dict[str, str], tmp_path: Path) -> None:
    one, queries = world.tried(**form), asked(world)
    for _ in range(2):
        save_personalized(one, tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    base = world.copied()
    again = load_personalized(
        tmp_path / "one", base, asking=Asking(base, scorer=world.mf, history=2),
        representation=Recommended([world.mf], one.config.routing),
    )  # fmt: skip
    assert np.array_equal(one.logits(world.log, queries), again.logits(world.log, queries))
    assert again.config == one.config and again.curve == one.curve


def test_damaged_and_foreign_files_are_refused(world: Any, tmp_path: Path) -> None:
    one = world.tried()
    save_personalized(one, tmp_path / "one")
    traits: Any = {"asking": one.asking, "representation": one.representation}
    about = tmp_path / "one" / "personal.json"
    about.write_text(about.read_text().replace(one.adapted.frame.digest, "0" * 64))
    base = world.copied()
    with pytest.raises(FrameMismatch):
        load_personalized(tmp_path / "one", base, **traits)
    assert not any("base" in name for name, _ in base.model.named_modules())  # nothing stays attached
    about.write_text("{")
    with pytest.raises(ModelError, match="save it again"):
        load_personalized(tmp_path / "one", base, **traits)


def test_an_unfitted_one_says_so(world: Any) -> None:
    with pytest.raises(ModelError, match="has not been fitted"):
        world.arm().logits(world.log, asked(world))


# --- Learning ---------------------------------------------------------------------------------------------------------


def own_check(world: Any, count: int) -> Split:
    """A split that is checked on the rows it learns from, which must go better."""
    rows = world.split.train[:: len(world.split.train) // count][:count]
    return Split("own check", rows, rows, world.split.test)


def test_training_keeps_the_best_check_and_freezes(world: Any) -> None:
    split = own_check(world, 64)
    traits = {"epochs": 8, "rate": 0.02, "batch": 16, "gate_dropout": 0.0}
    one = world.arm(**traits)
    one.fit(world.log, split, seed=0)
    assert len(one.curve) == 9 and min(one.curve) < one.curve[0] - 0.01
    assert one.parts.meta.b.any()
    assert not any(parameter.requires_grad for parameter in one.parts.modules().parameters())
    assert not one.adapted.base_moved()
    again = world.arm(**traits)
    again.fit(world.log, split, seed=0)
    assert again.curve == one.curve


def test_training_that_only_hurts_is_not_kept(world: Any) -> None:
    one = world.arm(rate=30.0, gate_rate=30.0)
    one.fit(world.log, world.split, seed=0)
    assert one.curve[1] > one.curve[0]
    assert not one.parts.meta.b.any()


def test_test_rows_are_never_read_in_fitting(world: Any) -> None:
    ratings = world.log.ratings.copy()
    ratings[world.split.test] = 5.5 - ratings[world.split.test]
    one, other = world.arm(), world.arm()
    one.fit(world.log, world.split, seed=0)
    other.fit(replace(world.log, ratings=ratings), world.split, seed=0)
    assert torch.equal(one.parts.meta.b, other.parts.meta.b) and one.curve == other.curve


def test_cross_fitted_scores_are_less_sure_than_those_of_rows_that_were_learned(world: Any) -> None:
    def make() -> FoldedFactors:
        return FoldedFactors(FactorSettings(factors=8, lengths=(20,), ridges=(1.0,), epochs=40, decay=0.003))

    rows, labels = world.split.train, world.log.likes[world.split.train]
    scores = cross_fitted(make, world.log, world.split, folds=3)
    assert np.isfinite(scores[rows]).all() and np.isnan(scores[world.split.test]).all()
    whole = make()
    whole.fit(world.log, world.split, seed=0)
    assert auc(labels, scores[rows]) < auc(labels, whole.logits(world.log, world.log.queries(rows)))
    with pytest.raises(ModelError, match="lacks some training rows"):
        world.arm().fit(world.log, world.split, seed=0, training_scores=np.full(len(world.log), np.nan))
    with pytest.raises(ModelError, match="folds=1"):
        cross_fitted(make, world.log, world.split, folds=1)


def test_a_larger_sample_holds_the_smaller_ones(world: Any) -> None:
    small, large = (few(world.split.train, count, seed=4) for count in (20, 50))
    assert len(small) == 20 and set(small) <= set(large) <= set(world.split.train)
    assert np.array_equal(few(world.split.train, 10**6, seed=4), world.split.train)


def test_what_is_fitted_beside_the_sample_has_not_seen_it(world: Any) -> None:
    rest = without_sample(world.split, 50, seed=4)
    assert sorted([*rest.train, *few(world.split.train, 50, seed=4)]) == [*world.split.train]
    assert rest.test is world.split.test and rest.validation is world.split.validation


def test_the_learning_curve_has_a_point_a_size(world: Any) -> None:
    points = learning_curve(lambda size: world.arm(sample=size), world.log, world.split, [16, 200])
    assert [point.sample for point in points] == [16, 200]
    assert all(0.4 < point.auc < 0.9 and np.isfinite(point.log_loss) for point in points)


def test_it_can_be_a_member_of_the_stack(world: Any) -> None:
    stack = Stack([world.mf, world.tried()], fitted=True)
    stack.fit(world.log, world.split, seed=0)
    assert np.isfinite(stack.logits(world.log, asked(world))).all()


def test_an_encoder_learns_a_head(world: Any) -> None:
    base = load_base(ModelConfig(name="tiny-bert", device="cpu"), causal=False)
    one = world.arm(base=base, rate=0.05, base_score="none", epochs=6, batch=16, history=0)
    one.fit(world.log, own_check(world, 48), seed=0)
    assert one.parts.answering.weight.any() and min(one.curve) < one.curve[0]


def test_a_prompt_can_tell_the_score_instead(world: Any) -> None:
    one = world.arm(base_score="prompt")
    told = one.asking(world.log, asked(world, 2))
    assert not told.offsets.any()
    assert "% " in world.base.tokenizer.decode(told.tokens.ids[0])


def test_unadapted_is_where_every_arm_starts(world: Any) -> None:
    plain, other = world.arm(epochs=0, meta_loras=1, gate="uniform"), world.arm()
    plain.fit(world.log, world.split, seed=0)
    other.fit(world.log, world.split, seed=0)
    assert len(plain.curve) == 1 and plain.curve[0] == pytest.approx(other.curve[0], abs=1e-6)
