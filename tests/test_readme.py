"""Every command of the README runs, every run file in it is valid, and its tables leave nothing out."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lethe import serving_demo
from lethe.cli import main
from lethe.config import PersonalRun, load_any, load_run_file, recipes
from lethe.progress import Progress
from tasks.recommendation.reader import ReaderSettings
from tests.ratings import LITTLE, first_users, write_ratings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SHARED = ROOT.parent / "shared"
FOLDERS = {"$DATA": SHARED / "data", "$WEIGHTS": SHARED / "weights"}
SMALL = ["federation.rounds=1", "training.steps=1", "training.batch=4", "data.max_train=120", "data.max_eval=20"]
SMALL_DATA = {
    "clinc150": ["data.max_train=600"],
    "sst2": ["privacy.epsilon=8", "privacy.delta=1e-3"],
    "shakespeare": ["federation.clients=2", "data.max_train=20000"],
}
PREPARATION = (". .venv/bin/activate", "export ")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def commands(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def of_kind(kind: str) -> list[str]:
    return [command for command in commands(README) if command.split()[0] == kind]


# Those of a deployment start processes: tests/deployment/test_readme_commands.py runs them.
LOCAL = [each for each in of_kind("lethe") if "$" not in each and not each.startswith(("lethe deploy", "lethe serve"))]
WITH_DATA = [command for command in of_kind("lethe") if "$" in command]


def test_every_command_is_of_a_kind_that_is_tested_here() -> None:
    kinds = [*of_kind("lethe"), *of_kind("make"), *of_kind("flwr")]
    assert [each for each in commands(README) if each not in kinds and not each.startswith(PREPARATION)] == []
    assert LOCAL and WITH_DATA and of_kind("make") and len(of_kind("flwr")) == 1


@pytest.mark.parametrize("command", sorted({*of_kind("make"), *commands(GUIDE)}))
def test_make_has_the_target(command: str) -> None:
    tool, target = shlex.split(command)
    assert tool == "make"
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


# --- lethe -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What a command printed."""

    code: int
    text: str


