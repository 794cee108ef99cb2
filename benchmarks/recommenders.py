"""Recommenders without a language model beside one another: what a personal adapter has to beat.

    python -m benchmarks.recommenders [--data FOLDER_OR_CSV] [--seeds 3] [--splits per-user global-time]
        [--ranked 1000] [--full 200] [--without DIN SASRec] [--sim]

Without `--data` the built-in world. Every recommender learns from training rows, stops on validation rows and is asked
once about the test rows; figures are means over seeds, with the spread (sample standard deviation) where there are
several. `--sim` adds DIN over history retrieved by MiniLM embeddings of item texts.

- AUC, log loss: likes of the test rows; `vs` is the AUC minus that of the boosted features (seed 0, whole users
  redrawn, 95 %).
- rest: AUC without the user who has most test rows (by global time one user can be a fifth of them).
- swapped: AUC when every query gets another query's history; `across`: AUC of rows more than a day after the user's
  last training or validation row.
- NDCG@10, MRR: the item that came next among 100 (fewer in small worlds) that the user never rates, of `--ranked` test
  rows. Recommenders of likes do not aim at what comes next; popularity and the transformer trained for that do.
- of all: NDCG@10 among every item that the user has not rated before, of the first `--full` of these rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.measure import publish, settings
from lora.errors import DataError
from strategies.personal.comparison import Found
from strategies.personal.recommenders.boosted import Boosted
from strategies.personal.recommenders.din import Din, DinSettings
from strategies.personal.recommenders.factors import FoldedFactors, recent_level
from strategies.personal.recommenders.levels import ItemMean, Popularity
from strategies.personal.recommenders.protocol import Recommender, ranked_scores
from strategies.personal.recommenders.sasrec import Sasrec, SasrecSettings
from strategies.personal.recommenders.stack import Stack
from strategies.personal.retriever import SemanticRetriever
from tasks.config import ModelConfig
from tasks.models import load_base
from tasks.recommendation.candidates import full, sampled
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions, Ints
from tasks.recommendation.metrics import Labels, auc, likes, paired_bootstrap, ranking, ranks
from tasks.recommendation.splits import SPLITS, Split
from tasks.recommendation.texts import embedded

DAY = 86_400
STACKED = ("boosted features", "MF, recent fold-in", "SASRec", "DIN")
RANKERS = ("popularity", "SASRec, next item")
FIXED = ("item mean", "popularity", "boosted features")
"""Recommenders without chance; one seed says all."""
HEADING = (
    *("split", "recommender", "AUC", "log loss", "vs boosted (95 %)"),
    *("rest", "swapped", "across", "NDCG@10", "Hit@10", "MRR", "of all", "CPU s"),
)
BESIDE = ("rest", "swapped", "across", "ndcg10", "hit10", "mrr", "ndcg10_full")


Maker = Callable[[], Recommender]


def makers(log: Interactions, *, sim: bool) -> dict[str, Maker]:
    """Return the recommenders of the table by name, the stack aside."""
    found: dict[str, Maker] = {
        "item mean": ItemMean,
        "item + recent level": recent_level,
        "MF, recent fold-in": FoldedFactors,
        "DIN": Din,
        "SASRec": Sasrec,
        "boosted features": Boosted,
        "popularity": Popularity,
        "SASRec, next item": next_item,
    }
    if sim:
        base = load_base(ModelConfig(name="minilm", device="cpu"), causal=False)
        retriever = SemanticRetriever(embedded(log.catalogue.texts, base))
        found["SIM"] = partial(Din, DinSettings(), chosen=retriever.retrieved, name="SIM")
    return found


def next_item() -> Sasrec:
    """The transformer that is trained for what comes next."""
    return Sasrec(SasrecSettings(objective="next", negatives=None, rate=2e-3, decay=0.01, dropout=0.2, epochs=40))


def measured(
    log: Interactions, split: Split, made: Mapping[str, Maker], *, seeds: int, ranked: int, whole: int = 0
) -> dict[str, Found]:
    """Fit every recommender with every seed and ask it about the test rows."""
    found = {name: Found() for name in made}
    found["stack"] = Found()
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(split.test, size=min(ranked, len(split.test)), replace=False))
    unrated = len(log.catalogue) - int(np.diff(log.starts).max())
    candidates = sampled(log, rows, count=min(100, unrated), seed=0)
    asked = partial(_asked, log=log, split=split, rows=rows, candidates=candidates, whole=whole)
    kept: dict[str, Recommender] = {}
    for seed in range(seeds):
        for name, make in made.items():
            if seed == 0 or name not in FIXED:
                begun = time.process_time()
                kept[name] = make()
                kept[name].fit(log, split, seed=seed)
                asked(found[name], kept[name], begun=begun)
        if all(name in kept for name in STACKED):
            stack = Stack([kept[name] for name in STACKED], fitted=True)
            begun = time.process_time()
            stack.fit(log, split, seed=seed)
            asked(found["stack"], stack, begun=begun)
    return {name: each for name, each in found.items() if each.figures}


def _asked(
    found: Found, asked: Recommender, *, log: Interactions, split: Split, rows: Ints, candidates: Ints, whole: int,
    begun: float,
) -> None:  # fmt: skip
    queries, labels = log.queries(split.test), log.likes[split.test]
    if asked.name not in RANKERS:
        logits = asked.logits(log, queries)
        found.logits.append(logits)
        other = np.random.default_rng(0).permutation(len(queries))
        late = _across(log, split)
        owners = log.users[split.test]
        rest = owners != np.bincount(owners).argmax()
        scores = likes(labels, logits)
        found.add(
            auc=scores.auc,
            log_loss=scores.log_loss,
            accuracy=scores.accuracy,
            rest=auc(labels[rest], logits[rest]),
            swapped=auc(labels, asked.logits(log, queries.with_history_of(other))),
            **({"across": auc(labels[late], logits[late])} if len(np.unique(labels[late])) == 2 else {}),
        )
    if len(rows):
        places = ranking(ranks(ranked_scores(asked, log, log.queries(rows), candidates)))
        found.add(ndcg10=places.ndcg10, hit10=places.hit10, mrr=places.mrr)
    if whole and len(rows):
        every = ((log.queries(np.array([row])), full(log, int(row))) for row in rows[:whole])
        places = ranking(np.concatenate([ranks(ranked_scores(asked, log, *each)) for each in every]))
        found.add(ndcg10_full=places.ndcg10, hit10_full=places.hit10, mrr_full=places.mrr)
    found.add(cpu_s=time.process_time() - begun)
    print(f"{split.name}: {asked.name}: {', '.join(f'{k} {v[-1]:.4f}' for k, v in found.figures.items())}", flush=True)


def _across(log: Interactions, split: Split) -> Labels:
    """Return which test rows are more than a day after the user's last training or validation row."""
    last = np.full(len(log.user_names), np.iinfo(np.int64).min // 2)
    for part in (split.train, split.validation):
        np.maximum.at(last, log.users[part], log.times[part])
    owners = log.users[split.test]
    later: Labels = (log.times[split.test] - last[owners] > DAY) & (last[owners] > 0)
    return later


def table(log: Interactions, split: Split, found: Mapping[str, Found]) -> list[list[str]]:
    """Return the rows of one split's table, the heading first."""
    lines = [[*HEADING]]
    for name, each in found.items():
        shown = [each.told(figure) for figure in ("auc", "log_loss")]
        beside = [each.told(figure) for figure in BESIDE]
        versus = _versus(log, split, found, name)
        lines.append([split.name, name, *shown, versus, *beside, each.told("cpu_s", 1)])
    return lines


def _versus(log: Interactions, split: Split, found: Mapping[str, Found], name: str) -> str:
    reference = found.get("boosted features")
    if reference is None or name == "boosted features" or not found[name].logits:
        return ""
    labels, owners = log.likes[split.test], log.users[split.test]
    return str(paired_bootstrap(labels, found[name].logits[0], reference.logits[0], users=owners))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(description="Recommenders beside one another.")
    parser.add_argument("--data", help="a MovieLens folder or one table; default: the built-in world")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", nargs="+", choices=sorted(SPLITS), default=sorted(SPLITS, reverse=True))
    parser.add_argument("--ranked", type=int, default=1000, help="test rows that are ranked; 0 for none")
    parser.add_argument("--full", type=int, default=0, help="of these, rows that are also ranked among all items")
    parser.add_argument("--without", nargs="*", default=[], help="recommenders to leave out")
    parser.add_argument("--sim", action="store_true", help="add DIN over retrieved history")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        log = load_interactions(RatingsConfig(path=chosen.data))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    made = {name: make for name, make in makers(log, sim=chosen.sim).items() if name not in chosen.without}
    figures: dict[str, float] = {}
    lines: list[list[str]] = []
    for name in chosen.splits:
        split = SPLITS[name](log)
        found = measured(log, split, made, seeds=chosen.seeds, ranked=chosen.ranked, whole=chosen.full)
        lines += table(log, split, found)[bool(lines) :]
        for model, each in found.items():
            key = f"{name}_{model}".replace(",", "").replace(" + ", "_").replace(" ", "_").replace("-", "_").lower()
            figures |= {f"{key}_{figure}": statistics.fmean(values) for figure, values in each.figures.items()}
    about = {
        "seeds": chosen.seeds,
        "ranked": chosen.ranked,
        "full": chosen.full,
        "data": "built-in" if chosen.data is None else "given",
    }
    about |= {"interactions": len(log), "users": len(log.user_names), "items": len(log.catalogue)}
    publish("recommenders", figures=figures, rows=lines, about=settings(**about))


if __name__ == "__main__":
    main()
