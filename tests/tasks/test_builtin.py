from collections import Counter

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from lora.errors import DataError
from tasks.builtin import ASIDES, INTENTS, NOUNS, OPENINGS, PLOTS, SLOTS, TONES, VERBS, builtin_tables

KINDS = ("classification", "causal-lm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{}, {"train": 120, "validation": 24, "test": 25}])
def test_sizes_are_as_asked_and_no_text_occurs_twice(kind: str, sizes: dict[str, int]) -> None:
    tables = builtin_tables(kind, seed=0, **sizes)
    assert {role: len(table) for role, table in tables.items()} == (
        sizes or {"train": 2400, "validation": 300, "test": 600}
    )
    texts = [text for table in tables.values() for text in table.columns["text"]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_data_and_other_seeds_do_not(kind: str) -> None:
    assert builtin_tables(kind, seed=7) == builtin_tables(kind, seed=7)
    assert builtin_tables(kind, seed=7)["train"].columns != builtin_tables(kind, seed=8)["train"].columns


@pytest.mark.parametrize(("kind", "column", "names"), [(KINDS[0], "label", INTENTS), (KINDS[1], "speaker", NOUNS)])
def test_classes_are_balanced_to_within_one_row(kind: str, column: str, names: dict[str, list[str]]) -> None:
    for table in builtin_tables(kind, seed=1, train=101, validation=30, test=50).values():
        counts = Counter(table.columns[column])
        assert set(counts) == set(names) and max(counts.values()) - min(counts.values()) <= 1


def test_every_slot_of_every_template_has_words() -> None:
    for template in [*ASIDES, *OPENINGS, *(phrase for phrases in INTENTS.values() for phrase in phrases)]:
        template.format(**SLOTS)
    for plot in PLOTS:
        plot.format(noun="", verb="", tone="")
    texts = [text for kind in KINDS for text in builtin_tables(kind, seed=0)["train"].columns["text"]]
    assert not any(mark in text for text in texts for mark in "{}|\n")


def test_no_two_speakers_share_a_word() -> None:
    words = [word for table in (NOUNS, VERBS, TONES) for items in table.values() for word in items]
    assert len(set(words)) == len(words) and not any(" " in word for word in words)


def test_a_quarter_of_the_phrasings_is_kept_from_training() -> None:
    tables = builtin_tables("classification", seed=0)
    kept = ("rise at", "squeeze", "find someone", "i want to talk to")
    train, test = (" ".join(map(str, tables[role].columns["text"])) for role in ("train", "test"))
    assert not any(phrase in train for phrase in kept)
    assert any(phrase in test for phrase in kept)


def test_intents_are_learnable_but_not_at_a_glance() -> None:
    """A bag of words, which knows no paraphrase, must find signal and must leave something to a language model."""
    tables = builtin_tables("classification", seed=0)
    vectors = TfidfVectorizer().fit(tables["train"].columns["text"])
    model = LogisticRegression(max_iter=500)
    model.fit(vectors.transform(tables["train"].columns["text"]), tables["train"].columns["label"])
    accuracy = model.score(vectors.transform(tables["test"].columns["text"]), tables["test"].columns["label"])
    assert 0.7 < accuracy < 0.93


def test_more_texts_than_the_templates_give_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.builtin.PLOTS", ["the {noun}."])
    monkeypatch.setattr("tasks.builtin.NOUNS", {"sailor": ["tide", "mast"]})  # 2**2 + 2**3 + 2**4 texts
    assert len(builtin_tables("causal-lm", seed=0, train=20, validation=4, test=4)["train"]) == 20
    with pytest.raises(DataError, match="builtin: the templates give no more than about 28 different texts"):
        builtin_tables("causal-lm", seed=0, train=20, validation=5, test=4)


def test_users_have_several_rows_each() -> None:
    users = Counter(builtin_tables("classification", seed=0)["train"].columns["user"])
    assert len(users) == 100 and min(users.values()) >= 8
