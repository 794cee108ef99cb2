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
    liked = {item for item, tags in enumerate(LOG.catalogue.tags) if tags[0] in ("Western", "Space", "Romance")}
    log = replace(LOG, ratings=np.array([4.5 if item in liked else 2.0 for item in LOG.items]))
    base = train_reader(log, SPLIT, replace(SMALL, rate=1e-2))
    queries = log.queries(SPLIT.test)
    asked = prompts(log, queries, queries.latest(2), phrasing=COMPACT)
    tokens = tokenized(asked, base.tokenizer, max_length=200)
    labels = log.likes[SPLIT.test]
    assert auc(labels, read(base, tokens)) > 0.95
    assert auc(labels, read(new_reader(log, SMALL), tokens)) < 0.8


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
