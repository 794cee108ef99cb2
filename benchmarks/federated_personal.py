"""What it costs that histories stay at the clients, and that they are protected: meta-LoRAs trained by federation.

    python -m benchmarks.federated_personal [--data FOLDER_OR_CSV] [--seeds 1] [--clients 6] [--rounds 8] [--steps 3]
        [--lot 64] [--epsilons 8 3] [--validation] [--rates 8=3 1=0.6 8-private=0.5 1-private=0.3]

A share of the users is public: the frozen reader (a small decoder) learns their training rows' texts and nothing else.
The other users are private and dealt to clients. Every arm starts from the same reader, takes the same number of steps
over the same expected number of questions, with plain SGD, and is asked the private users' test questions:

- start: the reader as it is. central: all questions in one place, lots of clients * lot.
- federated: FFA-LoRA over the clients. epsilon 8, 3: the same with differential privacy, unit: one question (a target
  with its label, the prompt with what is told of the history in it, and its routing weights), add/remove, per client
  over the whole run. Users are no unit here: one has up to `per_user` questions.
- 8 meta-LoRAs with fixed routers over a user's taste beside a single LoRA of equal rank (1), and one of equal size.

`vs single`: AUC less that of the single LoRA of equal rank under the same privacy; `vs central`: less that of the same
number of meta-LoRAs trained in one place; seed 0, whole users redrawn, 95 %. Settings are chosen with `--validation`.
"""

import argparse
import csv
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import publish, settings
from client.job import ClientJob
from client.training import Work, train
from privacy.ledger import Ledger
from server.checkpoint import Checkpoints
from simulation.config import SimulationConfig
from simulation.engine import Stage, play
from strategies.personal.comparison import Found
from strategies.personal.federated import PersonalWorld
from strategies.personal.fitting import few
from strategies.personal.router import gate_report
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions, Ints
from tasks.recommendation.metrics import likes, paired_bootstrap
from tasks.recommendation.reader import ReaderSettings, save_reader, train_reader
from tasks.recommendation.splits import Split, per_user

DELTA = 1e-5
HEADING = (
    "arm",
    "meta-LoRAs",
    "rank",
    "AUC",
    "log loss",
    "vs single",
    "vs central",
    "epsilon",
    "numbers sent",
    "CPU s",
)
Arm = tuple[str, int, int]
"""Setting, meta-LoRAs, rank."""


@dataclass(frozen=True)
class Place:
    """Where one seed's runs happen: the reader, the private users' interactions, and what was chosen."""

    directory: Path
    reader: Path
    ratings: Path
    chosen: argparse.Namespace
    seed: int

    def sections(self, arm: Arm, epsilon: float | None) -> dict[str, Any]:
        """Return the sections of an arm's job."""
        chosen, (_, count, rank) = self.chosen, arm
        rates = dict(entry.split("=") for entry in chosen.rates)
        rate = float(rates[f"{count}-private" if epsilon else str(count)])
        return {
            "seed": self.seed,
            "model": {"path": str(self.reader), "device": "cpu"},
            "task": {"kind": "causal-lm"},
            "adapter": {"rank": rank, "alpha": 2.0 * rank},
            "ratings": {"path": str(self.ratings), "core": 1, "tags": "tags"},
            "histories": {"per_user": chosen.per_user, "checks": chosen.checks},
            "personal": {"meta_loras": count, "gate": "router" if count > 1 else "uniform", "base_score": "none",
                         "temperature": chosen.temperature},
            "federation": {"clients": chosen.clients, "rounds": chosen.rounds},
            "training": {"steps": chosen.steps, "batch": chosen.lot, "rate": rate},
            "privacy": {"epsilon": epsilon, "delta": DELTA, "clip": chosen.clip},
            "server": {"evaluate_every": chosen.rounds, "checkpoint_every": chosen.rounds},
        }  # fmt: skip


