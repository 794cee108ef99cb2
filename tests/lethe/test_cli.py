"""The command line: exit codes, one message per mistake, light start, progress, resume and reports."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lethe.cli import main
from lethe.config import RunFile, resolved, to_yaml
from lethe.progress import Progress
from lora.errors import FederationError, RunError
from privacy.accounting import Event, epsilon
from privacy.ledger import Ledger

ROOT = Path(__file__).parents[2]
ROUND = {"kind": "round", "selected": ["0", "1"], "accepted": ["0"], "seconds": {"train": 1.5, "evaluate": 0.5}}
HEAVY = ("torch", "transformers", "flwr", "datasets", "numpy", "scipy", "matplotlib")


class FakeRun(ModuleType):
    """Stands in for `lethe.run`: plays rounds without learning anything, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__("lethe.run")
        self.given: RunFile | None = None
        self.recipe: str | None = None
        self.stop: BaseException | None = None

    def simulate(self, run: RunFile, *, root: Path = Path("runs"), recipe: str, progress: Progress) -> Path:
        self.given, self.recipe = run, recipe
        directory = root / (run.name or "made-up")
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(to_yaml(run))
        return self._play(directory, run, progress, first=1)

    def resume(self, directory: Path, *, progress: Progress) -> Path:
        self.stop = None
        return self._play(directory, RunFile(), progress, first=3)

    def _play(self, directory: Path, run: RunFile, progress: Progress, *, first: int) -> Path:
        progress.started(directory, ["engine cohort, because it was asked for"])
        with (directory / "metrics.jsonl").open("a") as metrics:
            for number in range(first, run.federation.rounds + 1):
                if self.stop is not None and number == 3:
                    raise self.stop
                refused = [{"client": "1", "reason": "nan", "detail": "x"}]
                record = ROUND | {"round": number, "accuracy": 0.5 + number / 100, "refused": refused}
                metrics.write(json.dumps(record) + "\n")
                progress.round_done(record)
        (directory / "adapter").mkdir()
        summary = {"accuracy_initial": 0.1, "accuracy_final": 0.55, "rounds": run.federation.rounds, "epsilon_max": 7.5}
        summary |= {"delta": 1e-5, "unit": "example", "sampling": "poisson", "adapter_path": str(directory / "adapter")}
        progress.finished(summary, directory)
        return directory


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeRun]:
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "lethe.run", run)
    monkeypatch.chdir(tmp_path)
    yield run


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err


def test_simulate_hands_the_run_over_and_says_where_everything_is(
    fake: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "quickstart", "federation.rounds=4", "name=first"]) == 0
    assert fake.given is not None
    assert (fake.given.name, fake.given.federation.rounds, fake.recipe) == ("first", 4, "quickstart")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "run runs/first"
    assert out[1] == "  engine cohort, because it was asked for"
    assert out[2] == "round 1/4  1 of 2 clients  accuracy 51.0%  2.0 s  refused: 1 (nan)"
    assert "accuracy 10.0% -> 55.0% after 4 rounds" in out
    assert "privacy  epsilon at most 7.5 at delta 1e-05 per example, poisson sampling (simulated)" in out
    assert out[-2:] == ["adapter  runs/first/adapter", "metrics  runs/first/metrics.jsonl"]


def test_quiet_prints_the_directory_only(fake: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "quickstart", "name=first", "--quiet"]) == 0
    assert capsys.readouterr().out == "runs/first\n"


