"""A client that forgets some of its own rows: slot and statistics are made here, and nothing else leaves."""

from dataclasses import dataclass

from lora.errors import DataError, ModelError, PrivacyError, nearest
from privacy.accounting import Event, calibrate, epsilon
from privacy.ledger import Charge, Ledger, Receipt
from privacy.mechanism import Mechanism
from privacy.plan import PrivatePlan
from privacy.randomness import Randomness, SecureRandomness
from strategies.observe import watch
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.forgotten import Forgotten, GatedSlot, check_rows
from strategies.unlearning.o3 import Slot
from strategies.unlearning.private_detector import PrivateStatistics, fit_private_detector
from strategies.unlearning.private_slot import unlearn_privately
from strategies.unlearning.remote import ForgetAnswer, ForgetOrder
from tasks.examples import Examples
from tasks.models import BaseModel, weights_digest


@dataclass(frozen=True)
class Spending:
    """Whose ledger pays for noise, up to which epsilon."""

    ledger: Ledger
    client: str
    budget: float | None
    delta: float


@dataclass(frozen=True)
class PrivateForgetting:
    """The noise of a private answer: both releases of its statistics, and the steps of its slot."""

    statistics: PrivateStatistics
    slot: PrivatePlan
    layers: int

    @classmethod
    def planned(cls, config: ForgettingConfig, rows: int, *, epsilon: float, delta: float) -> "PrivateForgetting":
        """Divide epsilon: what statistics cost (a third, or what the settings say), and the steps with the rest.

        Raises PrivacyError where epsilon cannot be met.
        """
        layers = len(config.layers)
        noise = config.statistics_noise or calibrate(epsilon=epsilon / 3, delta=delta, rate=1.0, steps=2 * layers)
        statistics = PrivateStatistics(noise, config.coverage)
        rate = min(1.0, config.private_lot / rows)
        multiplier = calibrate(
            epsilon=epsilon, delta=delta, rate=rate, steps=config.private_steps,
            beside=(statistics.event(layers=layers),),
        )  # fmt: skip
        mechanism = Mechanism(config.private_clip, None, multiplier)
        plan = PrivatePlan(mechanism, rate, rate * rows, config.private_steps, epsilon, delta)
        return cls(statistics, plan, layers)

    @property
    def events(self) -> tuple[Event, Event]:
        """What is charged: the slot's steps, then the statistics."""
        return self.slot.event(self.slot.steps), self.statistics.event(layers=self.layers)

    @property
    def epsilon(self) -> float:
        """What the answer costs by itself; the ledger may hold more."""
        return epsilon(self.events, delta=self.slot.delta)


def answer_order(
    order: ForgetOrder,
    base: BaseModel,
    examples: Examples,
    *,
    classes: tuple[str, ...] = (),
    spending: Spending | None = None,
    private: float | None = None,
    randomness: Randomness | None = None,
) -> ForgetAnswer:
    """Train the slot and the detector of an order on the client's rows, and return what may leave.

    `classes` are those that the rows stand for as a whole; without, the rows alone are forgotten. The answer holds B's,
    class statistics and counts, never a row, a feature or a loss.

    **Guarantee** (with `private`, an epsilon): B's, statistics and threshold together are (epsilon, delta)-
    differentially private for adding or removing one row, at the spending's delta; both events are charged to the
    client's ledger before any noise is drawn. Public are how many rows there are and which classes are named.

    | case | what happens |
    |---|---|
    | `private` without a ledger | PrivacyError, nothing drawn |
    | the ledger's earlier charges leave too little of its budget | BudgetExceeded, nothing drawn |
    | `forgetting.statistics_noise` without `private` | the moments alone are noised and charged: no epsilon is told |
    | noise is asked for and no ledger is given | PrivacyError, nothing drawn |
    | another base model than the order's | ModelError |
    | too few rows, rows of other classes, an unknown class | DataError |
    """
    check_rows(len(examples))
    _check_classes(order, examples, classes)
    _check_base(order, base)
    paid = None if private is None else _planned(order, len(examples), private, spending)
    served = order.over(base)
    try:
        request = AuditedRequest(examples, seed=order.config.seed, whole=paid is not None)
        if paid is None:
            gated = _gated(order, served, request, classes, _paid(order, spending, randomness))
        else:
            _charge_private(order, paid, spending, randomness)
            source = randomness or SecureRandomness()
            gated = _private(order, served, request, classes, paid=paid, randomness=source)
    finally:
        # The base model is the client's, and is left as it was.
        served.learner.adapted.detach()
    digest = served.frames.block(order.block).digest
    noise = order.config.statistics_noise if paid is None else paid.statistics.noise_multiplier
    spent = {} if paid is None else {"epsilon": paid.epsilon, "delta": paid.slot.delta}
    return ForgetAnswer.of(order, gated, digest=digest, classes=classes, rows=len(examples), noise=noise, **spent)


