"""Arms side by side: the same questions to all, swaps that swap, differences that add up, one user."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from lora.config import AdapterConfig
from lora.errors import ConfigError, DataError, ModelError
from strategies.personal.comparison import Asked, Comparison, Found, check_split, note, swaps
from strategies.personal.config import ComparisonConfig, PersonalConfig
from strategies.personal.portrait import portrait, sitter
from strategies.personal.recommenders.remembered import Remembered
from strategies.personal.retriever import SemanticRetriever
from strategies.personal.world import World, base_of
from tasks.recommendation.config import ReadingModelConfig
from tasks.recommendation.interactions import Floats, Interactions, Queries
from tasks.recommendation.prompts import prompts
from tasks.recommendation.reader import COMPACT
from tasks.recommendation.splits import Split

PERSONAL = PersonalConfig(meta_loras=3, gate_width=2, sample=64, epochs=1, checks=32, history=2)
ADAPTER = AdapterConfig(rank=2, alpha=4)


class Counting:
    """Answers item numbers, and counts how often it is asked."""

    name = "counting"

    def __init__(self) -> None:
        self.asked = 0

    def fit(self, log: Interactions, split: Split, *, seed: int) -> None:
        self.asked = 0

    def logits(self, log: Interactions, queries: Queries) -> Floats:
        self.asked += 1
        return queries.items.astype(np.float64)


@pytest.fixture
def made(world) -> World:
    return World(world.log, world.split, {"MF": world.mf}, (world.mf,), world.mf,
                 world.mf.logits(world.log, world.log.queries(np.arange(len(world.log)))), world.base, 0)  # fmt: skip


def asked(world, **keys: object) -> Asked:
    return Asked.of(world.log, world.split, ComparisonConfig(**keys), seed=0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_a_swap_takes_another_user_wherever_there_is_one(users: Sequence[int], seed: int) -> None:
    owners = np.array(users)
    found = owners[swaps(owners, np.random.default_rng(seed))]
    assert ((found != owners) | (len({*users}) == 1)).all()


def test_questions_on_behalf_of_others_keep_the_items(world) -> None:
    drawn = asked(world)
    assert np.array_equal(drawn.queries.items, drawn.others.items)
    assert (drawn.queries.first != drawn.others.first).all()


def test_ranked_rows_are_test_rows_with_their_own_item_first(world) -> None:
    drawn = asked(world, ranked=7, candidates=12)
    assert (len(drawn.ranked), drawn.width) == (7 * 13, 13)
    first = drawn.ranked.items.reshape(-1, 13)[:, 0]
    assert {*first.tolist()} <= {*world.log.items[world.split.test].tolist()}
    counting = Counting()
    places = drawn.ranking(counting, world.log)
    ranks = 1 + (drawn.ranked.items.reshape(-1, 13)[:, 1:] > first[:, None]).sum(1)
    assert places["mrr"] == pytest.approx(np.mean(1 / ranks))


def test_where_a_user_has_rated_everything_nothing_is_ranked(world) -> None:
    items = np.arange(len(world.log.catalogue))
    whole = world.log.grown(np.zeros_like(items), items, np.full(len(items), 4.0), items + 1)
    rows = whole.users == 0
    split = Split("x", np.flatnonzero(~rows), np.flatnonzero(~rows), np.flatnonzero(rows))
    drawn = Asked.of(whole, split, ComparisonConfig(), seed=0)
    assert drawn.ranking(Counting(), whole) == {}


def test_the_same_questions_are_answered_once_and_anew_after_a_fit(world) -> None:
    counting = Counting()
    one = Remembered(counting)
    queries = world.log.queries(world.split.test)
    assert one.logits(world.log, queries) is one.logits(world.log, queries)
    assert counting.asked == 1
    one.logits(world.log, world.log.queries(world.split.train))
    assert counting.asked == 2
    one.fit(world.log, world.split, seed=0)
    one.logits(world.log, queries)
    assert counting.asked == 1


def test_figures_are_means_with_their_spread() -> None:
    found = Found()
    assert (found.mean("auc"), found.spread("auc"), found.told("auc")) == (None, None, "")
    found.add(auc=0.5)
    assert (found.spread("auc"), found.told("auc")) == (None, "0.5000")
    found.add(auc=0.6)
    assert found.told("auc") == f"0.5500 ±{np.std([0.5, 0.6], ddof=1):.4f}"


def test_a_difference_is_that_of_the_mean_aucs(world) -> None:
    drawn = asked(world, draws=50)
    table = Comparison(world.log, world.split, drawn, ComparisonConfig(draws=50))
    rng = np.random.default_rng(0)
    scores = {name: [rng.normal(size=len(drawn.labels)) + gain * drawn.labels for _ in range(2)]
              for name, gain in (("good", 1.0), ("bad", 0.2))}  # fmt: skip
    for name, runs in scores.items():
        for run in runs:
            note(table.found, name, drawn.labels, run)
    found = table.difference("good", "bad")
    good, bad = (np.mean([roc_auc_score(drawn.labels, run) for run in scores[name]]) for name in ("good", "bad"))
    assert found.value == pytest.approx(good - bad)
    assert 0 < found.low < found.value < found.high
    assert table.difference("good", "good").high == 0


def test_a_split_without_dislikes_is_refused_with_its_part(world) -> None:
    rows = np.flatnonzero(world.log.likes)
    with pytest.raises(DataError, match=r"the test rows of the x split have \d+ likes in \d+ rows"):
        check_split(world.log, Split("x", world.split.train, world.split.validation, rows))


def test_the_arms_share_questions_and_a_base_that_stays_as_it_was(world, made: World) -> None:
    before = {name: value.clone() for name, value in world.base.model.state_dict().items()}
    config = ComparisonConfig(recommenders=("MF",), routers=("MF",), ranked=4, candidates=5, draws=20)
    records: list[dict] = []
    table = Comparison(world.log, world.split, asked(world, ranked=4, candidates=5), config)
    arms = table.run(made, PERSONAL, ADAPTER, listen=lambda record: records.append(dict(record)))
    assert [*table.found] == ["MF", "recommender", "stack", "single-lora", "reclora", "stack-with-reclora"]
    assert [record["name"] for record in records] == [*table.found, "rankings"]
    assert all(value.equal(before[name]) for name, value in world.base.model.state_dict().items())
    assert arms["single-lora"].trained_parameters >= arms["reclora"].trained_parameters
    shown = portrait(world.log, sitter(world.log, world.split, "user-004"), personal=arms["reclora"],
                     others={"single-lora": arms["single-lora"]}, everybody=table.asked.queries)  # fmt: skip
    likes = [each["likes"]["reclora"] for each in shown["recommended"]["reclora"]]
    assert likes == sorted(likes, reverse=True)
    assert np.allclose(np.sum(shown["weights"], axis=1), 1, atol=1e-4)
    assert sum(shown["usage_of_all"]) == pytest.approx(1)


def test_retrieved_history_tells_the_events_most_like_the_target(world, made: World) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(world.log.catalogue), 8)).astype(np.float32)
    vars(made)["retriever"] = retriever = SemanticRetriever(vectors)
    queries = asked(world).queries
    told = {name: made.arm(name, PERSONAL, ADAPTER).asking for name in ("retrieved-history", "uniform-gate")}
    similar = retriever.similar(world.log, queries, PERSONAL.history)
    wanted = prompts(world.log, queries, similar, phrasing=COMPACT)
    read = {name: asking(world.log, queries).tokens for name, asking in told.items()}
    decode = world.base.tokenizer.decode
    assert decode(read["retrieved-history"].ids[7]) == wanted[7] != decode(read["uniform-gate"].ids[7])
    known = world.log.queries(world.split.test)
    assert (similar < known.end[:, None]).all()
    assert not any((similar >= 0)[place] @ (similar[place] < known.first[place]) for place in range(len(known)))


def test_unknown_arms_and_members_without_vectors_are_named(made: World) -> None:
    with pytest.raises(ConfigError, match="did you mean 'random-gate'"):
        made.arm("randm-gate", PERSONAL, ADAPTER)
    from strategies.personal.world import _representing

    with pytest.raises(ModelError, match="counting has no vectors to route by"):
        _representing(Counting())


def test_encoders_answer_by_a_head_and_decoders_by_tokens(world) -> None:
    made = {
        name: base_of(ReadingModelConfig(name=name))(world.log, world.split, 0) for name in ("tiny-bert", "tiny-llama")
    }
    assert {name: base.causal for name, base in made.items()} == {"tiny-bert": False, "tiny-llama": True}
    assert not base_of(ReadingModelConfig(name="tiny-llama", encoder=True))(world.log, world.split, 0).causal


# --- Who is shown ----------------------------------------------------------------------------------------------------


def test_a_sitter_is_seen_before_the_first_test_event(world) -> None:
    log, split = world.log, world.split
    who = sitter(log, split, "user-004")
    tested = split.test[log.users[split.test] == 4]
    assert who.time == log.times[tested].min()
    assert (log.times[who.history] < who.time).all() and (log.users[who.history] == 4).all()
    assert not {*who.candidates.tolist()} & {*log.items[who.history].tolist()}
    assert {*log.items[tested].tolist()} <= {*who.candidates.tolist(), *log.items[who.history].tolist()}


def test_without_a_name_it_is_who_has_most_test_rows(world) -> None:
    counts = np.bincount(world.log.users[world.split.test])
    assert sitter(world.log, world.split, None).name == world.log.user_names[int(counts.argmax())]


def test_an_unknown_user_is_answered_with_the_nearest(world) -> None:
    with pytest.raises(DataError, match=r"comparison.show_user: unknown user 'user-04'; did you mean 'user-0"):
        sitter(world.log, world.split, "user-04")
