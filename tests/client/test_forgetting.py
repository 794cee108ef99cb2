"""A client that forgets rows of its own: what leaves, what is charged, what is refused."""

from pathlib import Path

import pytest
from torch import Tensor

from client.forgetting import Spending, answer_order
from lora.errors import BudgetExceeded, DataError, ModelError, PrivacyError
from privacy.accounting import Event, epsilon
from privacy.ledger import Ledger
from privacy.randomness import SeededRandomness
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from tasks.exported import ExportedClassifier
from tasks.models import BaseModel, load_base, weights_digest
from tests.queries import TINY, export_classifier, queries

SHORT = ForgettingConfig(rank=2, epochs=1, least_steps=0, batch=24)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> ExportedClassifier:
    place = export_classifier(tmp_path_factory.mktemp("client") / "adapter")
    return ExportedClassifier.read(place, max_length=64)


@pytest.fixture
def base() -> BaseModel:
    return load_base(TINY, causal=False)


def order(classifier: ExportedClassifier, base: BaseModel, *, noise: float = 0.0) -> ForgetOrder:
    config = SHORT.model_copy(update={"statistics_noise": noise})
    digest = weights_digest(base.model)
    return ForgetOrder("order", 1, digest, "tiny-bert", "a" * 64, classifier, classifier.rank, config, "c" * 64)


def test_only_tensors_counts_and_digests_leave(classifier: ExportedClassifier, base: BaseModel) -> None:
    answer = answer_order(order(classifier, base), base, queries(3), classes=("money",))
    assert answer.rows == 24 and answer.block == 1 and answer.noise == 0 and answer.adapter == "a" * 64
    # Numbers of the statistics: far fewer than a feature a row.
    assert answer.detector.numbers < 24 * base.width
    data = answer.to_bytes()
    assert not any(text.encode() in data for text in queries(3).texts)


def test_statistics_are_charged_before_their_noise_is_drawn(
    classifier: ExportedClassifier, base: BaseModel, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    spending = Spending(ledger, "clinic", budget=5.0, delta=1e-4)
    noisy = order(classifier, base, noise=4.0)
    answers = [
        answer_order(noisy, base, queries(3), spending=spending, randomness=SeededRandomness(seed)) for seed in (0, 1)
    ]
    charged = ledger.rows("clinic")
    assert len(charged) == 2 and all("detector statistics" in each.purpose for each in charged)
    one, two = (answer.detector.statistics[0].pulled for answer in answers)
    assert not one.equal(two) and answers[0].noise == 4.0
    before = len(ledger.rows("clinic"))
    with pytest.raises(BudgetExceeded):
        answer_order(noisy, base, queries(3), spending=Spending(ledger, "clinic", budget=0.5, delta=1e-4))
    assert len(ledger.rows("clinic")) == before


class Watched(SeededRandomness):
    """Seeded draws that fail where less was charged than has to be, and count what is drawn."""

    def __init__(self, ledger: Ledger, events: int) -> None:
        super().__init__(0)
        self.ledger, self.events, self.drawn = ledger, events, 0

    def gaussian(self, size: int) -> Tensor:
        assert len(self.ledger.rows("clinic")) == self.events
        self.drawn += size
        return super().gaussian(size)


def test_a_private_answer_is_charged_before_anything_is_drawn_and_costs_what_it_says(
    classifier: ExportedClassifier, base: BaseModel, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    asked = order(classifier, base)
    spending, source = Spending(ledger, "clinic", budget=9.0, delta=1e-4), Watched(ledger, 2)
    answer = answer_order(
        asked, base, queries(3), classes=("money",), spending=spending, private=8.0, randomness=source
    )
    slot, statistics = ledger.rows("clinic")
    assert (slot.sampling, statistics.sampling) == ("poisson", "none") and statistics.steps == 2
    assert slot.steps == asked.config.private_steps and slot.rate == 1.0
    told = epsilon([Event(e.rate, e.noise_multiplier, e.steps) for e in (slot, statistics)], delta=1e-4)
    assert answer.epsilon == pytest.approx(told) and 7.9 < told <= 8.0 and answer.delta == 1e-4
    # Every B of every step, and both releases: nothing in the answer is without noise.
    assert source.drawn == slot.steps * answer.b.numel() + (1 + base.width) + 48
    again = ForgetAnswer.from_bytes(answer.to_bytes())
    assert (again.epsilon, again.delta) == (answer.epsilon, answer.delta) and again.b.equal(answer.b)
    assert not any(text.encode() in answer.to_bytes() for text in queries(3).texts)
    with pytest.raises(BudgetExceeded):
        answer_order(asked, base, queries(3), spending=spending, private=8.0, randomness=Watched(ledger, -1))


def test_what_is_refused(classifier: ExportedClassifier, base: BaseModel) -> None:
    plain = order(classifier, base)
    with pytest.raises(PrivacyError, match="private=8: a private answer is charged to a ledger"):
        answer_order(plain, base, queries(3), private=8.0)
    with pytest.raises(PrivacyError, match="charged to a ledger, and none is given"):
        answer_order(order(classifier, base, noise=1.0), base, queries(3))
    with pytest.raises(DataError, match="7 rows is too small"):
        answer_order(plain, base, queries(3).take(range(7)))
    with pytest.raises(DataError, match="rows are of class 'money'"):
        answer_order(plain, base, queries(3), classes=("alarm",))
    with pytest.raises(DataError, match="class 'mony' is not among the 4 of the order; did you mean 'money'"):
        answer_order(plain, base, queries(3), classes=("mony",))
    other = load_base(TINY, causal=False)
    next(other.model.parameters()).data.add_(1.0)
    with pytest.raises(ModelError, match="load that model"):
        answer_order(plain, other, queries(3))
