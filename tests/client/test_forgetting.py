"""A client that forgets rows of its own: what leaves, what is charged, what is refused."""

from pathlib import Path

import pytest

from client.forgetting import Spending, answer_order
from lora.errors import BudgetExceeded, DataError, ModelError, PrivacyError
from privacy.ledger import Ledger
from privacy.randomness import SeededRandomness
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.remote import ForgetOrder
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
    return ForgetOrder("order", 1, digest, "tiny-bert", "a" * 64, classifier, classifier.rank, config)


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


def test_what_is_refused(classifier: ExportedClassifier, base: BaseModel) -> None:
    plain = order(classifier, base)
    with pytest.raises(PrivacyError, match="no epsilon can be stated"):
        answer_order(plain, base, queries(3), private=True)
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
