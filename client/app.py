"""The Flower ClientApp: greet, train, evaluate, forget. The data stay; B, counts and epsilon leave."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.job import ClientJob, Place, open_ledger, work_for
from client.node import NodeSettings
from client.training import Trained, Work, train
from lora.errors import FrameMismatch
from privacy.ledger import Charge, Receipt
from strategies.federated.job import read_job
from strategies.federated.wire import METRICS, REPORT, WEIGHT, Declined, Order, Update, refusal
from strategies.observe import watch
from strategies.unlearning.wire import Letter, Offered, asked_run

log = logging.getLogger("lethe.client")

Handler = Callable[[Message, Context], Message]


def build(
    run_config: dict[str, Any] | None = None, *, ledger: Path | None = None, settings: NodeSettings | None = None
) -> ClientApp:
    """Make the ClientApp; a simulation may give it the run config and the ledger that Flower would else hand it.

    With `settings` it acts for a node that decides for itself, and whose data, model and ledger are its own.
    """
    app = ClientApp()

    def place_of(context: Context) -> Place:
        if settings is not None:
            return Place.at(settings, context)
        place = Place.of(context)
        return place if ledger is None else Place(place.index, ledger, simulated=True)

    def stand(context: Context) -> tuple[ClientJob, Place]:
        place = place_of(context)
        return place.job(read_job(ClientJob, dict(context.run_config) if run_config is None else run_config)), place

    @app.query("greet")
    @sanitised
    def greet(message: Message, context: Context) -> Message:
        return Message(greeting(*stand(context)), reply_to=message)

    @app.train()
    @sanitised
    def fit(message: Message, context: Context) -> Message:
        job, place = stand(context)
        order = Order.read(message)
        update = fit_one(job, place, order)
        return Message(update.content(), reply_to=message)

    @app.evaluate()
    @sanitised
    def evaluate(message: Message, context: Context) -> Message:
        job, place = stand(context)
        return Message(evaluation(job, place, Order.read(message)), reply_to=message)

    if settings is not None:
        _forgets(app, settings, place_of)
    return app


def _forgets(app: ClientApp, settings: NodeSettings, place_of: Callable[[Context], Place]) -> None:
    """Let a node of its own settings answer orders to forget by what its owner offers."""
    from client.offers import Offers

    offers = Offers(settings)

    @app.query("offers")
    @sanitised
    def offered(message: Message, context: Context) -> Message:
        states = {offer.id: offers.state(offer) for offer in offers.all(asked_run(message))}
        of = {kind: tuple(name for name, state in states.items() if state == kind) for kind in ("open", "answered")}
        told = Offered(settings.name, (*of["answered"], *of["open"]), of["answered"])
        return Message(told.content(), reply_to=message)

    @app.query("forget")
    @sanitised
    def forget(message: Message, context: Context) -> Message:
        letter = Letter.read(message)
        answer = offers.answer(letter, client=place_of(context).name)
        return Message(Letter(letter.offer, answer).content(), reply_to=message)

    @app.query("forgotten")
    @sanitised
    def forgotten(message: Message, context: Context) -> Message:
        letter = Letter.read(message)
        offers.close(letter)
        return Message(Letter(letter.offer).content(), reply_to=message)


def sanitised(handler: Handler) -> Handler:
    """Let no exception text leave the node: Flower would send it verbatim, and it may quote data."""

    @wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        began = time.perf_counter()
        try:
            reply = handler(message, context)
        except Declined as error:
            log.warning("a message was declined: %s", error)
            reply = refusal(error, message)
        except Exception as error:
            log.exception("a message could not be handled")
            reply = refusal(error, message)
        watch.answered(message, reply, seconds=time.perf_counter() - began)
        return reply

    return guarded


def greeting(job: ClientJob, place: Place) -> RecordDict:
    """Say who this is, how many examples it holds (a public number, see the privacy assumptions) and its frame."""
    learner = job.world.learner
    frame = learner.adapted.frame.digest
    report: dict[str, Any] = {"client": place.name, "node": place.node, "frame": frame, "layout": learner.signature}
    return RecordDict(
        {METRICS: MetricRecord({WEIGHT: len(job.world.share(place.index))}), REPORT: ConfigRecord(report)}
    )


def fit_one(job: ClientJob, place: Place, order: Order) -> Update:
    """Train one client: check the frame, charge the ledger, train, and return what may leave."""
    check(job, order)
    work = work_for(job, place.index, number=order.round, name=place.name)
    receipt = charge(job, [work], place, order)
    for error in receipt.refused.values():
        raise error
    return updates(job, [work], run(job, [work], order), order, receipt.charged)[0]


def check(job: ClientJob, order: Order) -> None:
    """Refuse an order made for another frame or layout. Raises FrameMismatch."""
    learner = job.world.learner
    learner.adapted.frame.check(order.frame, who="the server")
    if order.layout != learner.signature:
        raise FrameMismatch(
            "the server trains another layout or another order of labels; use the same model, adapter, task, "
            "federation.strategy and train labels on every client (nodes with data of their own: data.labels)"
        )


def charge(job: ClientJob, works: Sequence[Work], place: Place, order: Order) -> Receipt:
    """Charge the round's steps before any noise is drawn; says who was charged and who was refused."""
    if not job.privacy.private:
        return Receipt()
    charges = [_charge_of(job, work, place, order) for work in works]
    receipt = open_ledger(place.ledger).charge_many(charges)
    watch.charged(place.ledger, charges, receipt)
    return receipt


def _charge_of(job: ClientJob, work: Work, place: Place, order: Order) -> Charge:
    if work.private is None:
        raise ValueError(f"client {work.client} has no privacy plan to charge")
    return Charge(
        client=work.client,
        event=work.private.event(job.training.steps),
        purpose=f"{place.run}: round {order.round}" if place.run else f"round {order.round}",
        budget=job.privacy.epsilon,
        delta=job.privacy.delta,
        simulated=place.simulated,
    )


def run(job: ClientJob, works: Sequence[Work], order: Order) -> Trained:
    """Train the given clients together."""
    return train(
        job.world.learner,
        works,
        start=order.vector,
        config=job.training.at(order.round, rounds=job.federation.rounds),
        parts=order.train,
        seed=job.seed,
        number=order.round,
    )


def updates(
    job: ClientJob, works: Sequence[Work], trained: Trained, order: Order, epsilons: dict[str, float]
) -> list[Update]:
    """Cut out of every client's result what may leave; a private client sends no loss, which would be a release."""
    layout = job.world.learner.layout
    frame = job.world.learner.adapted.frame.fingerprint()
    return [
        Update(
            vector=layout.select(trained.values[slot], order.send).contiguous(),
            client=work.client,
            frame=frame,
            examples=len(work.tokens),
            loss=None if job.privacy.private else trained.losses[slot],
            epsilon=epsilons.get(work.client),
            round=order.round,
        )
        for slot, work in enumerate(works)
    ]


def evaluation(job: ClientJob, place: Place, order: Order) -> RecordDict:
    """Score the global adapter on the client's own examples; refused in private runs, where it would be a release."""
    check(job, order)
    if job.privacy.private:
        raise Declined("a private client does not report its accuracy; leave federation.evaluate_clients off")
    work = work_for(job, place.index, number=order.round, name=place.name)
    scores = job.world.learner.score(order.vector, work.tokens)
    metrics: dict[str, Any] = {WEIGHT: scores.examples, "accuracy": scores.accuracy, "loss": scores.loss}
    return RecordDict({METRICS: MetricRecord(metrics), REPORT: ConfigRecord({"client": place.name})})


app = build()