def divided(log: Interactions, share: float, seed: int) -> tuple[Ints, Ints]:
    """Return public and private users."""
    order = np.random.default_rng(seed).permutation(len(log.user_names))
    cut = round(share * len(order))
    return np.sort(order[:cut]), np.sort(order[cut:])


def prepared(log: Interactions, chosen: argparse.Namespace, seed: int, directory: Path) -> Place:
    """Train the reader on the public users, and write the private users' rows as a table."""
    public, private = divided(log, chosen.public, seed)
    split = per_user(log)
    kept = [rows[np.isin(log.users[rows], public)] for rows in (split.train, split.validation, split.test)]
    reader, table = directory / f"reader-{seed}", directory / f"private-{seed}.csv"
    if not reader.exists():
        settings = ReaderSettings(epochs=chosen.epochs)
        save_reader(train_reader(log, Split("public", *kept), settings, seed=seed), reader)
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user", "item", "rating", "time", "title", "tags"))
        for row in np.flatnonzero(np.isin(log.users, private)):
            item = log.items[row]
            name, title, tags = (each[item] for each in (log.catalogue.names, log.catalogue.titles, log.catalogue.tags))
            writer.writerow(
                (log.user_names[log.users[row]], name, log.ratings[row], log.times[row], title, "|".join(tags))
            )
    print(f"seed {seed}: reader of {len(kept[0])} rows ready, CPU {time.process_time():.0f} s", flush=True)
    return Place(directory, reader, table, chosen, seed)


def trained(place: Place, arm: Arm) -> tuple[PersonalWorld, Tensor, float | None]:
    """Train one arm; returns its world, its vector, and the largest epsilon of a client."""
    name = arm[0]
    epsilon = float(name.removeprefix("epsilon ")) if name.startswith("epsilon") else None
    sections = place.sections(arm, epsilon)
    job = ClientJob.model_validate(sections)
    if name == "start":
        return _world(job), job.world.learner.start(), None
    if name == "central":
        return _world(job), _central(job), None
    directory = place.directory / f"{place.seed}-{'-'.join(map(str, arm)).replace(' ', '')}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    play(Stage(sections, directory), SimulationConfig(engine="cohort", threads=1, cohort=place.chosen.clients))
    found = Checkpoints(directory / "checkpoints").latest()
    if found is None:
        raise SystemExit(f"{directory} holds no checkpoint")
    return _world(job), found.vector, _spent(directory / "ledger.sqlite") if epsilon else None


def _world(job: ClientJob) -> PersonalWorld:
    world = job.world
    if not isinstance(world, PersonalWorld):
        raise SystemExit("the job holds no histories")
    return world


def _central(job: ClientJob) -> Tensor:
    federation, training = job.federation, job.training
    config = training.model_copy(
        update={"steps": training.steps * federation.rounds, "batch": training.batch * federation.clients}
    )
    works, start = [Work("all", job.world.train)], job.world.learner.start()
    return train(job.world.learner, works, start=start, config=config, parts=("B",), seed=job.seed, number=1).values[0]


def _spent(path: Path) -> float:
    ledger = Ledger(path)
    return max(ledger.epsilon(client, delta=DELTA) for client in ledger.clients())


def measured(place: Place, arms: Sequence[Arm], found: dict[Arm, Found]) -> tuple[Interactions, Ints]:
    """Train every arm and ask the private users' questions; returns what the log odds are about."""
    asked: tuple[Interactions, Ints] | None = None
    for arm in arms:
        begun = time.process_time()
        world, vector, epsilon = trained(place, arm)
        whole = per_user(world.log)
        rows = few(whole.validation if place.chosen.validation else whole.test, place.chosen.asked, seed=0)
        one, queries, labels = world.learner.personalized(vector), world.log.queries(rows), world.log.likes[rows]
        logits = one.logits(world.log, queries)
        scores = likes(labels, logits)
        each = found.setdefault(arm, Found())
        each.logits.append(logits)
        each.add(auc=scores.auc, log_loss=scores.log_loss, sent=world.learner.layout.size, rows=len(world.train),
                 cpu_s=time.process_time() - begun)  # fmt: skip
        if epsilon is not None:
            each.add(epsilon=epsilon)
        if arm[1] > 1:
            report = gate_report(one.weights(world.log, queries), one.parts.meta)
            each.add(entropy=report.relative_entropy, information=report.information)
        told = ", ".join(f"{name} {values[-1]:.4f}" for name, values in each.figures.items())
        print(f"seed {place.seed}, {arm}: {told}", flush=True)
        asked = world.log, rows
    if asked is None:
        raise SystemExit("no arm was asked for")
    return asked