@pytest.mark.parametrize(
    ("stop", "code", "words"),
    [(FederationError("too few clients"), 2, "error: too few clients"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_a_run_that_stops_says_how_to_go_on_and_goes_on(
    fake: FakeRun, capsys: pytest.CaptureFixture[str], stop: BaseException, code: int, words: str
) -> None:
    fake.stop = stop
    assert main(["simulate", "quickstart", "federation.rounds=10", "name=first"]) == code
    message = errors(capsys)
    assert "the run stopped; `lethe resume first` goes on" in message
    assert words in message
    assert main(["resume", "first"]) == 0
    assert "round  5/10" in capsys.readouterr().out


def test_a_run_that_never_started_does_not_offer_to_go_on(
    fake: FakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Path:
        raise RunError("runs/first exists")

    monkeypatch.setattr(fake, "simulate", refuse)
    assert main(["simulate", "quickstart"]) == 2
    assert errors(capsys) == "error: runs/first exists\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulat"], "error: No such command 'simulat'. Did you mean 'simulate'?"),
        (["config", "shw"], "error: No such command 'shw'. Did you mean 'show'?"),
        (["simulate", "quickstart", "--quite"], "error: No such option '--quite'. Did you mean '--quiet'?"),
        (["simulate"], "error: Missing argument 'RECIPE'."),
        (["simulate", "quikstart"], "error: recipe 'quikstart' was not found; did you mean 'quickstart'?"),
        (["config", "validate", "quickstart", "epsilon=3"], "did you mean 'privacy.epsilon'?"),
        (["resume", "frist"], "error: there is no run 'frist' below runs/; did you mean 'first'?"),
        (["report", "frist"], "did you mean 'first'?"),
        (["report", "."], "error: . is no run directory, it has no config.yaml"),
        (["report", "first"], "first has no metrics.jsonl"),
        (["privacy", "show", "frist"], "did you mean 'first'?"),
        (["privacy", "show", "first"], "run 'first' has no ledger: it was not private"),
        (["privacy", "show"], "no run below runs/ has a privacy ledger"),
        (["privacy", "show", "runs/first/config.yaml"], "ledger"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    fake: FakeRun, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    run = Path("runs/first/config.yaml")
    run.parent.mkdir(parents=True)
    run.write_text(to_yaml(RunFile()))
    assert main(arguments) == 2
    message = errors(capsys)
    assert words in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_no_run_at_all_tells_how_to_start_one(fake: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "first"]) == 2
    assert "start one with `lethe simulate RECIPE`" in errors(capsys)


def test_config_show_resolves_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "quickstart", "seed=9"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 9
    assert shown.keys() == resolved(RunFile()).keys()


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert "privacy" in json.loads(capsys.readouterr().out)["properties"]


def test_config_commands_know_personal_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "movielens", "comparison.seeds=3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["comparison"]["seeds"] == 3
    assert main(["config", "validate", "movielens"]) == 0
    assert "movielens.yaml is valid" in capsys.readouterr().out
    assert main(["config", "schema", "personal"]) == 0
    assert "comparison" in json.loads(capsys.readouterr().out)["properties"]


def test_recipes_lists_every_recipe_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name in ("quickstart", "clinc150", "sst2", "shakespeare", "movielens"):
        assert re.search(rf"^{name} +\w+ .*recipes/{name}\.yaml *$", out, flags=re.MULTILINE)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lethe ")
    assert main(["--help"]) == 0
    assert "simulate" in capsys.readouterr().out
    assert main([]) == 2


def test_privacy_show_agrees_with_the_accountant(fake: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Path("runs/first/ledger.sqlite")
    ledger.parent.mkdir(parents=True)
    (ledger.parent / "config.yaml").write_text("privacy: {epsilon: 8, delta: 1e-4}\n")
    book = Ledger(ledger)
    for client, steps in (("10", 5), ("2", 5), ("10", 7)):
        event = Event(0.1, 1.0, steps)
        book.charge(client, event, purpose="test", budget=8.0, delta=1e-4, simulated=client == "2")
    for arguments, delta in (([], 1e-4), (["first", "--delta", "1e-6"], 1e-6), ([str(ledger)], 1e-4)):
        assert main(["privacy", "show", *arguments]) == 0
        rows = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()[1:3]]
        assert [row[0] for row in rows] == ["2", "10"]
        assert [row[1] for row in rows] == ["5 steps (rate 0.1, noise 1)", "12 steps (rate 0.1, noise 1)"]
        expected = [f"{epsilon([Event(0.1, 1.0, steps)], delta=delta):.4g}" for steps in (5, 12)]
        assert [row[2] for row in rows] == expected
        assert rows[0][3:] == [f"{delta:g}", "example", "add/remove one", "poisson", "yes"]
        assert rows[1][-1] == "no"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["config", "validate", "quickstart"], ["config", "show", "movielens"], ["recipes"]]
)
def test_light_commands_import_nothing_heavy_and_start_fast(arguments: list[str]) -> None:
    code = (
        "import sys; from lethe.cli import main; code = main(sys.argv[1:]); "
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
