"""Writing: every row's tokens are those that its own adapter writes alone, whoever comes and goes beside it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import DataError, Unknown
from server.service.decoding import Decoding
from server.service.generation import WriteAsked, Writing, Written
from server.service.lent import Lent
from server.service.queue import Work
from server.service.sources import BankSource
from server.service.warm import WarmSlots
from strategies.personal.slots import UserSlots
from tests.server.service.conftest import USERS, Decoder, drawn, works


def writing(decoder: Decoder, *, rows: int = 8, **more: Any) -> Writing:
    return Writing(decoder.base, decoder.adapted, WarmSlots(BankSource(decoder.slots)), rows=rows, **more)


def finished(worker: Writing, *new: Work[WriteAsked]) -> list[Written]:
    worker.step(new)
    while worker.running:
        worker.step([])
    return [work.answer.result(0) for work in new]


def theirs(decoder: Decoder, asked: WriteAsked) -> list[int]:
    """What transformers' own generate writes greedily with that slot bound, end of text included."""
    slot = torch.zeros(decoder.slots.layout.size)
    if asked.adapter is not None:
        slot = decoder.slots.read([asked.adapter]).values[0]
    ids = torch.tensor([decoder.base.tokenizer(asked.prompt)["input_ids"] or [1]])
    with torch.no_grad(), decoder.adapted.bound(decoder.slots.layout.views(slot)) as model:
        found = model.generate(ids, max_new_tokens=asked.most, do_sample=False, use_cache=True, eos_token_id=2)  # type: ignore[operator]
    return [token for token in found[0, ids.shape[1] :].tolist() if token != 2]


PROMPTS = st.text("abcdef ", max_size=12)
ASKED = st.builds(WriteAsked, st.sampled_from([*USERS, None]), PROMPTS, st.integers(1, 9))


@settings(max_examples=12)
@given(first=st.lists(ASKED, min_size=1, max_size=4), later=st.lists(ASKED, max_size=4), after=st.integers(0, 5))
def test_rows_that_join_and_leave_write_what_generate_writes_alone(
    decoder: Decoder, first: list[WriteAsked], later: list[WriteAsked], after: int
) -> None:
    worker, one, two = writing(decoder), works(*first), works(*later)
    worker.step(one)
    for _ in range(after):
        worker.step([])
    finished(worker, *two)
    for work in [*one, *two]:
        assert list(work.answer.result(0).tokens) == theirs(decoder, work.asked)


@settings(max_examples=15)
@given(data=st.data())
def test_logits_do_not_depend_on_who_is_beside(decoder: Decoder, data: st.DataObject) -> None:
    """Rows join in any order and leave in any order; every step's logits are those of a row alone, to 1e-5."""
    layout, slots = decoder.slots.layout, drawn(decoder.slots.layout, 6, size=0.2)
    many = Decoding(decoder.base, decoder.adapted, layout, rows=8)
    alone: list[Decoding] = []
    for _ in range(data.draw(st.integers(2, 5), label="turns")):
        new = data.draw(st.integers(0 if alone else 1, min(2, 6 - len(alone))), label="new")
        if new:
            prompts = [
                torch.tensor(data.draw(st.lists(st.integers(3, 258), min_size=1, max_size=7))) for _ in range(new)
            ]
            who = [data.draw(st.integers(0, 5)) for _ in range(new)]
            many.copy(Lent.of(slots[who]))
            found = many.join(prompts)
            for row, (prompt, own) in enumerate(zip(prompts, who, strict=True)):
                single = Decoding(decoder.base, decoder.adapted, layout, rows=1)
                single.copy(Lent.of(slots[own : own + 1]))
                torch.testing.assert_close(found[row : row + 1], single.join([prompt]), atol=1e-5, rtol=0)
                alone.append(single)
        tokens = torch.tensor(data.draw(st.lists(st.integers(3, 258), min_size=len(alone), max_size=len(alone))))
        found = many.step(tokens)
        for row, single in enumerate(alone):
            torch.testing.assert_close(found[row : row + 1], single.step(tokens[row : row + 1]), atol=1e-5, rtol=0)
        keep = [row for row in range(len(alone)) if data.draw(st.booleans(), label="stays")]
        many.keep(keep)
        alone = [alone[row] for row in keep]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_a_slot_that_is_overwritten_serves_to_the_end_of_its_text_and_not_longer(decoder: Decoder) -> None:
    slots = UserSlots(decoder.slots.layout, frame="f" * 64)
    slots.add(["ada"], decoder.slots.read(["user-1"]).values[0])
    worker = Writing(decoder.base, decoder.adapted, WarmSlots(BankSource(slots)), rows=4)
    asked = WriteAsked("ada", "once", 6)
    (running,) = works(asked)
    worker.step([running])
    slots.write(["ada"], decoder.slots.read(["user-2"]).values)
    (new,) = finished(worker, *works(asked))
    old = running.answer.result(0)
    assert (old.provenance.version, new.provenance.version) == (1, 2)
    assert list(old.tokens) == theirs(decoder, WriteAsked("user-1", "once", 6))
    assert list(new.tokens) == theirs(decoder, WriteAsked("user-2", "once", 6))
    assert old.tokens != new.tokens


