"""Three nodes, TLS, authentication, the proxy, by the compose file's command lines: do they train, and rightly so?"""

import json
import os
import shutil
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from lethe import load_run_file, simulate
from lethe.spending import spent
from tasks.builtin import builtin_tables

pytestmark = pytest.mark.deployment

DATA = Path(__file__).parents[3] / "shared" / "data" / "clinc150"
SMALL = ["model.name=tiny-bert", "data.max_train=240", "data.max_eval=30", "training.steps=2", "training.batch=8"]
THREE = ["federation.clients=3", "federation.min_clients=3", "federation.greeting_timeout=240"]
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed (apt-get nginx-light)")


def largest_difference(one: Path, other: Path) -> float:
    left, right = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    return max(float(abs(left[key] - right[key]).max()) for key in left)


def test_three_nodes_train_privately_and_charge_their_own_ledgers(fleet: Any) -> None:
    done = fleet.submit("quickstart", "name=private", *SMALL, *THREE, "federation.rounds=2")
    assert done.returncode == 0, done.stderr + fleet.logs()
    assert "round 2/2  3 of 3 clients" in done.stderr
    assert fleet.summary("private")["rounds"] == 2
    for number, node in enumerate(("node-1", "node-2", "node-3")):
        (figures,) = spent(fleet.root / "nodes" / node / "state" / "ledger.sqlite", delta=1e-4)
        assert 0 < figures.epsilon <= 8 and not figures.simulated and str(number) in figures.client


def test_without_noise_it_learns_what_the_simulation_learns(fleet: Any, tmp_path: Path) -> None:
    words = [*SMALL, *THREE, "federation.rounds=2", "privacy.epsilon=null", "training.rate=0.5", "name=open"]
    done = fleet.submit("quickstart", *words)
    assert done.returncode == 0, done.stderr + fleet.logs()
    played = simulate(load_run_file("quickstart", words), root=tmp_path)
    assert largest_difference(fleet.home / "runs" / "open", played) <= 1e-5
    assert fleet.summary("open")["frame_digest_end"] == fleet.summary("private")["frame_digest_start"]


def test_what_a_node_offers_is_forgotten_and_its_rows_stay_there(fleet: Any) -> None:
    rows = fleet.home / "alarms.jsonl"
    table = builtin_tables("classification", seed=0)["train"]
    texts = [text for text, label in zip(*(table.columns[name] for name in ("text", "label")), strict=True)
             if label == "set an alarm"][:24]  # fmt: skip
    rows.write_text("".join(json.dumps({"text": text, "label": "set an alarm"}) + "\n" for text in texts))
    node = fleet.root / "nodes" / "node-2"
    at_node = ["--node", str(node)]
    done = fleet.run(["lethe", "forget", "offer", "open", "--examples", str(rows), "--class", "set an alarm", *at_node])
    assert done.returncode == 0 and "24 rows for all of set an alarm" in done.stdout, done.stderr
    rows.unlink()
    done = fleet.lethe("forget", "open")
    assert done.returncode == 0, done.stderr + fleet.logs()
    steps = [line.split("node-2  ")[1].strip() for line in done.stderr.splitlines() if "node-2  " in line]
    assert steps[:2] == ["ordered", "answered"] and "accept answer" in steps and steps[-1] == "served"
    assert "1 offers served, 0 not" in done.stderr
    listed = fleet.run(["lethe", "forget", "list", "--in", "open"])
    assert "done" in listed.stdout and "forget rows of client" in listed.stdout, listed.stderr
    checked = fleet.run(["lethe", "forget", "verify", "--in", "open", "--subject", "node-2"]).stdout
    assert "holds   signed by the store's key" in checked and "holds   the record is about that client" in checked
    assert "done" in fleet.run(["lethe", "forget", "offers", *at_node]).stdout
    held = [path for folder in (fleet.home, node / "state") for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in held if texts[0].encode() in path.read_bytes()]
    again = fleet.lethe("forget", "open", "--node", "node-2")
    assert again.returncode == 0 and "0 offers served, 0 not" in again.stderr, again.stderr
    wrong = fleet.lethe("forget", "opne", "--node", "node-2")
    assert wrong.returncode == 2 and "run 'opne' is not in" in wrong.stderr


def test_a_name_that_has_finished_is_refused(fleet: Any) -> None:
    done = fleet.submit("quickstart", "name=private", *SMALL, *THREE)
    assert done.returncode == 2
    assert "run private has finished; choose another name" in done.stderr