def _check_base(order: ForgetOrder, base: BaseModel) -> None:
    digest = weights_digest(base.model)
    if digest != order.base:
        raise ModelError(
            f"the base model has digest {digest[:12]}, and the order was made for {order.base[:12]} "
            f"({order.reference}); load that model"
        )


def _gated(
    order: ForgetOrder,
    served: Forgotten,
    request: AuditedRequest,
    classes: tuple[str, ...],
    randomness: Randomness | None,
) -> GatedSlot:
    made = served.train_slot(
        request, block=order.block, avoid=_avoided(order, classes), whole_classes=bool(classes), seed=order.config.seed
    )
    detector = served.fit_detector(request, randomness=randomness)
    return GatedSlot(order.request, order.block, made.slot, detector)


def _private(
    order: ForgetOrder,
    served: Forgotten,
    request: AuditedRequest,
    classes: tuple[str, ...],
    *,
    paid: PrivateForgetting,
    randomness: Randomness,
) -> GatedSlot:
    places = {label: place for place, label in enumerate(order.classifier.labels)}
    tokens = request.tokens(served.learner.task)
    detector = fit_private_detector(
        served.encoder, request, tokens, classes=tuple(places[name] for name in classes), settings=paid.statistics,
        randomness=randomness,
    )  # fmt: skip
    objective = served.objective(request, _avoided(order, classes), whole_classes=bool(classes))
    made = unlearn_privately(
        served.learner, request, objective, model=served.values, rate=order.config.private_rate, plan=paid.slot,
        slot=Slot.fresh(served.sites, served.frames.block(order.block)), randomness=randomness, seed=order.config.seed,
    )  # fmt: skip
    return GatedSlot(order.request, order.block, made.slot, detector)


def _avoided(order: ForgetOrder, classes: tuple[str, ...]) -> set[int]:
    places = {label: place for place, label in enumerate(order.classifier.labels)}
    return {places[label] for label in (*classes, *order.forgotten)}


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


def _planned(order: ForgetOrder, rows: int, private: float, spending: Spending | None) -> PrivateForgetting:
    if spending is None:
        raise PrivacyError(
            f"private={private:g}: a private answer is charged to a ledger, and none is given; give the client's "
            "(--ledger FILE)"
        )
    return PrivateForgetting.planned(order.config, rows, epsilon=private, delta=spending.delta)


def _charge_private(
    order: ForgetOrder, paid: PrivateForgetting, spending: Spending | None, randomness: Randomness | None
) -> None:
    """Charge both events, or neither, before any noise is drawn. Raises BudgetExceeded."""
    if spending is not None:
        slot, statistics = paid.events
        _commit(
            spending,
            _charge(order, slot, spending, randomness, what="slot", sampling="poisson"),
            _charge(order, statistics, spending, randomness, what="detector statistics", sampling="none"),
        )


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
    event = Event(rate=1.0, noise_multiplier=noise, steps=len(order.config.layers))
    _commit(spending, _charge(order, event, spending, randomness, what="detector statistics", sampling="none"))
    return randomness or SecureRandomness()


def _commit(spending: Spending, *charges: Charge) -> None:
    """Charge all or none, and let metrics and log know. Raises BudgetExceeded."""
    spent = spending.ledger.charge_together(charges)
    watch.charged(spending.ledger.path, charges[-1:], Receipt(charged={spending.client: spent}))


def _charge(
    order: ForgetOrder, event: Event, spending: Spending, randomness: Randomness | None, *, what: str, sampling: str
) -> Charge:
    return Charge(
        spending.client, event, f"forget request {order.request}: {what}", spending.budget, spending.delta,
        sampling=sampling, simulated=randomness is not None and not randomness.secure,
    )  # fmt: skip
