"""A client that forgets some of its own rows: slot and statistics are made here, and nothing else leaves."""

from dataclasses import dataclass

from lora.errors import DataError, ModelError, PrivacyError, nearest
from privacy.accounting import Event
from privacy.ledger import Ledger
from privacy.randomness import Randomness, SecureRandomness
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.forgotten import Forgotten, GatedSlot, check_rows
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from tasks.examples import Examples
from tasks.models import BaseModel, weights_digest


@dataclass(frozen=True)
class Spending:
    """Whose ledger pays for noised statistics, up to which epsilon."""

    ledger: Ledger
    client: str
    budget: float | None
    delta: float


def answer_order(
    order: ForgetOrder,
    base: BaseModel,
    examples: Examples,
    *,
    classes: tuple[str, ...] = (),
    spending: Spending | None = None,
    private: bool = False,
    randomness: Randomness | None = None,
) -> ForgetAnswer:
    """Train the slot and the detector of an order on the client's rows, and return what may leave.

    `classes` are those that the rows stand for as a whole; without, the rows alone are forgotten. The answer holds B's,
    class statistics and counts, never a row, a feature or a loss.

    **Guarantee** (with `forgetting.statistics_noise` above 0): the moments behind the detector's statistics, one
    Gaussian release a layer, are charged to the client's ledger before their noise is drawn. Not covered are the slot,
    the scales and thresholds of the detector, and the counts.

    | case | what happens |
    |---|---|
    | `private` | PrivacyError: slot and thresholds have no bound yet, and noised statistics alone are not private |
    | noise is asked for and no ledger is given | PrivacyError, nothing drawn |
    | the budget would be passed | BudgetExceeded, nothing drawn |
    | another base model than the order's | ModelError |
    | too few rows, rows of other classes, an unknown class | DataError |
    """
    if private:
        raise PrivacyError(
            "private=True: the slot is not trained with DP-SGD and the detector's thresholds are not noised, so no "
            "epsilon can be stated for a forget request; leave it out, or keep the request at the client"
        )
    check_rows(len(examples))
    _check_classes(order, examples, classes)
    digest = weights_digest(base.model)
    if digest != order.base:
        raise ModelError(
            f"the base model has digest {digest[:12]}, and the order was made for {order.base[:12]} "
            f"({order.reference}); load that model"
        )
    served = order.over(base)
    try:
        request = AuditedRequest(examples, seed=order.config.seed)
        gated = _gated(order, served, request, classes, _paid(order, spending, randomness))
    finally:
        # The base model is the client's, and is left as it was.
        served.learner.adapted.detach()
    digest = served.frames.block(order.block).digest
    noise = order.config.statistics_noise
    return ForgetAnswer.of(order, gated, digest=digest, classes=classes, rows=len(examples), noise=noise)


def _gated(
    order: ForgetOrder,
    served: Forgotten,
    request: AuditedRequest,
    classes: tuple[str, ...],
    randomness: Randomness | None,
) -> GatedSlot:
    places = {label: place for place, label in enumerate(order.classifier.labels)}
    avoid = {places[label] for label in (*classes, *order.forgotten)}
    made = served.train_slot(
        request, block=order.block, avoid=avoid, whole_classes=bool(classes), seed=order.config.seed
    )
    detector = served.fit_detector(request, randomness=randomness)
    return GatedSlot(order.request, order.block, made.slot, detector)


def _check_classes(order: ForgetOrder, examples: Examples, classes: tuple[str, ...]) -> None:
    labels = order.classifier.labels
    for name in classes:
        if name not in labels:
            raise DataError(f"class '{name}' is not among the {len(labels)} of the order{nearest(name, labels)}")
    if examples.labels is None:
        raise DataError("the rows have no labels; give the label that each was learned with")
    strange = {labels[label] for label in examples.labels} - set(classes)
    if classes and strange:
        raise DataError(f"rows are of class '{min(strange)}', which the request does not name; leave them out")


def _paid(order: ForgetOrder, spending: Spending | None, randomness: Randomness | None) -> Randomness | None:
    """Charge the noise of the statistics before it is drawn; returns where to draw it from, None for no noise."""
    noise = order.config.statistics_noise
    if not noise:
        return None
    if spending is None:
        raise PrivacyError(
            f"forgetting.statistics_noise={noise:g} is charged to a ledger, and none is given; give the client's, or "
            "set it to 0"
        )
    spending.ledger.charge(
        spending.client,
        Event(rate=1.0, noise_multiplier=noise, steps=len(order.config.layers)),
        purpose=f"forget request {order.request}: detector statistics",
        budget=spending.budget,
        delta=spending.delta,
        sampling="none",
        simulated=randomness is not None and not randomness.secure,
    )
    return randomness or SecureRandomness()
