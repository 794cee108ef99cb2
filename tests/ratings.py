"""A little MovieLens folder, and the overrides that make a personal run small."""

import csv
import gzip
import shutil
from pathlib import Path

from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.interactions import Interactions

LITTLE = [
    "comparison.recommenders=[MF]",
    "comparison.routers=[MF]",
    "comparison.folds=2",
    "comparison.ranked=8",
    "comparison.candidates=10",
    "comparison.draws=20",
    "personal.meta_loras=3",
    "personal.sample=200",
    "personal.epochs=2",
    "personal.checks=64",
    "personal.history=2",
    "adapter.rank=2",
]


def little_log() -> Interactions:
    return builtin_interactions(users=30, items=60, events=30, seed=3)


def write_ratings(folder: Path) -> Path:
    """Write `ratings.csv` and `movies.csv` as MovieLens has them."""
    log = little_log()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ratings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["userId", "movieId", "rating", "timestamp"])
        rows = zip(log.users, log.items, log.ratings, log.times, strict=True)
        writer.writerows([user + 1, item + 1, rating, time] for user, item, rating, time in rows)
    with (folder / "movies.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["movieId", "title", "genres"])
        titles = zip(log.catalogue.titles, log.catalogue.tags, strict=True)
        writer.writerows([item + 1, title, "|".join(tags)] for item, (title, tags) in enumerate(titles))
    return folder


def first_users(source: Path, folder: Path, *, count: int) -> Path:
    """Copy what the first users rated from a MovieLens folder (`ratings.csv.gz`, by user, and `movies.csv.gz`)."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(source / "ratings.csv.gz", "rt", newline="") as whole, (folder / "ratings.csv").open("w") as part:
        for number, line in enumerate(whole):
            if number and int(line.split(",", 1)[0]) > count:
                break
            part.write(line)
    shutil.copy(source / "movies.csv.gz", folder)
    return folder