def test_a_run_that_fails_is_a_failed_command(fleet: Any) -> None:
    missing = "data.path=nowhere.csv"
    done = fleet.submit("quickstart", "name=failing", missing, *THREE, "data.text=a", "data.label=b")
    assert done.returncode == 2
    assert "run failing ended as finished:failed: " in done.stderr and "nowhere.csv" in done.stderr


def test_detached_runs_are_listed_followed_and_stopped(fleet: Any) -> None:
    done = fleet.submit("quickstart", "name=long", *SMALL, *THREE, "federation.rounds=500", "--detach")
    assert done.returncode == 0, done.stderr
    again = fleet.submit("quickstart", "name=long", *SMALL, *THREE, "federation.rounds=500")
    assert again.returncode == 2 and "`lethe deploy logs long` follows it" in again.stderr
    assert fleet.lethe("stop", "long").returncode == 0
    status = fleet.lethe("status").stdout
    assert "finished:stopped" in status and status.count(" online") == 3
    assert fleet.lethe("logs", "long").returncode == 0
    wrong = fleet.lethe("stop", "lang")
    assert wrong.returncode == 2 and "did you mean 'long'?" in wrong.stderr


def test_a_run_whose_server_app_is_killed_is_submitted_again_and_resumes(fleet: Any) -> None:
    words = [*SMALL, *THREE, "federation.rounds=6", "privacy.epsilon=null", "name=resumed"]
    command = ["lethe", "deploy", "submit", "quickstart", *words, "--site", str(fleet.root)]
    environment = fleet.environment()
    metrics = fleet.home / "runs" / "resumed" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=fleet.home, env=environment, stderr=subprocess.PIPE, text=True) as submitted:
        fleet.until(lambda: metrics.exists() and '"round": 2' in metrics.read_text(), seconds=200)
        (app,) = fleet.mine(words="flwr-serverapp")
        os.kill(app, signal.SIGKILL)
        _, told = submitted.communicate(timeout=400)
    assert submitted.returncode == 0, told + fleet.logs()
    assert "submitted again" in told and "round 6/6" in told
    assert fleet.summary("resumed")["rounds"] == 6


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/runtime/responses",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol%2flist-runs",
        "/v1/control/../fleet/get-run",
        "//v1/control/list-runs",
        "/V1/fleet/get-run",
        "/v1/fleet/",
    ],
)
def test_the_proxy_hides_all_but_the_fleet(fleet: Any, path: str) -> None:
    assert request(fleet, path)[0] == 403


@needs_nginx
def test_the_proxy_shows_the_fleet_to_who_has_a_key(fleet: Any) -> None:
    code, kind = request(fleet, "/v1/fleet/pull-messages")
    # The SuperLink refuses it, not the proxy: nginx's answers are HTML.
    assert 400 <= code < 500 and "html" not in kind


def request(fleet: Any, path: str) -> tuple[int, str]:
    trusted = ssl.create_default_context(cafile=str(fleet.site.ca))
    asked = urllib.request.Request(f"https://localhost:{fleet.gate}{path}", data=b"", method="POST")
    try:
        with urllib.request.urlopen(asked, context=trusted, timeout=20) as found:
            return int(found.status), str(found.headers["content-type"])
    except urllib.error.HTTPError as error:
        return error.code, str(error.headers["content-type"])


@pytest.mark.data
def test_real_intents_are_learned_privately_as_in_the_simulation(fleet: Any, tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip("no local copy of CLINC150 beside the checkout")
    for node, number in (("node-1", 1), ("node-2", 2), ("node-3", 3)):
        fleet.settle(node, {"data": str(DATA)})
        fleet.kill(f"executor-{number}", signal.SIGTERM)
        fleet.start(f"executor-{number}")
    words = [f"data.path={DATA}", "data.max_train=900", "data.max_eval=100", "training.steps=2", "training.batch=16"]
    words += [*THREE, "federation.rounds=2"]
    # No budget: the ledgers of this fleet already hold what the tests before have spent.
    noise = ["privacy.noise_multiplier=1.0", "privacy.delta=1e-3"]
    private = fleet.submit("clinc150", *words, "name=intents-private", *noise)
    assert private.returncode == 0, private.stderr + fleet.logs()
    assert fleet.summary("intents-private")["rounds"] == 2
    done = fleet.submit("clinc150", *words, "name=intents")
    assert done.returncode == 0, done.stderr + fleet.logs()
    played = simulate(load_run_file("clinc150", [*words, "name=intents"]), root=tmp_path)
    assert largest_difference(fleet.home / "runs" / "intents", played) <= 1e-5
