"""Texts: a batch of anybody's texts is answered as one by one, and nobody by another's slot."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from lora.bank import Bank
from lora.codec import Entry, Layout
from lora.config import AdapterConfig
from lora.errors import LetheError, ModelError, Unknown
from lora.gate import Gate
from lora.overlay import Overlay
from lora.peft_files import export_adapter
from server.service.answers import BASE, OWN
from server.service.sources import BankSource
from server.service.texts import Gated, TextAnswer, TextAsked, Texts
from server.service.warm import WarmSlots
from strategies.personal.slots import UserSlots
from tasks.config import ModelConfig, TaskConfig
from tasks.learner import build_learner
from tasks.models import load_base
from tasks.tokens import Batch
from tests.server.service.conftest import USERS, Encoder, drawn

WORDS = st.text("abc xyz,.", min_size=0, max_size=60)


def texts(encoder: Encoder, *, warm: int = 6, **more: Any) -> Texts:
    return Texts(encoder.learner, WarmSlots(BankSource(encoder.slots), rows=warm), **more)


def values(answer: TextAnswer | LetheError) -> torch.Tensor:
    assert isinstance(answer, TextAnswer)
    return torch.tensor(answer.values)


def alone(encoder: Encoder, asked: TextAsked) -> torch.Tensor:
    """What the learner itself answers for one row, with the slot that the bank holds."""
    learner, slot = encoder.learner, encoder.learner.start()
    if asked.adapter is not None:
        slot = encoder.slots.read([asked.adapter]).values[0]
    ids = learner.base.tokenizer([asked.text], truncation=True, max_length=48)["input_ids"][0] or [0]
    blocks = learner.layout.views(slot)
    with torch.no_grad(), learner.adapted.bound(blocks) as model:
        states = model(input_ids=torch.tensor([ids])).last_hidden_state.mean(1)
    unit = torch.nn.functional.normalize(states, dim=-1)[0]
    if asked.kind == "embed":
        return unit
    head: Any = learner.task
    weight, bias = blocks.get(("head", "weight"), head.head.weight), blocks.get(("head", "bias"), head.head.bias)
    return torch.softmax(weight @ unit * 20**0.5 + bias, dim=0)


ROWS = st.builds(TextAsked, st.sampled_from([*USERS, None]), WORDS, st.sampled_from(["classify", "embed"]))


@settings(max_examples=25)
@given(asked=st.lists(ROWS, min_size=1, max_size=14))
def test_any_mix_is_answered_as_one_by_one(encoder: Encoder, asked: list[TextAsked]) -> None:
    for row, answer in zip(asked, texts(encoder)(asked), strict=True):
        torch.testing.assert_close(values(answer), alone(encoder, row), atol=1e-5, rtol=0)


def test_slots_matter_and_no_row_is_answered_by_another_users(encoder: Encoder) -> None:
    asked = [TextAsked(user, "the same text for all") for user in USERS]
    found = torch.stack([values(answer) for answer in texts(encoder)(asked)])
    distances = (found[:, None] - found[None]).abs().amax(2)
    assert distances[~torch.eye(len(USERS), dtype=torch.bool)].min() > 1e-4


def test_an_answer_says_whose_it_is(encoder: Encoder) -> None:
    own, base, nobody = texts(encoder)([TextAsked("user-3", "x"), TextAsked(None, "x"), TextAsked("user-33", "x")])
    assert isinstance(own, TextAnswer) and isinstance(base, TextAnswer)
    assert own.provenance.personalized and own.provenance.gate == {"user-3": 1.0} and own.provenance.reason == OWN
    assert own.provenance.version == encoder.slots.version("user-3")
    assert (base.provenance.personalized, base.provenance.adapter, base.provenance.reason) == (False, None, BASE)
    assert isinstance(nobody, Unknown)


def test_a_new_slot_answers_from_the_next_batch_on(encoder: Encoder) -> None:
    slots = UserSlots(encoder.learner.layout, frame="f" * 64)
    slots.add(["ada"], drawn(encoder.learner.layout, 1)[0])
    ask = Texts(encoder.learner, WarmSlots(BankSource(slots)))
    before = values(ask([TextAsked("ada", "hello")])[0])
    slots.write(["ada"], drawn(encoder.learner.layout, 1, seed=5))
    (after,) = ask([TextAsked("ada", "hello")])
    assert (values(after) - before).abs().max() > 1e-4
    assert isinstance(after, TextAnswer) and after.provenance.version == 2
    slots.remove(["ada"])
    assert isinstance(ask([TextAsked("ada", "hello")])[0], Unknown)


def test_it_answers_as_peft_does(encoder: Encoder, tmp_path: Any) -> None:
    learner = encoder.learner
    slot = learner.layout.views(encoder.slots.read(["user-4"]).values[0])
    export_adapter(learner.adapted, slot, tmp_path / "a", reference="tiny-bert", task_type="FEATURE_EXTRACTION")
    theirs = PeftModel.from_pretrained(load_base(ModelConfig(name="tiny-bert"), causal=False).model, tmp_path / "a")
    text = "somebody else's code"
    ids = torch.tensor([learner.base.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        states = theirs(input_ids=ids).last_hidden_state.mean(1)[0]
    (ours,) = texts(encoder)([TextAsked("user-4", text, "embed")])
    torch.testing.assert_close(values(ours), torch.nn.functional.normalize(states, dim=0), atol=1e-5, rtol=0)


def test_what_requests_to_forget_add_reaches_their_rows_only(encoder: Encoder) -> None:
    layout = Layout((*encoder.learner.adapted.entries("A"), *encoder.learner.adapted.entries("B")))
    requests = Bank.of(layout, drawn(layout, 1)[0], slots=1)
    asked = [TextAsked("user-1", "plain text"), TextAsked("user-1", "text with A")]
    letter = encoder.learner.base.tokenizer("A")["input_ids"][-1]

    def gates(batch: Batch) -> Gated:
        weights = batch.input_ids.eq(letter).any(1, keepdim=True).float()
        return Gated(Overlay.of(requests, Gate.mixture(weights)), ("a-request",), weights)

    gated = texts(encoder, gates=gates)(asked)
    plain = texts(encoder)(asked)
    assert values(gated[0]).equal(values(plain[0]))
    assert (values(gated[1]) - values(plain[1])).abs().max() > 1e-4
    told = [each.provenance.gate for each in gated if isinstance(each, TextAnswer)]
    assert told == [{"user-1": 1.0}, {"user-1": 1.0, "a-request": 1.0}]


def test_a_model_that_writes_or_slots_of_another_layout_are_refused(encoder: Encoder) -> None:
    other = UserSlots(Layout((Entry("B", "x", (3, 2)),)), frame="f" * 64)
    with pytest.raises(ModelError, match="another layout"):
        Texts(encoder.learner, WarmSlots(BankSource(other)))
    writes = build_learner(
        ModelConfig(name="tiny-llama"), TaskConfig(kind="causal-lm"), AdapterConfig(rank=2, alpha=4), labels=(),
        trains_frame=False,
    )  # fmt: skip
    with pytest.raises(ModelError, match="causal-lm"):
        Texts(writes, WarmSlots(BankSource(UserSlots(writes.layout, frame="f" * 64))))