def lines(found: dict[Arm, Found], log: Interactions, rows: Ints, rank: int) -> Iterator[list[str]]:
    """Yield the rows of the table, the heading first; intervals are of seed 0."""
    yield [*HEADING]
    labels, users = log.likes[rows], log.users[rows]
    for arm, each in found.items():
        name, count, own = arm
        beside = []
        for other in ((name, 1, rank), ("central", count, own)):
            known = other in found and other != arm
            beside.append(
                str(paired_bootstrap(labels, each.logits[0], found[other].logits[0], users=users)) if known else ""
            )
        yield [name, str(count), str(own), each.told("auc"), each.told("log_loss"), *beside, each.told("epsilon", 2),
               each.told("sent", 0), each.told("cpu_s", 0)]  # fmt: skip


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Federated personalisation, with and without privacy.")
    parser.add_argument("--data", help="a MovieLens folder or one table; default: the built-in world")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--public", type=float, default=0.1, help="share of users whose texts the reader learns")
    parser.add_argument("--epochs", type=int, default=4, help="of the reader")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lot", type=int, default=64)
    parser.add_argument("--per-user", type=int, default=20)
    parser.add_argument("--meta-loras", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=0.3)
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 3.0])
    parser.add_argument("--settings", nargs="*", default=None, help="only these, such as: federated 'epsilon 8'")
    parser.add_argument("--rates", nargs="*", default=["8=3", "1=0.6", "8-private=0.5", "1-private=0.3"])
    parser.add_argument("--asked", type=int, default=4096, help="test questions")
    parser.add_argument("--directory", help="keep readers and runs here, and use readers that are there")
    parser.add_argument("--checks", type=int, default=256, help="questions of the driver's own scores")
    parser.add_argument("--validation", action="store_true", help="figures of validation rows, to choose settings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    chosen = parsed(arguments)
    torch.set_num_threads(1)
    log = load_interactions(RatingsConfig(path=chosen.data))
    count, rank = chosen.meta_loras, chosen.rank
    names = chosen.settings or ["central", "federated", *(f"epsilon {epsilon:g}" for epsilon in chosen.epsilons)]
    arms: list[Arm] = [("start", 1, rank)]
    arms += [(name, n, rank) for name in names for n in (1, count)]
    arms += [("federated", 1, rank * count)] if chosen.settings is None else []
    found: dict[Arm, Found] = {}
    asked = []
    with tempfile.TemporaryDirectory() as fresh:
        directory = Path(chosen.directory or fresh)
        directory.mkdir(exist_ok=True)
        for seed in range(chosen.seeds):
            asked.append(measured(prepared(log, chosen, seed, directory), arms, found))
    figures = {
        f"{name}_{n}_rank_{own}_{figure}".replace(" ", "_"): statistics.fmean(values)
        for (name, n, own), each in found.items()
        for figure, values in each.figures.items()
    }
    about = {key: value for key, value in vars(chosen).items() if key not in ("data", "directory")}
    about |= {"data": "built-in" if chosen.data is None else "given", "delta": DELTA, "unit": "question"}
    publish("federated_personal", figures=figures, rows=[*lines(found, *asked[0], rank)], about=settings(**about))


if __name__ == "__main__":
    main()
