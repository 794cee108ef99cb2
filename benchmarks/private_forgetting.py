"""What privacy costs a request to forget whose rows stay at their client: slot and detector at an epsilon, or at none.

    python -m benchmarks.private_forgetting --data FOLDER [--cache FOLDER] [--epsilons 8 3] [--requests 4] [--seeds 1]
        [--on test] [--set forgetting.private_rate=4 ...] [--device cuda]

FOLDER holds `data_full.json.gz` and `domains.json.gz` of CLINC150. The model is that of `benchmarks.gated`. Every
request (the domains work, travel, home and banking) is answered by itself, as `lethe forget answer` does: by all of
its training queries, with the settings of `forgetting:`.

- open: no privacy. epsilon: DP-SGD for the slot, noised class means and a noised histogram for the detector; delta
  1e-5, per row, add/remove one.
- seen, unseen: accuracy on the request's training and asked queries behind the gate (hard). Utility loss: points lost
  on the asked queries of all other intents. AUROC: its asked queries against all others and the out-of-scope ones.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.gated_stream import through
from benchmarks.intents import DOMAINS, Corpus, World, made_world, taken
from benchmarks.measure import DEVICES, publish, seconds, settings
from client.forgetting import PrivateForgetting
from lethe.config import read_section
from lora.errors import LetheError
from privacy.randomness import Randomness, SecureRandomness
from strategies.unlearning.audited_request import AuditedRequest
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.detector import Detector, Detectors
from strategies.unlearning.forgotten import Forgotten
from strategies.unlearning.gate import ForgettingGate
from strategies.unlearning.measures import Answers
from strategies.unlearning.o3 import Slot, slot_bank
from strategies.unlearning.private_detector import fit_private_detector
from strategies.unlearning.private_slot import unlearn_privately

HEADING = ("epsilon", "request", "seen", "unseen", "utility loss", "AUROC", "noise of steps", "of statistics", "s")
DELTA = 1e-5


@dataclass(frozen=True)
class Found:
    """Figures of one request at one epsilon."""

    seen: float
    unseen: float
    utility_loss: float
    auroc: float
    noises: tuple[float, float]
    seconds: float


def answered(
    world: World, labels: tuple[int, ...], config: ForgettingConfig, epsilon: float | None
) -> tuple[Slot, Detector, tuple[float, float]]:
    """Make slot and detector of a request, with the noise multipliers of steps and statistics (0: none)."""
    served = Forgotten(world.learner, world.model, config, world.learner.adapted.frame.rank)
    examples = taken(world.corpus.train, world.corpus.rows(labels))
    request = AuditedRequest(examples, seed=world.seed, whole=epsilon is not None)
    if epsilon is None:
        made = served.train_slot(request, block=0, avoid=labels, whole_classes=True, seed=world.seed)
        return made.slot, served.fit_detector(request), (0.0, 0.0)
    paid, source = planned(config, len(examples), epsilon), SecureRandomness()
    return (*privately(served, request, labels, paid, source), noises(paid))


def planned(config: ForgettingConfig, rows: int, epsilon: float) -> PrivateForgetting:
    """Divide an epsilon as a client does."""
    return PrivateForgetting.planned(config, rows, epsilon=epsilon, delta=DELTA)


def noises(paid: PrivateForgetting) -> tuple[float, float]:
    """Return the noise multipliers of steps and statistics."""
    return paid.slot.mechanism.noise_multiplier, paid.statistics.noise_multiplier


def privately(
    served: Forgotten, request: AuditedRequest, labels: tuple[int, ...], paid: PrivateForgetting, source: Randomness
) -> tuple[Slot, Detector]:
    """Make both by the private way."""
    tokens = request.tokens(served.learner.task)
    detector = fit_private_detector(
        served.encoder, request, tokens, classes=labels, settings=paid.statistics, randomness=source
    )
    objective = served.objective(request, labels, whole_classes=True)
    slot = Slot.fresh(served.sites, served.frames.block(0))
    made = unlearn_privately(
        served.learner, request, objective, model=served.values, slot=slot, rate=served.config.private_rate,
        plan=paid.slot, randomness=source,
    )  # fmt: skip
    return made.slot, detector


def measured(world: World, labels: tuple[int, ...], config: ForgettingConfig, epsilon: float | None) -> Found:
    """Answer one request and ask about it."""
    begun = seconds(world.device)
    slot, detector, noise = answered(world, labels, config, epsilon)
    taken_s = seconds(world.device) - begun
    gate = ForgettingGate(Detectors([detector]), slot_bank([slot]), "hard")
    after, _ = through(gate, world, world.asked)
    before = Answers(after.labels, world.asked.logits)
    rest = set(range(len(world.corpus.names))) - set(labels)
    lost = 100 * (before.accuracy(rest) - after.accuracy(rest))
    seen = through(gate, world, world.seen(labels))[0].accuracy(labels)
    return Found(seen, after.accuracy(labels), lost, auroc(world, detector, labels), noise, taken_s)


def auroc(world: World, detector: Detector, labels: tuple[int, ...]) -> float:
    """Return how well the detector tells the request's asked queries from all others."""
    asked = Detectors([detector])
    distances = torch.cat([asked.distances(each.features)[:, 0] for each in (world.asked, world.strange)]).numpy()
    intents = np.concatenate([np.asarray(world.asked.tokens.labels), np.full(len(world.strange.tokens), -1)])
    return float(roc_auc_score(~np.isin(intents, labels), distances))


