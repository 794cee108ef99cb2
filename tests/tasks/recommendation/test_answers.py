"""Prompts as tokens, batches in groups, and the log odds of two answers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import ModelError
from tasks.config import ModelConfig
from tasks.models import load_base
from tasks.recommendation.answers import Answering, answer_tokens, batches, beginnings, packed, tokenized
from tasks.tokens import Tokens

LLAMA = load_base(ModelConfig(name="tiny-llama", device="cpu"), causal=True)
BERT = load_base(ModelConfig(name="tiny-bert", device="cpu"), causal=False)
TEXTS = ("Heat (1995):", "A much longer question than the first:", "Casino:")


class Words:
    """A tokenizer that knows two words."""

    pad_token_id = 0

    def __init__(self, no: list[int], yes: list[int]) -> None:
        self.known = {" No": no, " Yes": yes}

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": self.known[text]}


def test_answers_are_told_apart_by_their_first_different_token() -> None:
    assert answer_tokens(Words([5], [6])) == (5, 6)
    assert answer_tokens(Words([2, 5], [2, 6])) == (5, 6)
    with pytest.raises(ModelError, match="alike"):
        answer_tokens(Words([2], [2]))


def test_a_decoders_score_is_the_difference_of_two_logits_after_the_last_token() -> None:
    answering = Answering(LLAMA)
    tokens = tokenized(TEXTS, byte_tokens := LLAMA.tokenizer, max_length=100)
    # Bytes: both answers begin with the same space, so N and Y tell them apart.
    no, yes = answer_tokens(byte_tokens)
    assert byte_tokens.decode([no]) == "N" and byte_tokens.decode([yes]) == "Y"
    with torch.no_grad():
        scores = answering(LLAMA.model, packed(tokens, np.arange(3), pad=answering.pad))
        for ids, score in zip(tokens.ids, scores, strict=True):
            logits = LLAMA.model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1]
            assert float(score) == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    assert not [*answering.parameters()]


def test_an_encoders_score_is_a_head_that_starts_at_zero() -> None:
    answering = Answering(BERT)
    BERT.model.eval()
    tokens = tokenized(TEXTS, BERT.tokenizer, max_length=100)
    batch = packed(tokens, np.arange(3), pad=answering.pad)
    assert not answering(BERT.model, batch).any()
    with torch.no_grad():
        answering.weight.copy_(torch.linspace(-1, 1, 32))
        states = BERT.model(input_ids=torch.from_numpy(tokens.ids[2])[None]).last_hidden_state[0].mean(0)
        wanted = torch.nn.functional.normalize(states, dim=0) * 20**0.5 @ answering.weight
        assert float(answering(BERT.model, batch)[2]) == pytest.approx(float(wanted), abs=1e-4)


def test_a_prompt_that_is_too_long_keeps_its_question() -> None:
    whole = tokenized(TEXTS, LLAMA.tokenizer, max_length=100)
    cut = tokenized(TEXTS, LLAMA.tokenizer, max_length=12)
    assert [len(ids) for ids in cut.ids] == [12, 12, 7]
    assert cut.ids[1][0] == whole.ids[1][0] and np.array_equal(cut.ids[1][1:], whole.ids[1][-11:])
    assert len(tokenized((), LLAMA.tokenizer, max_length=12)) == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 3), st.integers(30, 400))
def test_batches_hold_every_row_once_and_groups_together(lengths: list[int], group: int, budget: int) -> None:
    tokens = Tokens([np.full(length, 7) for length in lengths for _ in range(group)])
    found = [rows for rows, _ in batches(tokens, pad=0, group=group, budget=budget)]
    assert sorted(np.concatenate(found).tolist()) == list(range(len(tokens)))
    for rows in found:
        groups = rows.reshape(-1, group)
        assert (groups % group == np.arange(group)).all() and (np.diff(groups, axis=1) == 1).all()


def test_a_common_beginning_is_read_once_and_answers_are_the_same() -> None:
    answering = Answering(LLAMA)
    tokens = tokenized(["Heat (1995): Yes 8\n" * 4 + each for each in TEXTS], LLAMA.tokenizer, max_length=200)
    begun = torch.from_numpy(tokens.ids[0][:70])
    rests = packed(Tokens([ids[70:] for ids in tokens.ids]), np.arange(3), pad=answering.pad)
    with torch.no_grad():
        whole = answering(LLAMA.model, packed(tokens, np.arange(3), pad=answering.pad))
        torch.testing.assert_close(answering(LLAMA.model, rests, begun=begun), whole, rtol=1e-4, atol=1e-5)
        other = answering(LLAMA.model, rests, begun=begun.flip(0))
    assert float((other - whole).abs().min()) > 1e-3


def test_only_what_every_row_goes_on_from_is_read_once() -> None:
    long = np.arange(100, 900)
    rows = [np.append(long, 1), np.append(long, 2), long, long[::-1], np.append(long[:50], 3), np.append(long[:50], 4)]
    assert beginnings(Tokens(rows), group=2).tolist() == [0, 0, 0]
    many = [row for row in rows for _ in range(100)]
    assert beginnings(Tokens(many), group=200).tolist() == [800, 0, 50]
    assert beginnings(Tokens([long] * 2), group=2).tolist() == [0] and not beginnings(Tokens(rows), group=1).any()
    assert len(beginnings(Tokens([]), group=3)) == 0
