"""What the weights that all users share hold of one: an attack by models of either half of the users.

    python -m benchmarks.shared_memory [--data FOLDER_OR_CSV] [--split per-user] [--seeds 1] [--first-seed 0]
        [--parts MF DIN SASRec reader adapters] [--asked 20] [--sample 8192] [--set rate=0.004 ...]

A user's forget request deletes what is the user's own. This says what is left in recommender, reader and meta-LoRAs.
Users are halved by chance and each part is trained twice, on the training rows of either half. An attacker who has both
models, and rows of a user, takes the user for one of the half whose model has the smaller loss on them, in the mean
over up to `--asked` training rows a user. That is more than an attacker has who sees what is served, and must train the
other model without knowing whom the first one learned from.

- users: AUC over users, with 95 % of users redrawn (of one halving and one pair of models); rows: AUC over single rows.
  0.5 tells nothing, 1 everything.
- nats: how much smaller a user's loss is by the model that learned from the user.
- adapters: meta-LoRAs, routers and head on either half's rows of the sample, over one reader and one recommender that
  routes, which learned from everybody's other rows, and beside MF's scores by models that did not learn from the row;
  asked about rows of the sample, as they are trained.

Without `--data` the built-in world.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import publish, settings
from lora.config import AdapterConfig
from lora.errors import LetheError
from strategies.personal.asking import Asking
from strategies.personal.config import ComparisonConfig, PersonalConfig
from strategies.personal.fitting import few
from strategies.personal.personalized import Personalized
from strategies.personal.world import RECOMMENDERS, World, base_of
from strategies.unlearning.attacks import membership_auc
from tasks.recommendation.config import RatingsConfig, ReadingModelConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Floats, Interactions, Ints
from tasks.recommendation.reader import read, train_reader
from tasks.recommendation.splits import SPLITS, Split

PARTS = ("MF", "DIN", "SASRec", "reader", "adapters")
REDRAWN = 1000
HEADING = ("part", "seed", "users", "users' AUC", "rows' AUC", "nats")
Halves = NDArray[np.bool_]
"""Which half every user is of, `[users]`."""


def of_half(log: Interactions, split: Split, members: Halves) -> Split:
    """Keep the training and validation rows of some users."""
    train, held = (rows[members[log.users[rows]]] for rows in (split.train, split.validation))
    return replace(split, train=train, validation=held)


def losses(log: Interactions, rows: Ints, odds: Floats) -> Floats:
    """Return the loss of every row, nats, `[rows]`, by log odds of a like."""
    found: Floats = np.logaddexp(0.0, np.where(log.likes[rows], -odds, odds))
    return found


def asked(log: Interactions, split: Split, most: int, *, seed: int) -> Ints:
    """Draw up to `most` training rows of every user."""
    rows = np.random.default_rng(seed).permutation(split.train)
    rows = rows[np.argsort(log.users[rows], kind="stable")]
    users = log.users[rows]
    rank = np.arange(len(rows)) - np.searchsorted(users, users)
    return np.sort(rows[rank < most])


class Sharing:
    """One seed: the parts, each trained on either half of the users."""

    def __init__(self, log: Interactions, split: Split, chosen: argparse.Namespace, *, seed: int) -> None:
        self.log, self.split, self.chosen, self.seed = log, split, chosen, seed
        self.first: Halves = np.random.default_rng(seed).permutation(len(log.user_names)) % 2 == 0
        self.halves = [of_half(log, split, self.first), of_half(log, split, ~self.first)]

    def pair(self, part: str) -> tuple[Ints, list[Floats]]:
        """Return the rows that were asked about, and each half's model's losses of them."""
        if part == "adapters":
            return self._adapters()
        rows = asked(self.log, self.split, self.chosen.asked, seed=self.seed)
        answer = self._read if part == "reader" else partial(self._recommended, part)
        return rows, [losses(self.log, rows, answer(half, rows)) for half in self.halves]

    def _recommended(self, name: str, half: Split, rows: Ints) -> Floats:
        one = RECOMMENDERS[name]()
        one.fit(self.log, half, seed=self.seed)
        return one.logits(self.log, self.log.queries(rows))

    def _read(self, half: Split, rows: Ints) -> Floats:
        base = train_reader(self.log, half, seed=self.seed)
        return read(base, Asking(base, base_score="none")(self.log, self.log.queries(rows)).tokens)

    def _adapters(self) -> tuple[Ints, list[Floats]]:
        chosen, config = self.chosen, self.chosen.config
        comparison = ComparisonConfig(recommenders=("MF",), routers=("MF",), scorer="MF")
        reader = base_of(ReadingModelConfig(name="reader", device="cpu"))
        world = World.made(self.log, self.split, comparison, base=reader, sample=chosen.sample, seed=self.seed)
        rows = few(self.split.train, chosen.sample, seed=self.seed)
        sampled = replace(self.split, train=rows)
        found = []
        for members in (self.first, ~self.first):
            arm = replace(world, split=of_half(self.log, sampled, members)).fitted(
                None, config, AdapterConfig(rank=4, alpha=8.0, targets="all")
            )
            print(f"adapters, seed {self.seed}: log loss by epoch {arm.curve}", flush=True)
            found.append(losses(self.log, rows, self._asked(arm, rows, world.training_scores)))
        return rows, found

    def _asked(self, arm: Personalized, rows: Ints, scores: Floats) -> Floats:
        """Ask an arm as it was trained: beside scores by models that did not learn from the row."""
        queries = self.log.queries(rows)
        vectors = arm.representation(self.log, queries)
        return arm.answered(arm.asking(self.log, queries, scores=scores[rows]), lambda found: arm.mixed(vectors[found]))

    def attacked(self, part: str) -> tuple[list[str], dict[str, float]]:
        """Return a line of the table and figures of one part."""
        rows, (one, other) = self.pair(part)
        users, signs = self.log.users[rows], np.where(self.first[self.log.users[rows]], 1.0, -1.0)
        counts = np.bincount(users, minlength=len(self.first))
        there = np.flatnonzero(counts)
        scores = np.bincount(users, other - one, minlength=len(self.first))[there] / counts[there]
        members = self.first[there]
        low, high = redrawn(scores, members, seed=self.seed)
        whole = membership_auc(scores[members], scores[~members])
        single = membership_auc((other - one)[signs > 0], (other - one)[signs < 0])
        gained = float(np.mean(scores * np.where(members, 1.0, -1.0)))
        line = [part, f"{self.seed}", f"{len(there)}", f"{whole:.3f} [{low:.3f}, {high:.3f}]", f"{single:.3f}",
                f"{gained:.4f}"]  # fmt: skip
        return line, {"users_auc": whole, "low": low, "high": high, "rows_auc": single, "nats": gained}


def redrawn(scores: Floats, members: Halves, *, seed: int) -> tuple[float, float]:
    """Return the middle 95 % of the AUC when users are drawn anew, within either half."""
    rng, parts = np.random.default_rng(seed), (scores[members], scores[~members])
    found = [membership_auc(*(rng.choice(part, len(part)) for part in parts)) for _ in range(REDRAWN)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="What shared weights hold of a user.")
    parser.add_argument("--data", help="a MovieLens folder or one table; default: the built-in world")
    parser.add_argument("--split", choices=sorted(SPLITS), default="per-user")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--asked", type=int, default=20, help="most training rows of a user")
    parser.add_argument("--sample", type=int, default=8192, help="rows that adapters learn from, half at most")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `personal:`")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    chosen = parsed(arguments)
    torch.set_num_threads(1)
    lines, figures = [[*HEADING]], dict[str, list[float]]()
    try:
        log = load_interactions(RatingsConfig(path=chosen.data))
        own = dict(entry.split("=", 1) for entry in chosen.set)
        split = SPLITS[chosen.split](log)
        chosen.sample = min(chosen.sample, len(split.train) // 2)
        chosen.config = PersonalConfig(**{**own, "sample": chosen.sample})
        for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
            sharing = Sharing(log, split, chosen, seed=seed)
            for part in chosen.parts:
                line, found = sharing.attacked(part)
                print(" | ".join(line), flush=True)
                lines.append(line)
                for name, value in found.items():
                    figures.setdefault(f"{part.lower()}_{name}", []).append(value)
    except (LetheError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    about = {key: value for key, value in vars(chosen).items() if key not in ("data", "config")}
    about |= {"data": "built-in" if chosen.data is None else "given", "personal": chosen.config.model_dump()}
    # Ends of intervals have no mean over seeds.
    means = {name: statistics.fmean(values) for name, values in figures.items()
             if len(values) == 1 or not name.endswith(("_low", "_high"))}  # fmt: skip
    publish("shared_memory", figures=means, rows=lines, about=settings(**about))


if __name__ == "__main__":
    main()
