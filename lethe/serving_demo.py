"""A small world to serve: built in, trained once, and kept beside other caches."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lethe.config import PersonalRun, to_yaml
from lethe.served_run import BASE, keep_personal, keep_recommenders
from lora.config import AdapterConfig
from strategies.personal.config import ComparisonConfig, PersonalConfig
from strategies.personal.world import World
from tasks.recommendation.files import load_interactions
from tasks.recommendation.reader import ReaderSettings, save_reader, train_reader
from tasks.recommendation.splits import SPLITS

VERSION = "demo-1"
"""Grows whenever the demo is made in another way."""
_READER = ReaderSettings(epochs=3, patience=1)


def cache() -> Path:
    """Return where the demo is kept: below $LETHE_CACHE, else the user's cache directory."""
    own = os.environ.get("LETHE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lethe"


def demo_run(folder: Path | None = None, *, listen: Callable[[str], None] = lambda line: None) -> Path:
    """Return the demo's run directory; it is trained if it is not there yet (seconds)."""
    directory = (folder or cache()) / VERSION
    if directory.is_dir():
        return directory
    aside = directory.with_name(f".{VERSION}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _make(aside, listen)
        # Another process may have been faster; what it made is as good.
        return directory if directory.is_dir() else aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make(directory: Path, listen: Callable[[str], None]) -> None:
    run = PersonalRun(
        adapter=AdapterConfig(rank=4, alpha=8.0),
        personal=PersonalConfig(meta_loras=4, sample=512),
        comparison=ComparisonConfig(recommenders=("MF",), routers=("MF",), folds=2),
    )
    log = load_interactions(run.ratings, seed=run.seed)
    split = SPLITS[run.comparison.split](log)

    def told(record: Any) -> None:
        listen(str(record["name"]))

    world = World.made(
        log, split, run.comparison, sample=run.personal.sample, seed=run.seed, listen=told,
        base=lambda log, rest, seed: train_reader(log, rest, _READER, seed=seed),
    )  # fmt: skip
    # The reference is where the reader will be found, not where it is made.
    save_reader(world.base, directory / BASE)
    arm = replace(world, base=replace(world.base, reference=BASE)).fitted(None, run.personal, run.adapter)
    listen("adapters")
    keep_recommenders(world, directory)
    keep_personal(arm, directory)
    (directory / "config.yaml").write_text(to_yaml(run))
