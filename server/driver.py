"""The round driver: select, train, check, aggregate, evaluate, checkpoint, report; resumable after any kill."""

import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from lora.errors import FederationError, LetheError
from privacy.plan import assumptions
from server.checkpoint import Checkpoint, Checkpoints, check_config
from server.export import export
from server.job import ServerJob
from server.records import Records
from server.roster import Roster, exchange
from strategies.federated.selection import natural
from strategies.federated.strategy import FederatedLoRA, Refused, read_vector_of
from strategies.federated.wire import EVALUATE, METRICS, Order
from strategies.flower import to_record
from tasks.metrics import Scores


@dataclass
class Progress:
    """Where a run stands: the global vector and the last finished round."""

    vector: Tensor
    round: int = 0
    spent: bool = False
    """True once so many clients are out of budget that too few are left for a round."""


@dataclass
class Tally:
    """What the summary sums up over all rounds; a checkpoint keeps it."""

    refused: list[dict[str, Any]] = field(default_factory=list)
    epsilons: dict[str, float] = field(default_factory=dict)
    aggregation_error: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    """The record of the last round, in case a kill comes between its checkpoint and its report."""


@dataclass
class Clock:
    """Seconds by step of the round."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Any:
        """Add the time of the block to a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


class RoundDriver:
    """Runs a job over a Grid into a run directory.

    One function a step, in the order of the design: select, (clients charge their ledgers,) train, check, aggregate,
    evaluate, checkpoint, report.
    """

    def __init__(
        self,
        job: ServerJob,
        grid: Grid,
        directory: Path,
        *,
        records: Records,
        about: Mapping[str, Any] | None = None,
        ledger_position: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.job, self.grid, self.directory, self.records = job, grid, directory, records
        self.about, self.ledger_position = dict(about or {}), ledger_position
        self.world = job.world
        self.learner = self.world.learner
        self.roster = Roster()
        self.strategy = FederatedLoRA(
            job.federation,
            plan=job.plan,
            layout=self.learner.layout,
            signature=self.learner.signature,
            frame=self.learner.adapted.frame,
            seed=job.seed,
            private=job.privacy.private,
            roster=self.roster.names,
        )
        self.checkpoints = Checkpoints(directory / "checkpoints", keep=job.server.keep)
        # What a result does not depend on may change between a run and its resume.
        self.config: dict[str, object] = job.model_dump(
            mode="json",
            exclude={"server": True, "federation": {"timeout"}, "model": {"device", "gradient_checkpointing"}},
        )
        self.tally = Tally()
        self.unable: set[str] = set()
        """Clients that have no budget left, or have declined: none of them will train in this run again."""

    def run(self) -> dict[str, Any]:
        """Run all rounds that are left and return the summary."""
        began = time.perf_counter()
        self._announce()
        self._await_clients(settle=True)
        progress = self._resume()
        initial = self._begin(progress)
        while progress.round < self.job.federation.rounds and not progress.spent:
            self._round(progress)
        return self._finish(progress, initial, began)

    def _await_clients(self, *, settle: bool) -> None:
        federation = self.job.federation
        wanted = federation.min_clients
        self.roster.await_clients(
            self.grid,
            wanted=wanted,
            timeout=federation.greeting_timeout,
            settle=settle,
            tell=lambda online: self.records.tell("waiting", online=online, wanted=wanted),
        )

    def _announce(self) -> None:
        """Tell the watchers what is about to run."""
        federation = self.job.federation
        self.records.tell(
            "begun",
            rounds=federation.rounds,
            min_clients=federation.min_clients,
            privacy=self._privacy() if self.job.privacy.private else None,
        )

    def _privacy(self) -> dict[str, Any]:
        """Say what an epsilon of this run rests on."""
        stated = assumptions(self.job.privacy)
        return {
            "epsilon_budget": self.job.privacy.epsilon,
            "delta": self.job.privacy.delta,
            "unit": stated["unit"],
            "adjacency": stated["adjacency"],
            "sampling": self.job.privacy.sampling,
            "assumptions": [f"{key}: {text}" for key, text in stated.items()],
            "simulated": False,
        }

    def _resume(self) -> Progress:
        """Return where to start: the latest checkpoint, or round zero."""
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return Progress(self.learner.start())
        check_config(checkpoint, self.config)
        self.strategy.restore(checkpoint.strategy)
        self.tally = Tally(**checkpoint.tally)  # type: ignore[arg-type]
        if checkpoint.round not in self.records.rounds():
            self.records.write("round", **self.tally.last)
        self.records.write("resumed", round=checkpoint.round)
        return Progress(checkpoint.vector, checkpoint.round)

    def _begin(self, progress: Progress) -> Scores:
        """Score the start on the test split and write the first record."""
        initial = self.learner.score(self.learner.start(), self.world.test)
        if progress.round == 0:
            first = self.learner.score(progress.vector, self.world.validation)
            self.records.write(
                "start",
                **(self._present() | self.about),
                accuracy=first.accuracy,
                loss=first.loss,
                test_accuracy=initial.accuracy,
                test_loss=initial.loss,
            )
        return initial

    def _present(self) -> dict[str, Any]:
        """Say who is there and what privacy is asked for, as far as a server can know."""
        members = sorted(self.roster.members.values(), key=lambda member: natural(member.client))
        return {
            "clients": [{"client": m.client, "examples": m.examples, "node": m.label} for m in members],
            "privacy": self._privacy() if self.job.privacy.private else None,
        }

    def _round(self, progress: Progress) -> None:
        number, clock = progress.round + 1, Clock()
        self._await_clients(settle=False)
        self.strategy.roster = self.roster.names
        self.strategy.sizes = {client: member.examples for client, member in self.roster.members.items()}
        self.records.tell("roster", round=number, online=len(self.roster.names))
        before = progress.vector
        with clock.timed("train"):
            selected, replies = self._train(number, before)
        with clock.timed("aggregate"):
            combined = self._aggregate(number, selected, replies, before)
        if self._enough(number, selected):
            self._check_laws(number, before, combined)
            progress.vector = combined
        else:
            progress.spent = len(set(self.roster.names.values()) - self.unable) < self.job.federation.min_clients
        with clock.timed("evaluate"):
            scores = self._evaluate(number, progress.vector)
        self.tally.last = self._record(number, selected, scores)
        if not progress.spent:
            progress.round = number
            with clock.timed("checkpoint"):
                self._checkpoint(progress)
        seconds = {step: round(value, 4) for step, value in clock.seconds.items()}
        self.records.write("round", **self.tally.last, seconds=seconds)

    def _train(self, number: int, vector: Tensor) -> tuple[list[str], list[Message]]:
        """Select clients, order them to train, and collect what comes back in time."""
        orders = list(self.strategy.configure_train(number, to_record(vector.numpy()), ConfigRecord(), self.grid))
        selected = [self.roster.names[order.metadata.dst_node_id] for order in orders]
        if not orders:
            return [], []
        ids, replies = exchange(self.grid, orders, timeout=self.job.federation.timeout)
        self.strategy.asked = {identity: selected[place] for identity, place in ids.items()}
        return selected, replies

    def _aggregate(self, number: int, selected: list[str], replies: list[Message], before: Tensor) -> Tensor:
        """Combine the usable replies; name those that are not, and those that are missing."""
        arrays, _ = self.strategy.aggregate_train(number, replies)
        outcome = self.strategy.outcome
        heard = {*outcome.accepted, *(refused.client for refused in outcome.refused)}
        waited = f"no reply within federation.timeout={self.job.federation.timeout:g} s"
        outcome.refused += [Refused(client, "missing", waited) for client in selected if client not in heard]
        outcome.refused = [self._labelled(refused) for refused in outcome.refused]
        outcome.refused.sort(key=lambda refused: natural(refused.client))
        for refused in outcome.refused:
            self.tally.refused.append({"round": number, **vars(refused)})
        for client, update in outcome.accepted.items():
            if update.epsilon is not None:
                self.tally.epsilons[client] = update.epsilon
        self.tally.aggregation_error = max(self.tally.aggregation_error, outcome.aggregation_error)
        self.unable |= {refused.client for refused in outcome.refused if refused.reason in ("budget", "declined")}
        return before if arrays is None else read_vector_of(arrays)

    def _labelled(self, refused: Refused) -> Refused:
        """Add the operator's own name of the node, where it is not the client's."""
        member = self.roster.members.get(refused.client)
        if member is None or member.label == refused.client:
            return refused
        return Refused(refused.client, refused.reason, f"node '{member.label}': {refused.detail}")

    def _enough(self, number: int, selected: list[str]) -> bool:
        """Whether the round has the replies it needs; False where spent budgets are what it lacks.

        A round for which nobody was drawn has enough. Raises FederationError where other reasons leave too few.
        """
        outcome, wanted = self.strategy.outcome, self.job.federation.min_clients
        usable = len(outcome.accepted)
        if not selected or usable >= wanted:
            return True
        over = sum(refused.reason == "budget" for refused in outcome.refused)
        if over and usable + over >= min(wanted, len(selected)):
            return False
        reasons = "; ".join(f"{r.client}: {r.reason} ({r.detail})" for r in outcome.refused[:5])
        raise FederationError(
            f"round {number}: {usable} usable replies, federation.min_clients={wanted} are needed; {reasons}"
        )

    def _check_laws(self, number: int, before: Tensor, after: Tensor) -> None:
        """Law 1, checked in every round: A and the base never change, and B moves. Raises LetheError."""
        adapted = self.learner.adapted
        if adapted.base_moved():
            raise LetheError("a parameter of the frozen base model was written to; nothing of this round is kept")
        if adapted.frame.fingerprint() != adapted.frame.digest:
            raise LetheError("the frame A changed in memory; nothing of this round is kept")
        b = self.learner.layout.span("B")
        trains = self.strategy.outcome.accepted and "B" in self.strategy.round_plan(number).train
        if trains and torch.equal(before[b], after[b]):
            raise LetheError("clients trained, and B did not move; raise training.rate or look at the data")
        if trains and not before[b].any() and not self._has_effect(after):
            raise LetheError("B moved, and the model answers as before; look at adapter.targets and adapter.alpha")

    @torch.no_grad()
    def _has_effect(self, vector: Tensor) -> bool:
        """Whether B changes the answers to some validation examples."""
        bare = vector.clone()
        bare[self.learner.layout.span("B")] = 0
        rows = [(self.world.validation, row) for row in range(min(8, len(self.world.validation)))]
        losses = (
            [self.learner.answers(each, batch).loss for each in (vector, bare)]
            for _, batch in self.learner.batches(rows)
        )
        return any(not torch.equal(*pair) for pair in losses)

    def _evaluate(self, number: int, vector: Tensor) -> Scores | None:
        last = number == self.job.federation.rounds
        if number % self.job.server.evaluate_every and not last:
            return None
        return self.learner.score(vector, self.world.validation)

    def _checkpoint(self, progress: Progress) -> None:
        last = progress.round == self.job.federation.rounds
        if progress.round % self.job.server.checkpoint_every == 0 or last:
            self.checkpoints.save(
                Checkpoint(
                    progress.round,
                    progress.vector,
                    self.strategy.state(),
                    config=self.config,
                    ledger=self.ledger_position(),
                    tally=asdict(self.tally),
                )
            )

    def _record(self, number: int, selected: list[str], scores: Scores | None) -> dict[str, Any]:
        """Return the round's record, clients in their own order whatever the order of their replies."""
        outcome = self.strategy.outcome
        accepted = {client: outcome.accepted[client] for client in sorted(outcome.accepted, key=natural)}
        record = {
            "round": number,
            "selected": selected,
            "accepted": list(accepted),
            "refused": [vars(refused) for refused in outcome.refused],
            "bytes_up": sum(update.vector.numel() * 4 for update in accepted.values()),
            "bytes_down": len(selected) * self.learner.layout.size * 4,
            "accuracy": scores.accuracy if scores else None,
            "loss": scores.loss if scores else None,
            "aggregation_error": outcome.aggregation_error,
            "update_norm": outcome.update_norm,
        }
        if self.job.privacy.private:
            record["epsilon"] = {c: u.epsilon for c, u in accepted.items() if u.epsilon is not None}
        else:
            record["train_loss"] = {c: u.loss for c, u in accepted.items() if u.loss is not None}
        return record

    def _finish(self, progress: Progress, initial: Scores, began: float) -> dict[str, Any]:
        final = self.learner.score(progress.vector, self.world.test)
        by_client = self._client_accuracy(progress)
        path = export(self.learner, progress.vector, self.directory / "adapter", labels=self.world.splits.label_names)
        self.records.write("end", accuracy_final=final.accuracy, loss_final=final.loss, client_accuracy=by_client)
        summary = self._summary(progress, initial, final)
        summary |= {"adapter_path": str(path), "wall_s": round(time.perf_counter() - began, 3)}
        return summary

    def _client_accuracy(self, progress: Progress) -> dict[str, float] | None:
        """Ask clients for the accuracy on their own examples, where the run allows it."""
        if not self.job.federation.evaluate_clients:
            return None
        frame, layout = self.learner.adapted.frame.digest, self.learner.signature
        content = Order(progress.round, progress.vector, (), (), frame, layout).content()
        names = sorted(self.roster.names.items(), key=lambda item: natural(item[1]))
        messages = [Message(content, dst_node_id=node, message_type=EVALUATE) for node, _ in names]
        ids, replies = exchange(self.grid, messages, timeout=self.job.federation.timeout)
        found = {names[ids[reply.metadata.reply_to_message_id]][1]: _accuracy(reply) for reply in replies}
        return {name: value for _, name in names if (value := found.get(name)) is not None}

    def _summary(self, progress: Progress, initial: Scores, final: Scores) -> dict[str, Any]:
        job, adapted, layout = self.job, self.learner.adapted, self.learner.layout
        head = layout.length(["head"])
        factors = {part: sum(entry.size for entry in adapted.entries(part)) for part in ("A", "B")}
        plan = self.strategy.round_plan(1)
        private = job.privacy.private
        return {
            "strategy": job.federation.strategy,
            "model": self.learner.base.reference,
            "rounds": progress.round,
            "clients": job.federation.clients,
            "stopped": "budget" if progress.spent else None,
            "accuracy_initial": initial.accuracy,
            "accuracy_final": final.accuracy,
            "macro_f1_final": final.macro_f1,
            "loss_initial": initial.loss,
            "loss_final": final.loss,
            "epsilon_max": max(self.tally.epsilons.values(), default=None) if private else None,
            "epsilon_budget": job.privacy.epsilon,
            "delta": job.privacy.delta if private else None,
            "unit": "example" if private else None,
            "adjacency": "add/remove one" if private else None,
            "sampling": "poisson" if private else None,
            "frame_digest_start": adapted.frame.digest,
            "frame_digest_end": _frame_now(self, progress.vector),
            "bytes_up_per_client_round": layout.length(plan.send) * 4,
            "bytes_down_per_client_round": layout.size * 4,
            "bytes_up_plain_lora": (factors["A"] + factors["B"] + head) * 4,
            "aggregation_error": self.tally.aggregation_error,
            "labels": len(self.world.splits.label_names),
            "refused": self.tally.refused,
        }


def _accuracy(reply: Message) -> float | None:
    """Read a client's own accuracy; None from a client that declines or answers something else."""
    try:
        metrics: Any = reply.content[METRICS]
        return float(metrics["accuracy"])
    except (KeyError, TypeError, ValueError):
        return None


def _frame_now(driver: RoundDriver, vector: Tensor) -> str:
    """Fingerprint the A in effect at the end: the frame itself, unless the strategy trains A."""
    frame = driver.learner.adapted.frame
    views = driver.learner.layout.views(vector)
    moved = {name: views["A", name] for name in frame.matrices if ("A", name) in views}
    return type(frame)(moved, frame.rank).fingerprint() if moved else frame.fingerprint()