def lethe(command: str, capsys: pytest.CaptureFixture[str]) -> Shown:
    """Run a command of the README in this process, simulations small; `> FILE` is left to the shell."""
    words = shlex.split(command.split(">", maxsplit=1)[0])[1:]
    if words[0] == "simulate":
        words += [*SMALL, *SMALL_DATA.get(words[1], [])]
    if words[0] == "personalize":
        words += LITTLE if "ratings.path" in command else [*LITTLE, f"ratings.path={write_ratings(Path('ratings'))}"]
    return Shown(main(words), capsys.readouterr().out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that the README speaks of: `first` has finished, `interrupted` was stopped in round 2."""
    place = tmp_path_factory.mktemp("readme")
    (place / "made").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place / "made")
        # Enough rows of every class to ask for one to be forgotten.
        assert main(["simulate", "quickstart", "name=first", *SMALL, "data.max_train=300"]) == 0
        assert main(["forget", "add", "--in", "first", "--class", "start a timer"]) == 0
        patch.setattr(Progress, "round_done", _stop)
        assert main(["simulate", "quickstart", "name=interrupted", *SMALL, "federation.rounds=2"]) == 130
    return place


def _stop(progress: Progress, record: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of that folder, as the working directory."""
    shutil.copytree(place / "made", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [command for command in LOCAL if "simulate" in command])
def test_a_simulation_leaves_a_whole_run(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(here / "runs" / "first")
    before = {*(here / "runs").iterdir()}
    assert lethe(command, capsys).code == 0
    (run,) = {*(here / "runs").iterdir()} - before
    assert {"config.yaml", "metrics.jsonl", "summary.json", "adapter", "report.html"} <= {p.name for p in run.iterdir()}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 1 and summary["frame_digest_start"] == summary["frame_digest_end"]
    private = "privacy.epsilon=null" not in command
    assert (run / "ledger.sqlite").exists() == private == (summary["epsilon_max"] is not None)


@pytest.mark.parametrize("command", [command for command in LOCAL if "personalize" in command])
def test_a_personal_run_leaves_a_whole_run(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {*(here / "runs").iterdir()}
    assert lethe(command, capsys).code == 0
    (run,) = {*(here / "runs").iterdir()} - before
    assert {"config.yaml", "metrics.jsonl", "summary.json", "adapter", "report.html"} <= {p.name for p in run.iterdir()}
    assert json.loads((run / "summary.json").read_text())["users"] == 30


@pytest.mark.parametrize(
    "command", [command for command in LOCAL if "simulate" not in command and "personalize" not in command]
)
def test_a_command_succeeds_and_says_something(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = lethe(command, capsys)
    assert shown.code == 0
    assert shown.text.strip()


@pytest.mark.parametrize("command", [each for each in of_kind("lethe") if each.startswith("lethe serve")])
def test_serving_announces_itself(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo at full size but for its decoder; what it then answers is in tests/lethe/test_serve.py."""
    monkeypatch.setenv("LETHE_CACHE", str(tmp_path))
    small = ReaderSettings(vocabulary=400, width=16, layers=1, heads=2, hidden=24, epochs=1)
    monkeypatch.setattr(serving_demo, "_READER", small)
    monkeypatch.setattr("uvicorn.Server.run", lambda server: None)
    shown = lethe(command, capsys)
    assert shown.code == 0
    assert "serving 120 users at http://127.0.0.1:8420" in shown.text and "Authorization: Bearer lethe_" in shown.text


def test_resume_finishes_what_was_interrupted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "runs" / "interrupted"
    assert not (run / "summary.json").exists()
    (command,) = [command for command in LOCAL if command.startswith("lethe resume")]
    assert lethe(command, capsys).code == 0
    assert json.loads((run / "summary.json").read_text())["rounds"] == 2


@pytest.mark.data
@pytest.mark.parametrize("command", WITH_DATA)
def test_a_recipe_takes_a_local_copy(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variable, folder in FOLDERS.items():
        command = command.replace(variable, str(folder))
    paths = re.findall(r"\.path=(\S+)", command)
    if not all(Path(path).exists() for path in paths):
        pytest.skip(f"no local copy beside the checkout: {', '.join(paths)}")
    if "ratings.path" in command:
        command = command.replace(paths[0], str(first_users(Path(paths[0]), here / "first", count=40)))
    assert lethe(command, capsys).code == 0


# --- Python, YAML, tables --------------------------------------------------------------------------------------------


# The service's client needs a service: its example runs in tests/lethe/test_remote.py.
RUNS = [source for source in blocks(README, "python") if "import Client" not in source]


@pytest.mark.parametrize("source", RUNS)
def test_python_runs(source: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = re.sub(r"\[(\"[\w.]+=.*?)\]", lambda match: f"[{match[1]}, *{SMALL!r}]", source)
    assert small != source
    exec(compile(small, "README.md", "exec"), {"__name__": "readme"})
    accuracy, epsilon = map(float, capsys.readouterr().out.split())
    assert 0 <= accuracy <= 1 and 0 < epsilon <= 3


@pytest.mark.parametrize("text", blocks(README, "yaml"))
def test_a_run_file_is_valid_and_every_key_in_it_matters(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    run = load_run_file(file).model_dump(mode="json")
    default = load_run_file(_empty(tmp_path)).model_dump(mode="json")
    for section, keys in yaml.safe_load(text).items():
        assert [key for key, value in keys.items() if run[section][key] != value] == []
        assert [key for key in keys if run[section][key] == default[section][key]] == []


def _empty(folder: Path) -> Path:
    file = folder / "empty.yaml"
    file.write_text("{}\n")
    return file


def rows(heading: str) -> set[str]:
    """Return the first cells, without marks, of the table below a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {cell.strip("`/ ") for cell in re.findall(r"^\| (`[^|]+`) \|", section, flags=re.M)}


def test_the_tables_name_every_recipe_and_every_package() -> None:
    assert rows("Recipes") == {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == recipes().keys()
    assert rows("Layout") == {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}


def test_the_tables_name_every_benchmark() -> None:
    named = {row.removeprefix("python -m benchmarks.") for row in rows("Benchmarks")}
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()} <= named


def test_the_recipes_settings_are_those_of_the_table() -> None:
    section = README.split("\n## Recipes\n")[1].split("\n## ")[0]
    for line in re.findall(r"^\| `.+$", section, flags=re.M):
        name, _, clients, privacy, model, data = (cell.strip() for cell in line.strip("| ").split("|"))
        run = load_any(name.strip("`"))
        if isinstance(run, PersonalRun):
            assert (clients, privacy) == ("-", "-") and run.model.name in model and run.ratings.path is None
            continue
        assert int(clients.split(",")[0]) == run.federation.clients
        assert ("none" if run.privacy.epsilon is None else f"epsilon {run.privacy.epsilon:g}") in privacy
        assert (run.model.name == "minilm") == ("MiniLM (embedded)" in model) and (
            run.model.name in model or run.model.name == "minilm"
        )
        assert run.data.name == "builtin" if data == "built in" else f"`{run.data.name}`" in data


# --- Flower ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of the README beside a SuperLink of our own, which stops with the test."""
    settings = dict(re.findall(r"(\w+)=(\S+)", next(line for line in commands(README) if line.startswith("export "))))
    settings = {key: value.replace("$PWD", str(tmp_path)) for key, value in settings.items()}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"FLWR_HOME": str(tmp_path / "flwr"), "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment = os.environ | settings | own | {"PATH": path}
    port = _free_port()
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "superlink.log").open("w") as log:
        link = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        _await_port(port, link)
        yield environment
        _stop_all(link)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the SuperLink does not listen on port {port} (exit code {process.poll()})")


def _stop_all(leader: subprocess.Popen[bytes]) -> None:
    """Stop a process and all of its group."""
    os.killpg(leader.pid, signal.SIGTERM)
    try:
        leader.wait(timeout=15)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)


def _job(folder: Path) -> Path:
    """Write the run config of a small job: two clients of the quickstart."""
    run = load_run_file("quickstart", [*SMALL, "federation.clients=2", "model.name=tiny-bert"])
    sections = {key: value for key, value in run.model_dump(mode="json").items() if key not in ("name", "simulation")}
    file = folder / "job.toml"
    file.write_text(f"job = '''{json.dumps(sections)}'''\n")
    return file


def test_flower_runs_the_app(flower: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Flower's simulation needs ray")
    (command,) = of_kind("flwr")
    words = [word.replace("num-supernodes=4", "num-supernodes=2") for word in shlex.split(command)]
    assert words[:3] == ["flwr", "run", "."] and words[4] == "--run-config"
    recipe = re.fullmatch(r"recipe='(.+)'", words[5])
    assert recipe is not None and (ROOT / recipe[1]).is_file()
    words[2], words[5] = str(ROOT), str(_job(tmp_path))
    done = subprocess.run(words, cwd=tmp_path, env=flower, capture_output=True, text=True, timeout=400, check=False)
    found = _within(60, tmp_path)
    assert found is not None, done.stdout + done.stderr + (tmp_path / "superlink.log").read_text()
    summary = json.loads(found.read_text())
    assert summary["rounds"] == 1 and summary["refused"] == []
    assert (tmp_path / "ledger.sqlite").is_file()


def _within(seconds: float, folder: Path) -> Path | None:
    """Wait for the summary: the log stream may end before the server does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if summaries := list(folder.glob("runs/flower-*/summary.json")):
            return summaries[0]
        time.sleep(0.5)
    return None
