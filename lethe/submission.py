"""A run on a deployed federation: submitted, followed, and submitted again where its server side died."""

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from lethe.config import RunFile, resolved, result_digest
from lethe.credentials import make_folder
from lethe.operator import Operator, RunStatus
from lethe.processes import flwr
from lethe.progress import round_line
from lethe.site import CONNECTION, Site, toml_line
from lora.errors import ConfigError, DeploymentError, RunError, nearest

PATIENCE = 600.0
"""Seconds to wait for a SuperLink that does not answer before a run is given up."""
_PAUSE = 2.0
_DIED = re.compile(
    r"no heartbeat received|failed with unknown error|server error '5\d\d [^']*' for url '[^']*/v1/runtime/"
    r"|server disconnected|connection attempts failed|connection (refused|reset)",
    re.IGNORECASE,
)
"""What Flower says of a run whose server app was killed or lost its SuperLink, not of one that failed by itself.
SQLite's "database is locked" on a busy host reaches the server app as an error 500 of the SuperLink."""

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A line of the operator's journal: which run was submitted under which name."""

    name: str
    identity: str
    recipe: str
    digest: str
    submitted: float


class Journal:
    """What was submitted from here, in order; Flower itself knows runs by number only."""

    def __init__(self, site: Site) -> None:
        self._file = site.home / "runs.jsonl"

    def entries(self) -> list[Entry]:
        """Return all entries, leaving out a line that a kill has cut."""
        found = []
        if self._file.is_file():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError):
                    found.append(Entry(**json.loads(line)))
        return found

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        make_folder(self._file.parent)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")

    def latest(self, name: str) -> Entry | None:
        """Return the last entry of a name."""
        return next((entry for entry in reversed(self.entries()) if entry.name == name), None)

    def find(self, run: str) -> Entry:
        """Return the entry of a run by name or number; ConfigError names the nearest."""
        entries = self.entries()
        for entry in reversed(entries):
            if run in (entry.name, entry.identity):
                return entry
        if run.isdigit():
            return Entry(run, run, "", "", 0.0)
        raise ConfigError(f"no run '{run}' was submitted from here{nearest(run, {entry.name for entry in entries})}")


@dataclass(frozen=True)
class Sending:
    """A run config on its way to a federation, under a name; `told` says what a line of the run's log means."""

    site: Site
    operator: Operator
    say: Say
    name: str
    config: str
    """Flower's run config, TOML."""
    told: Callable[[str], str | None]
    again: str = "submitted under the same name it goes on from its last checkpoint"
    """What one does about a run that was stopped."""
    recipe: str = ""
    digest: str = ""

    def send(self, *, retries: int, follow: bool) -> None:
        """Submit, and follow to the end; where the server app or the SuperLink died, submit again.

        Raises DeploymentError when the run failed.
        """
        identity = self._start()
        if not follow:
            return
        for attempt in range(retries + 1):
            end = self._follow(identity)
            if end.completed:
                self._report(end)
                return
            if not _died(end) or attempt == retries:
                raise _failure(self.name, end, attempt, stopped=self.again)
            self.say(f"run {self.name} lost its server side ({end.details.rstrip('.')}); submitted again")
            identity = self._start()
        raise DeploymentError(f"run {self.name} was not submitted: --retries {retries} allows no attempt")

    def _start(self) -> str:
        with bundle() as folder:
            settings = folder.parent / "job.toml"
            settings.write_text(self.config, encoding="utf-8")
            identity = _patiently(lambda: self.operator.start(bundle=folder, settings=settings), self.say)
        Journal(self.site).add(Entry(self.name, identity, self.recipe, self.digest, time.time()))
        self.say(f"run {self.name} is number {identity}")
        return identity

    def _follow(self, identity: str) -> RunStatus:
        """Show what the run says until it has ended."""
        seen, name = 0, self.name
        while True:
            try:
                for number, line in enumerate(log_lines(self.site, identity), start=1):
                    if number > seen and (words := self.told(line)):
                        self.say(words)
                    seen = max(seen, number)
            except KeyboardInterrupt:
                self.say(f"the run goes on: `lethe deploy logs {name}` follows it, `lethe deploy stop {name}` ends it")
                raise
            status = _patiently(lambda: self.operator.run(identity), self.say)
            if status.finished:
                return status
            time.sleep(_PAUSE)

    def _report(self, end: RunStatus) -> None:
        self.say(
            f"finished after {end.elapsed:.0f} s; nodes sent {end.bytes_in:,} bytes and were sent {end.bytes_out:,}"
        )