def test_one_who_is_gone_leaves_the_batch_and_no_numbers(decoder: Decoder) -> None:
    worker = writing(decoder)
    stays, goes = works(WriteAsked("user-1", "abc", 8), WriteAsked("user-2", "de", 8))
    worker.step([goes, stays])
    goes.tell(Unknown("forgotten"))
    worker.step([])
    assert worker.running == 1
    slots = worker._decoding.slots
    assert not any(block.any() for block in slots.views(slice(1, slots.rows)).values())
    assert all(block.any() for block in slots.views(slice(0, 1)).values())
    finished(worker)
    assert list(stays.answer.result(0).tokens) == theirs(decoder, stays.asked)


def test_what_cannot_be_written_is_said_and_the_others_are(decoder: Decoder) -> None:
    worker = writing(decoder, longest=20)
    unknown, long, good = works(
        WriteAsked("nobody", "x", 3), WriteAsked("user-1", "x" * 18, 3), WriteAsked("user-1", "x", 3)
    )
    worker.step([unknown, long, good])
    while worker.running:
        worker.step([])
    with pytest.raises(Unknown, match="nobody"):
        unknown.answer.result(0)
    with pytest.raises(DataError, match="prompt of 18 tokens and max_tokens=3"):
        long.answer.result(0)
    assert good.answer.result(0).finish in ("length", "stop")
    worker.step(both := works(WriteAsked("nobody", "x", 3)))
    assert worker.running == 0 and both[0].over


def test_equal_seeds_draw_equal_tokens_whoever_is_beside(decoder: Decoder) -> None:
    asked = WriteAsked("user-3", "now", 12, temperature=1.5, top_p=0.9, seed=7)
    (alone,) = finished(writing(decoder), *works(asked))
    beside = finished(writing(decoder), *works(WriteAsked("user-4", "longer prompt", 4), asked))
    other = finished(writing(decoder), *works(WriteAsked("user-3", "now", 12, temperature=1.5, seed=8)))
    assert beside[1].tokens == alone.tokens != other[0].tokens


def test_draws_follow_the_shares_and_top_p_cuts_them(decoder: Decoder) -> None:
    from server.service.generation import _chosen, _Row

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def share(**more: Any) -> torch.Tensor:
        row: Any = _Row(works(WriteAsked(None, "", **more))[0], None, 0, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        drawn = torch.tensor([_chosen(logits, row) for _ in range(4000)])
        return torch.bincount(drawn, minlength=4) / 4000

    assert (share(temperature=1.0) - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.03
    assert (share(temperature=1.0, top_p=0.7) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.03
    assert share(temperature=0.0).tolist() == [1, 0, 0, 0]


def test_text_is_handed_out_as_it_comes_and_ends_before_a_stop_text(decoder: Decoder) -> None:
    whole = finished(writing(decoder), *works(WriteAsked("user-5", "tell", 16)))[0].text
    assert len(whole) > 6
    stop = whole[4:6]
    pieces: list[str] = []
    asked = WriteAsked("user-5", "tell", 16, stop=("never so", stop), listener=pieces.append)
    (cut,) = finished(writing(decoder), *works(asked))
    assert cut.text == whole[: whole.find(stop)] and cut.finish == "stop"
    assert "".join(pieces) == cut.text


def test_half_a_character_is_held_back(decoder: Decoder) -> None:
    from server.service.generation import _Row

    worker, pieces = writing(decoder), list[str]()
    row = _Row(works(WriteAsked(None, "", 9, listener=pieces.append))[0], None, 0, torch.Generator())  # type: ignore[arg-type]
    for token in decoder.base.tokenizer("né")["input_ids"]:
        worker._note(row, token)
    assert pieces == ["n", "é"]
