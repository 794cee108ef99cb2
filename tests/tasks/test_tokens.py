"""Laws of batching and of what is learned."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.examples import Examples
from tasks.models import byte_tokenizer
from tasks.tokens import IGNORED, Tokens, buckets, collate, tokenize_causal, tokenize_classification

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(lambda each: np.array(each, dtype=np.int64))
overheads = st.sampled_from([0.0, 1.0, 10.0, 100.0, 1e5])
HUGE = 10**9


def cost(lengths: Any, groups: Any, overhead: float) -> float:
    return float(sum(len(group) * lengths[group].max() + overhead for group in groups))


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


# -- buckets --------------------------------------------------------------------------------------------------------


@given(lengths_of, overheads, st.sampled_from([1, 7, 50, 300, HUGE]))
def test_every_row_is_in_exactly_one_batch(lengths: Any, overhead: float, budget: int) -> None:
    groups = buckets(lengths, overhead=overhead, budget=budget)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert all(len(group) for group in groups)


@given(lengths_of, overheads)
def test_the_cost_is_never_above_one_batch_or_one_row_each_or_one_length_each(lengths: Any, overhead: float) -> None:
    found = cost(lengths, buckets(lengths, overhead=overhead, budget=HUGE), overhead)
    whole, single = [np.arange(len(lengths))], [np.array([row]) for row in range(len(lengths))]
    alike = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    assert found <= min(cost(lengths, groups, overhead) for groups in (whole, single, alike)) + 1e-9


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), overheads)
@settings(max_examples=60)
def test_no_division_of_the_sorted_rows_is_cheaper(rows: list[int], overhead: float) -> None:
    lengths = np.array(rows, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    divisions = (
        np.split(order, [place + 1 for place in range(len(rows) - 1) if cuts >> place & 1])
        for cuts in range(2 ** (len(rows) - 1))
    )
    best = min(cost(lengths, groups, overhead) for groups in divisions)
    assert cost(lengths, buckets(lengths, overhead=overhead, budget=HUGE), overhead) == pytest.approx(best)


alike = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda each: np.full(*each, dtype=np.int64))


@given(lengths_of | alike, overheads, st.integers(1, 300))
def test_the_budget_bounds_every_batch_of_more_than_one_row(lengths: Any, overhead: float, budget: int) -> None:
    for group in buckets(lengths, overhead=overhead, budget=budget):
        assert len(group) == 1 or len(group) * lengths[group].max() <= budget


def test_longest_first_and_nothing_for_nothing() -> None:
    lengths = np.array([1, 40, 1, 40, 1])
    assert [group.tolist() for group in buckets(lengths, overhead=1.0, budget=HUGE)] == [[1, 3], [0, 2, 4]]
    assert buckets(np.array([], dtype=np.int64), overhead=1.0, budget=5) == []


# -- collate --------------------------------------------------------------------------------------------------------


def test_classification_rows_are_padded_on_the_right_and_masked() -> None:
    tokens = tokenize_classification(Examples(("ab", "abcd", "a"), (2, 0, 1)), TOKENIZER, max_length=16)
    batch = collate([(tokens, 2), (tokens, 1)], pad=0)
    assert batch.input_ids.tolist() == [[*ids("a"), 0, 0, 0], ids("abcd")]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [1, 0]
    assert batch.last.tolist() == [0, 3]
    assert len(batch) == 2


def test_rows_of_equal_length_have_no_mask() -> None:
    tokens = tokenize_classification(Examples(("ab", "cd"), (0, 1)), TOKENIZER, max_length=16)
    batch = collate([(tokens, 0), (tokens, 1)], pad=0)
    assert batch.mask is None
    assert batch.last.tolist() == [1, 1]


def test_rows_of_several_clients_share_a_batch() -> None:
    one = tokenize_classification(Examples(("ab",), (1,)), TOKENIZER, max_length=16)
    two = tokenize_classification(Examples(("x", "yz"), (5, 6)), TOKENIZER, max_length=16)
    batch = collate([(two, 1), (one, 0), (two, 0)], pad=9)
    assert batch.labels.tolist() == [6, 1, 5]
    assert batch.input_ids.tolist() == [ids("yz"), ids("ab"), [*ids("x"), 9]]


@given(st.lists(st.text(max_size=12), min_size=1, max_size=6))
def test_causal_labels_are_the_ids_but_for_prompts_and_padding(texts: list[str]) -> None:
    prompts = tuple(text[::-1] + "?" for text in texts)
    tokens = tokenize_causal(Examples(tuple(texts), prompts=prompts), TOKENIZER, max_length=200)
    assert tokens.starts is not None
    batch = collate([(tokens, row) for row in range(len(texts))], pad=0)
    for row, text in enumerate(texts):
        length = len(tokens.ids[row])
        labels = batch.labels[row]
        assert labels[: tokens.starts[row]].eq(IGNORED).all()
        assert labels[length:].eq(IGNORED).all()
        assert labels[tokens.starts[row] : length].tolist() == [*ids(" " + text), END]
        assert torch.equal(batch.input_ids[row][labels != IGNORED], labels[labels != IGNORED])


# -- tokenize -------------------------------------------------------------------------------------------------------


def test_classification_texts_are_cut_and_never_empty() -> None:
    tokens = tokenize_classification(Examples(("abcdef", ""), (0, 1)), TOKENIZER, max_length=4)
    assert [row.tolist() for row in tokens.ids] == [ids("abcd"), [TOKENIZER.pad_token_id]]
    assert tokens.lengths.tolist() == [4, 1]


def test_an_unprompted_text_is_learned_whole_and_ends_where_it_fits() -> None:
    tokens = tokenize_causal(Examples(("abc", "abcd")), TOKENIZER, max_length=4)
    assert tokens.starts is not None
    assert [row.tolist() for row in tokens.ids] == [[*ids("abc"), END], ids("abcd")]
    assert tokens.starts.tolist() == [0, 0]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(4, 24))
def test_a_prompt_keeps_its_end_and_leaves_half_to_the_text(prompt: int, text: int, most: int) -> None:
    asked, answer = "".join(chr(97 + i % 26) for i in range(prompt)), "z" * text
    tokens = tokenize_causal(Examples((answer,), prompts=(asked,)), TOKENIZER, max_length=most)
    assert tokens.starts is not None
    row, start = tokens.ids[0].tolist(), int(tokens.starts[0])
    question, learned = ids(asked) or [TOKENIZER.pad_token_id], [*ids(" " + answer), END]
    assert row[:start] == question[len(question) - start :]
    assert row[start:] == learned[: len(row) - start]
    assert len(row) <= most
    assert start >= min(len(question), most // 2)
    if len(question) + len(learned) <= most:
        assert (row[:start], row[start:]) == (question, learned)
    else:
        assert len(row) == most
        assert len(row) - start >= min(len(learned), most - most // 2)


def test_take_keeps_columns_together() -> None:
    tokens = Tokens([np.array([i]) for i in range(4)], np.arange(4) * 10, np.arange(4) * 100)
    taken = tokens.take([3, 1, 1])
    assert taken.labels is not None and taken.starts is not None
    assert [row[0] for row in taken.ids] == [3, 1, 1]
    assert (taken.labels.tolist(), taken.starts.tolist()) == ([30, 10, 10], [300, 100, 100])
    assert taken.ids[0] is tokens.ids[3]
    assert len(tokens.take([])) == 0
