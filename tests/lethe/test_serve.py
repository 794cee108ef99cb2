"""`lethe serve`: a run is served as it answered, the demo makes itself once, and it stops in peace."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lethe import serving_demo
from lethe.cli import main
from lethe.serve import KEY_FILE, Place, folder_of, open_service, operator_key
from lethe.served_run import open_run
from lora.errors import RunError
from server.service.identity import Caller
from server.service.recommending import RecommendAsked
from strategies.personal.asking import Asking
from strategies.personal.comparison import RECLORA, Comparison
from strategies.personal.personalized import Personalized
from tasks.recommendation.reader import ReaderSettings
from tests.ratings import LITTLE, little_log, write_ratings

OPERATOR = Caller("x", "operator", None)


class Played:
    """A small personal run, and its RecLoRA as it was in memory."""

    def __init__(self, run: Path, arm: Personalized) -> None:
        self.run, self.arm = run, arm


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(tmp_path_factory.mktemp("served"))


def play(place: Path, *more: str) -> Played:
    """Make a little personal run."""
    data = write_ratings(place / "data")
    kept: list[Personalized] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run = Comparison.run

        def spied(self: Comparison, *given: Any, **named: Any) -> Any:
            arms = run(self, *given, **named)
            kept.append(arms[RECLORA])
            return arms

        patch.setattr(Comparison, "run", spied)
        words = [*LITTLE, "comparison.recommenders=[MF,DIN]", "comparison.routers=[MF,DIN]", "name=little", *more]
        assert main(["personalize", "movielens", f"ratings.path={data}", *words, "--quiet"]) == 0
    return Played(place / "runs" / "little", kept[0])


def test_an_opened_run_answers_as_it_did(played: Played) -> None:
    opened = open_run(played.run)
    log = opened.log
    asked = log.queries(np.arange(0, len(log), 7))
    np.testing.assert_allclose(opened.personal.logits(log, asked), played.arm.logits(log, asked), atol=1e-5)
    assert np.ptp(played.arm.logits(log, asked)) > 1e-3


def test_an_opened_run_tells_the_events_that_it_told(tmp_path: Path) -> None:
    played = play(tmp_path, "personal.told=similar", "comparison.ranked=1")
    opened = open_run(played.run)
    asked = opened.log.queries(np.arange(20, len(opened.log), 29))
    np.testing.assert_allclose(
        opened.personal.logits(opened.log, asked), played.arm.logits(opened.log, asked), atol=1e-5
    )
    told = [one.asking(opened.log, asked).tokens.ids for one in (opened.personal, played.arm)]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(*told, strict=True))
    latest = Asking(opened.personal.base, history=2)(opened.log, asked).tokens.ids
    assert any(not np.array_equal(mine, other) for mine, other in zip(told[0], latest, strict=True))
    (played.run / "recommenders" / "texts.safetensors").unlink()
    with pytest.raises(RunError, match=r"texts\.safetensors: the item texts' vectors cannot be read"):
        open_run(played.run)


def test_a_service_of_a_run_knows_its_users_and_keeps_what_comes(played: Played, tmp_path: Path) -> None:
    place = Place(data=tmp_path)
    service = open_service(played.run, place, say=print)
    assert service.users is not None and len(service.users) == 30
    name = service.users.names()[0]
    first = service.recommend(OPERATOR, RecommendAsked(name)).result(60)
    key = operator_key(service.keys, tmp_path)
    assert operator_key(service.keys, tmp_path) == key and (tmp_path / KEY_FILE).stat().st_mode & 0o077 == 0
    service.forget(service.keys.caller(key), service.users.names()[1])
    service.close()
    again = open_service(played.run, place, say=print)
    assert again.users is not None and len(again.users) == 29
    assert again.recommend(OPERATOR, RecommendAsked(name)).result(60) == first
    again.keys.revoke(again.keys.caller(key).key)
    assert operator_key(again.keys, tmp_path) != key
    again.close()


def test_a_run_that_was_made_anew_without_who_was_forgotten_serves_the_same_users(tmp_path: Path) -> None:
    first, place = play(tmp_path / "first"), Place(data=tmp_path / "service")
    service = open_service(first.run, place, say=print)
    assert service.users is not None
    gone, *rest = service.users.names()
    key = operator_key(service.keys, tmp_path / "service")
    service.forget(service.keys.caller(key), gone)
    mixed = service.users.gate(rest[0])
    service.close()
    anew = play(tmp_path / "anew", f"ratings.forgotten={tmp_path / 'service'}")
    summary = json.loads((anew.run / "summary.json").read_text())
    assert summary["left_out"] == 1 and summary["users"] == len(rest)
    again = open_service(anew.run, place, say=print)
    assert again.users is not None and again.users.names() == rest
    # Everybody is routed by what was learned anew.
    assert not np.array_equal(again.users.gate(rest[0]), mixed)
    assert again.recommend(OPERATOR, RecommendAsked(rest[0])).result(60).provenance.personalized
    again.close()
    # A service that begins with the run's own users begins without who was forgotten; later it asks nobody.
    other = Place(data=tmp_path / "other")
    service = open_service(anew.run, other, say=print)
    assert service.users is not None and service.users.names() == rest
    service.close()
    shutil.move(tmp_path / "service", tmp_path / "moved")
    open_service(anew.run, other, say=print).close()


def test_what_cannot_be_served_says_why(played: Played, tmp_path: Path) -> None:
    copy = shutil.copytree(played.run, tmp_path / "copy")
    shutil.rmtree(copy / "recommenders")
    with pytest.raises(RunError, match=r"comparison\.scorer=MF"):
        open_run(copy)
    shutil.rmtree(copy / "adapter" / "meta")
    with pytest.raises(RunError, match="lethe personalize"):
        open_run(copy)


def test_places_have_addresses() -> None:
    assert Place().url == "http://127.0.0.1:8420" and Place("0.0.0.0", 80).url == "http://127.0.0.1:80"
    assert Place("::1", 80).url == "http://[::1]:80"
    assert folder_of(Path("runs/x"), Place()) == Path("runs/x/service")


def test_the_demo_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LETHE_CACHE", str(tmp_path))
    small = ReaderSettings(vocabulary=400, width=16, layers=1, heads=2, hidden=24, epochs=1)
    monkeypatch.setattr(serving_demo, "_READER", small)
    monkeypatch.setattr(serving_demo, "load_interactions", lambda config, *, seed: little_log())
    monkeypatch.setattr("lethe.served_run.load_interactions", lambda config, *, seed: little_log())
    said: list[str] = []
    service = open_service(None, Place(), say=said.append)
    name = service.users.names()[0] if service.users is not None else ""
    assert service.recommend(OPERATOR, RecommendAsked(name)).result(60).provenance.personalized
    assert service.writer is not None and service.users is not None
    service.close()
    assert said and sorted(path.name for path in tmp_path.iterdir()) == ["demo-1", "demo-1-service"]
    said.clear()
    assert serving_demo.demo_run(listen=said.append) == tmp_path / "demo-1" and said == []


@pytest.mark.parametrize("stop", [signal.SIGTERM])
def test_the_command_answers_and_stops_in_peace(played: Played, tmp_path: Path, stop: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-c", "import sys; from lethe.cli import main; sys.exit(main())", "serve"]
    words = ["--run", str(played.run), "--port", str(port), "--data", str(tmp_path)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*run, *words], cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(4)]
        key = lines[1].split()[-1]
        assert lines[3].split()[1] == f"http://127.0.0.1:{port}/console" and lines[3].split()[-1] == key
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            answer = _asked(client, lines[2].split("'")[3].split(str(port))[1])
        server.send_signal(stop)
        rest = server.stdout.read()
    assert len(answer.json()["items"]) == 3 and answer.json()["whose"]["personalized"]
    assert "Traceback" not in rest and server.returncode in (130, -stop)


def _asked(client: httpx.Client, path: str) -> httpx.Response:
    for _ in range(200):
        try:
            return client.get(path).raise_for_status()
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError("the service does not listen")


def test_a_port_that_is_taken_is_an_error_that_says_so(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--run", str(played.run), "--port", port, "--data", str(tmp_path)]) == 2
    assert f"--port {port}" in capsys.readouterr().err
