"""What a run directory holds: finding it by name, and reading its metrics, summary and configuration."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lethe.notation import parse
from lora.errors import ConfigError, RunError, nearest

RUNS = Path("runs")
"""Where runs are kept, below the working directory."""


def find_run(run: str | Path, *, root: Path = RUNS) -> Path:
    """Return the directory of a run given by its name below `root` or by path; RunError names the nearest."""
    for directory in (Path(run), root / run):
        if (directory / "config.yaml").is_file():
            return directory
    hint = nearest(str(run), _names(root)) or "; start one with `lethe simulate RECIPE`"
    if Path(run).is_dir():
        raise RunError(f"{run} is no run directory, it has no config.yaml{hint}")
    raise RunError(f"there is no run '{run}' below {root}/{hint}")


def _names(root: Path) -> list[str]:
    return sorted(each.parent.name for each in root.glob("*/config.yaml"))


def latest_ledger(*, root: Path = RUNS) -> Path:
    """Return the ledger of the run that charged last; RunError when no run below `root` has one."""
    ledgers = sorted(root.glob("*/ledger.sqlite"), key=lambda path: path.stat().st_mtime)
    if not ledgers:
        raise RunError(f"no run below {root}/ has a privacy ledger; name one: `lethe privacy show PATH`")
    return ledgers[-1]


@dataclass(frozen=True)
class RunRecord:
    """A run as far as it got, read from its files."""

    directory: Path
    start: Mapping[str, Any] = field(default_factory=dict)
    """The `start` line of the metrics: clients, engine, privacy, first evaluation."""
    rounds: tuple[Mapping[str, Any], ...] = ()
    """One line per round in order; of a round that was repeated after a resume, the last."""
    resumed: tuple[int, ...] = ()
    """Rounds at which the run was resumed."""
    end: Mapping[str, Any] = field(default_factory=dict)
    """The `end` line; empty while the run is not finished."""
    arms: tuple[Mapping[str, Any], ...] = ()
    """Of a personal run: one line per arm and seed, with its figures and the curve of its training."""
    portrait: Mapping[str, Any] = field(default_factory=dict)
    """Of a personal run: the user that is shown."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """summary.json; empty while the run is not finished."""
    config: str = ""
    """config.yaml, as it is."""

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The run file's values; empty when config.yaml is missing or damaged."""
        try:
            tree = parse(self.config, source="config.yaml")
        except ConfigError:
            return {}
        return tree if isinstance(tree, dict) else {}

    @property
    def personal(self) -> bool:
        """Whether the run compares personal adapters, and is no federation."""
        return bool(self.settings.get("kind") == "personal")

    @property
    def causal(self) -> bool:
        """Whether the run learns to predict tokens, so that its loss has a perplexity."""
        return bool(self.settings.get("task", {}).get("kind") == "causal-lm")

    @property
    def planned(self) -> int | None:
        """Rounds that the run file asks for."""
        rounds = self.settings.get("federation", {}).get("rounds")
        return int(rounds) if rounds else None

    @property
    def done(self) -> int:
        """Rounds that are done."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def clients(self) -> list[str]:
        """Names of all clients, numbered ones by number; those that were ever selected, where the start names none."""
        named = {str(each["client"]) for each in self.start.get("clients") or ()}
        return sorted(named or {name for each in self.rounds for name in each.get("selected") or ()}, key=natural)

    @property
    def privacy(self) -> Mapping[str, Any] | None:
        """What was said about privacy at the start, else what the run file says; None for a run without."""
        if said := self.start.get("privacy"):
            return dict(said)
        asked = self.settings.get("privacy", {})
        if asked.get("epsilon") is None and asked.get("noise_multiplier") is None:
            return None
        return {"epsilon_budget": asked.get("epsilon"), "delta": asked.get("delta"), "sampling": asked.get("sampling")}

    @property
    def refused(self) -> list[tuple[int, Mapping[str, Any]]]:
        """Every refused reply with its round."""
        return [(int(each["round"]), one) for each in self.rounds for one in each.get("refused") or ()]

    @property
    def epsilon(self) -> dict[str, float]:
        """What each client has spent so far."""
        return self.epsilon_by_round()[-1][1] if self.rounds else {}

    def epsilon_by_round(self) -> list[tuple[int, dict[str, float]]]:
        """Return what each client has spent after every round; a client that was not drawn keeps its figure."""
        history, spent = [], dict[str, float]()
        for each in self.rounds:
            spent = spent | (each.get("epsilon") or {})
            history.append((int(each["round"]), spent))
        return history

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return (round, value) wherever a round has the value; round 0 is the start."""
        lines = [(0, self.start), *((int(each["round"]), each) for each in self.rounds)]
        return [(float(number), float(line[key])) for number, line in lines if line.get(key) is not None]

    def latest(self, key: str) -> float | None:
        """Return the last value of a round's key."""
        found = self.series(key)
        return found[-1][1] if found else None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.end or self.summary)


def read_record(directory: Path) -> RunRecord:
    """Read a run directory, finished or not.

    Raises RunError for a directory without metrics, or for a damaged line that is not the last (which a kill may cut).
    """
    lines = _metrics(directory / "metrics.jsonl")
    starts = [line for line in lines if line.get("kind") == "start"]
    rounds = {int(line["round"]): line for line in lines if line.get("kind") == "round"}
    ends = [line for line in lines if line.get("kind") == "end"]
    return RunRecord(
        directory=directory,
        start=starts[-1] if starts else {},
        rounds=tuple(rounds[number] for number in sorted(rounds)),
        resumed=tuple(int(line["round"]) for line in lines if line.get("kind") == "resumed"),
        end=ends[-1] if ends else {},
        arms=tuple(line for line in lines if line.get("kind") == "arm"),
        portrait=next((line for line in lines if line.get("kind") == "portrait"), {}),
        summary=_summary(directory / "summary.json"),
        config=_text(directory / "config.yaml"),
    )


def natural(name: str) -> tuple[bool, int, str]:
    """Order names with numbers by number: 2 before 10, both before words."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise RunError(f"{path.parent} has no metrics.jsonl: the run has not started; `lethe simulate` starts one")
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    parsed = []
    for number, line in lines:
        try:
            parsed.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number != lines[-1][0]:
                raise RunError(
                    f"{path}, line {number}: not a JSON object; the file was damaged after the run"
                ) from None
    return parsed


def _summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(_text(path)))
    except (ValueError, TypeError):
        raise RunError(f"{path}: not a JSON object; `lethe resume {path.parent.name}` writes it anew") from None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