@dataclass(frozen=True)
class Submission:
    """A run file on its way to a federation. Use `send`."""

    site: Site
    run: RunFile
    recipe: str
    operator: Operator
    say: Say

    def send(self, *, retries: int = 3, follow: bool = True) -> str:
        """Submit the run, follow it to its end, and return its name.

        Where the server app or the SuperLink died, the run is submitted again under its name, and its server app goes
        on from the last checkpoint. Raises RunError for a name that is taken, DeploymentError when the run failed.
        """
        name, rounds = self._name(), self.run.federation.rounds
        Sending(
            self.site, self.operator, self.say, name, run_config(self.run, name),
            told=lambda line: told(line, rounds=rounds), recipe=self.recipe, digest=result_digest(self.run),
        ).send(retries=retries, follow=follow)  # fmt: skip
        return name

    def _name(self) -> str:
        """Return a name that is free, or of a run that failed and may go on."""
        journal, federation = Journal(self.site), self.site.federation
        if self.run.federation.clients > len(federation.nodes):
            raise ConfigError(
                f"federation.clients={self.run.federation.clients}: the federation has {len(federation.nodes)} nodes; "
                f"add federation.clients={len(federation.nodes)}, or nodes by `lethe deploy add-node`"
            )
        if self.run.name is None:
            return _free_name(self.recipe, {entry.name for entry in journal.entries()})
        before = journal.latest(self.run.name)
        if before is not None:
            self._may_go_on(before)
        return self.run.name

    def _may_go_on(self, before: Entry) -> None:
        found = next((each for each in self.operator.runs() if each.identity == before.identity), None)
        if found is None:
            return
        name = before.name
        if not found.finished:
            raise RunError(
                f"run {name} is {found.status}; `lethe deploy logs {name}` follows it, or choose another name"
            )
        if found.completed:
            raise RunError(f"run {name} has finished; choose another name=…")
        self.say(f"run {name} ended before ({found.status}); it goes on from its last checkpoint, where there is one")