def run(chosen: argparse.Namespace) -> tuple[dict[str, float], list[list[str]]]:
    """Answer all requests at every epsilon; return figures and the printed rows."""
    config = read_section("forgetting", ForgettingConfig, chosen.set)
    corpus = Corpus.read(chosen.data, requests=chosen.requests, on=chosen.on)
    figures: dict[str, float] = {}
    rows = [[*HEADING]]
    worlds = [made_world(corpus, cache=chosen.cache, seed=seed, device=chosen.device) for seed in range(chosen.seeds)]
    for epsilon in (None, *chosen.epsilons):
        name = "open" if epsilon is None else f"{epsilon:g}"
        for place, labels in enumerate(corpus.sequence):
            found = [measured(world, labels, config, epsilon) for world in worlds]
            mean = {key: statistics.fmean(getattr(each, key) for each in found)
                    for key in ("seen", "unseen", "utility_loss", "auroc", "seconds")}  # fmt: skip
            key = DOMAINS[place] if place < len(DOMAINS) else corpus.names[labels[0]]
            figures |= {f"private_{name}_{key}_{each}": value for each, value in mean.items()}
            noise = [f"{each:.2f}" for each in found[0].noises] if epsilon else ["", ""]
            shares = [f"{100 * mean['seen']:.1f}", f"{100 * mean['unseen']:.1f}", f"{mean['utility_loss']:.2f}"]
            rows.append([name, key, *shares, f"{mean['auroc']:.4f}", *noise, f"{mean['seconds']:.1f}"])
            print(" | ".join(rows[-1]), flush=True)
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="What privacy costs a request to forget.")
    parser.add_argument("--data", type=Path, help="the folder of CLINC150; without it nothing is measured")
    parser.add_argument("--cache", type=Path, help="folder of trained models, filled where empty")
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 3.0])
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--on", choices=("test", "validation"), default="test")
    parser.add_argument("--set", nargs="*", default=[], metavar="forgetting.KEY=VALUE")
    parser.add_argument("--device", default="cpu", help=DEVICES)
    chosen = parser.parse_args(arguments)
    if chosen.data is None:
        print("benchmarks.private_forgetting measures on CLINC150 only: give --data FOLDER")
        return
    torch.set_num_threads(1)
    try:
        figures, rows = run(chosen)
    except LetheError as error:
        raise SystemExit(f"error: {error}") from None
    about = {key: value for key, value in vars(chosen).items() if key not in ("data", "cache")}
    publish("unlearning", figures=figures, rows=rows, about=settings(**about), part="private")


if __name__ == "__main__":
    main()
