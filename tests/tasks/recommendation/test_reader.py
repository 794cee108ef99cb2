"""The small decoder: its texts, that it learns, and that others load it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tasks.config import ModelConfig
from tasks.models import load_base
from tasks.recommendation.answers import tokenized
from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.metrics import auc
from tasks.recommendation.prompts import prompts
from tasks.recommendation.reader import (
    COMPACT,
    ReaderSettings,
    documents,
    new_reader,
    read,
    save_reader,
    train_reader,
)
from tasks.recommendation.splits import per_user

LOG = builtin_interactions(users=60, items=60, events=40, seed=1, taste=0.0)
SPLIT = per_user(LOG)
SMALL = ReaderSettings(vocabulary=400, width=32, layers=1, heads=2, hidden=48, history=2, batch=16, epochs=6)


def test_every_training_row_is_read_once_and_users_stay_apart() -> None:
    rows = SPLIT.train
    known = [f"{LOG.users[row]}:{row}" for row in rows]
    for phase in range(4):
        texts = [*documents(LOG, rows, lines=3, phase=phase, known=known)]
        lines = [text.split("\n") for text in texts]
        assert [line for text in lines for line in text] == known
        assert max(map(len, lines)) == 3
        assert all(len({line.split(":")[0] for line in text}) == 1 for text in lines)


def test_it_learns_to_answer_held_out_questions() -> None:
    base = train_reader(LOG, SPLIT, replace(SMALL, rate=1e-2, epochs=8))
    queries = LOG.queries(SPLIT.test)
    asked = prompts(LOG, queries, queries.latest(2), phrasing=COMPACT)
    tokens = tokenized(asked, base.tokenizer, max_length=200)
    labels = LOG.likes[SPLIT.test]
    assert auc(labels, read(base, tokens)) > 0.58
    assert abs(auc(labels, read(new_reader(LOG, SMALL), tokens)) - 0.5) < 0.08


def test_only_training_texts_are_learned() -> None:
    held = np.concatenate([SPLIT.validation, SPLIT.test])
    ratings = LOG.ratings.copy()
    ratings[SPLIT.test] = 5.5 - ratings[SPLIT.test]
    short = replace(SMALL, epochs=1)
    one, other = train_reader(LOG, SPLIT, short), train_reader(replace(LOG, ratings=ratings), SPLIT, short)
    assert len(held) and all(
        torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


def test_what_is_saved_is_loaded_by_path(tmp_path: Path) -> None:
    base = new_reader(LOG, SMALL)
    for _ in range(2):
        save_reader(base, tmp_path / "reader")
    assert [path.name for path in tmp_path.iterdir()] == ["reader"]
    again = load_base(ModelConfig(path=str(tmp_path / "reader"), device="cpu"), causal=True)
    tokens = tokenized(["12 Heat (1995) Crime:", "1/2 Casino:"], base.tokenizer, max_length=50)
    assert np.array_equal(read(base, tokens), read(again, tokens))
    text = "12 The Dust (1999) Western: Yes 9"
    assert again.tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert base.tokenizer.decode(base.tokenizer(text)["input_ids"]) == text