def log_lines(site: Site, identity: str) -> Iterator[str]:
    """Yield the lines of a run's server side, from its start until it ends or the SuperLink goes away."""
    command = flwr(site, "log", identity, CONNECTION, "--stream")
    with subprocess.Popen(
        command.argv,
        env={**command.environment(), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as process:
        try:
            if process.stdout is not None:
                yield from (line.rstrip("\n") for line in process.stdout)
        finally:
            process.terminate()


def told(line: str, *, rounds: int) -> str | None:
    """Return what a line of the server's log means to whoever follows the run; None for what is for the log alone."""
    event = _event(line)
    kind = event.get("event")
    if kind == "round":
        return _round(event, rounds=rounds)
    if kind == "refused":
        return f"  refused: {event.get('client')} ({event.get('reason')})"
    if kind == "resumed":
        return f"resumed after round {event.get('round')}"
    if kind == "waiting":
        return f"waiting for clients: {event.get('online')} of {event.get('wanted')} are here"
    return None


def forgetting_told(line: str) -> str | None:
    """Return what a line of the log of a run that forgets means; None for what is for the log alone."""
    event = _event(line)
    if event.get("event") != "forgetting":
        return None
    client, step = event.get("client"), event.get("step")
    if client is None:
        return f"{event.get('accepted')} offers served, {event.get('refused')} not"
    reason = f": {event.get('reason')}" if event.get("reason") else ""
    return f"{client}  {step}{reason}"


def forgetting_config(name: str, asked: Mapping[str, Any]) -> str:
    """Return Flower's run config, as TOML, of a run that serves what nodes offer to have forgotten."""
    return f"{toml_line('name', name)}\n{toml_line('forget', json.dumps(dict(asked)))}\n"


def send_forgetting(
    site: Site, operator: Operator, say: Say, asked: Mapping[str, Any], *, retries: int = 3, follow: bool = True
) -> str:
    """Let the server side serve what nodes offer to have forgotten, follow it to its end, and return the run's name.

    `asked` is what the server reads as its `forget`. Raises DeploymentError when an offer was not served.
    """
    name = _free_name("forget", {entry.name for entry in Journal(site).entries()})
    config = forgetting_config(name, asked)
    Sending(
        site,
        operator,
        say,
        name,
        config,
        told=forgetting_told,
        recipe="forget",
        again="lethe deploy forget again goes on where it was",
    ).send(retries=retries, follow=follow)
    return name


def run_config(run: RunFile, name: str) -> str:
    """Return Flower's run config as TOML: the run's name, and the resolved run file as JSON for server and nodes."""
    sections = {key: value for key, value in resolved(run).items() if key not in ("name", "simulation")}
    return f"{toml_line('name', name)}\n{toml_line('job', json.dumps(sections))}\n"


@contextmanager
def bundle() -> Iterator[Path]:
    """Make the app that is submitted: a manifest without code, so that hosts run what is installed there, no more."""
    with tempfile.TemporaryDirectory(prefix="lethe-") as place:
        folder = Path(place) / "lethe"
        folder.mkdir()
        (folder / "pyproject.toml").write_text(_MANIFEST.format(version=_version()), encoding="utf-8")
        yield folder


_MANIFEST = """\
[project]
name = "lethe"
version = "{version}"
description = "Runs the Lethe that is installed on server and nodes"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lethe"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
name = ""
job = ""
forget = ""
"""


def _version() -> str:
    with suppress(PackageNotFoundError):
        return version("lethe")
    return "0.0.0"


def _event(line: str) -> dict[str, Any]:
    start = line.find("{")
    with suppress(ValueError):
        found = json.loads(line[start:]) if start >= 0 else {}
        return found if isinstance(found, dict) else {}
    return {}


def _round(event: Mapping[str, Any], *, rounds: int) -> str:
    record = {
        "round": event.get("round", 0),
        "selected": range(event.get("selected", 0)),
        "accepted": range(event.get("accepted", 0)),
        "accuracy": event.get("accuracy"),
        "loss": event.get("loss"),
        "epsilon": {"most": event["epsilon"]} if event.get("epsilon") is not None else {},
        "seconds": {"all": event.get("seconds", 0.0)},
    }
    return round_line(record, rounds=rounds)


def _patiently(ask: Callable[[], T], say: Say) -> T:
    """Ask until there is an answer. Raises the last DeploymentError when there has been none for ten minutes."""
    end, told_so = time.monotonic() + PATIENCE, False
    while True:
        try:
            return ask()
        except DeploymentError as error:
            if not _unreachable(error) or time.monotonic() > end:
                raise
            if not told_so:
                say("the SuperLink does not answer; waiting for it")
                told_so = True
            time.sleep(_PAUSE)


def _unreachable(error: DeploymentError) -> bool:
    return (
        re.search(r"connect|unavailable|disconnected|timed out|did not finish", str(error), re.IGNORECASE) is not None
    )


def _died(end: RunStatus) -> bool:
    return end.status == "finished:failed" and _DIED.search(end.details) is not None


def _failure(name: str, end: RunStatus, attempt: int, *, stopped: str) -> DeploymentError:
    again = f" after being submitted {attempt + 1} times" if attempt else ""
    details = end.details or (f"it was stopped; {stopped}" if end.status == "finished:stopped" else "no reason given")
    return DeploymentError(f"run {name} ended as {end.status}{again}: {details}; `lethe deploy logs {name}` shows all")


def _free_name(stem: str, taken: set[str]) -> str:
    pattern = re.compile(rf"{re.escape(stem)}-(\d+)")
    numbers = [int(found[1]) for name in taken if (found := pattern.fullmatch(name))]
    return f"{stem}-{max(numbers, default=0) + 1:03d}"
