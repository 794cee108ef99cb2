"""HTTP: what is documented is what happens, and a key opens what it should and nothing else."""

import io
import json
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lora.errors import Unknown
from server.service.adapters import NewAdapter
from server.service.generation import WriteAsked
from server.service.identity import Caller
from strategies.personal.events import Event
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.reader import ReaderSettings, new_reader
from tests.server.service.conftest import Encoder, drawn
from tests.server.service.site import NEXT, Site, good, problem

# --- Users -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def site_url(registry_url: str | None) -> str | None:
    """Everything here is the same over SQLite and PostgreSQL."""
    return registry_url


def test_events_move_a_users_recommendations(site: Site) -> None:
    path = "/v1/users/user-003/recommendations"
    before = site.get(path, who="user-003", params={"count": 5})
    assert before["whose"]["personalized"] and before["whose"]["adapter"] == "user-003" and len(before["items"]) == 5
    version = before["whose"]["adapter_version"]
    taken = site.post("/v1/users/user-003/events", {"events": [NEXT]}, who="user-003")
    assert taken["taken"] == 1 and taken["adapter_version"] > version and not taken["new"]
    after = site.get(path, who="user-003", params={"count": 5})
    assert after["whose"]["adapter_version"] == taken["adapter_version"]
    assert [i["like"] for i in after["items"]] != [i["like"] for i in before["items"]]
    shown = site.get("/v1/users/user-003", who="user-003")
    assert shown["history"][0] == NEXT | {"title": shown["history"][0]["title"]}
    assert shown["events"] == len(shown["history"]) and shown["adapter_version"] == taken["adapter_version"]


def test_an_idempotency_key_takes_effect_once(site: Site) -> None:
    send = {"headers": {"Idempotency-Key": "k1"}, "who": "operator"}
    first = site.post("/v1/users/new/events", {"events": [NEXT]}, **send)
    again = site.post("/v1/users/new/events", {"events": [NEXT]}, **send)
    assert first["new"] and not first["repeated"] and again == first | {"repeated": True}
    other = site.ask("POST", "/v1/users/new/events", json={"events": [NEXT | {"rating": 1.0}]}, **send)
    assert "another request" in problem(other, 422)
    assert site.get("/v1/users/new")["events"] == 1
    plain = site.ask("POST", "/v1/users/new/events", json={"events": [NEXT]})
    assert "already" in problem(plain, 409)


def test_after_a_kill_between_effect_and_answer_the_same_request_succeeds(site: Site) -> None:
    keep = site.service.once._keep
    site.service.once._keep = lambda name, answer: (_ for _ in ()).throw(SystemExit)  # type: ignore[method-assign,assignment]
    event = Event("new", NEXT["item"], NEXT["rating"], NEXT["time"])  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        site.service.observe(Caller("x", "operator", None), "new", [event], key="k")
    site.service.once._keep = keep  # type: ignore[method-assign]
    again = site.post("/v1/users/new/events", {"events": [NEXT]}, headers={"Idempotency-Key": "k"})
    assert again["repeated"] and site.get("/v1/users/new")["events"] == 1


def test_nobody_is_answered_in_silence(site: Site) -> None:
    path = "/v1/users/nobody/recommendations"
    assert "nobody" in problem(site.ask("GET", path), 404)
    cold = site.get(path, params={"fallback": "cold"})
    assert not cold["whose"]["personalized"] and "cold" in cold["whose"]["reason"] and cold["items"]
    plain = site.get("/v1/users/user-001/recommendations", params={"personalized": "false"})
    assert not plain["whose"]["personalized"] and plain["whose"]["adapter"] is None
    assert [i["like"] for i in plain["items"]] != [
        i["like"] for i in site.get("/v1/users/user-001/recommendations")["items"]
    ]


def test_likes_of_items_and_classes_of_texts(site: Site, text_encoder: Encoder) -> None:
    path = "/v1/users/user-001/predictions"
    likes = site.post(path, {"items": ["item-003", "item-001", "item-003"]})
    assert [i["item"] for i in likes["items"]] == ["item-003", "item-001", "item-003"]
    assert likes["whose"]["personalized"]
    assert likes["items"][0]["like"] == pytest.approx(likes["items"][2]["like"], abs=1e-6)
    assert "item-00x" in problem(site.ask("POST", path, json={"items": ["item-00x"]}), 422)
    assert "one of the two" in problem(site.ask("POST", path, json={}), 422)
    assert "no adapter" in problem(site.ask("POST", path, json={"texts": ["a"]}), 404)
    (cold,) = site.post(path, {"texts": ["a"], "fallback": "cold"})["texts"]
    (plain,) = site.post(path, {"texts": ["a"], "personalized": False})["texts"]
    assert cold["shares"] == plain["shares"] and "cold" in cold["whose"]["reason"]
    layout = text_encoder.learner.layout
    site.service.adapters.write(NewAdapter("user-001", drawn(layout, 1)[0], layout, "tiny-bert", 2, "user-001"))
    (own,) = site.post(path, {"texts": ["a"]}, who="user-001")["texts"]
    assert own["whose"]["personalized"] and own["shares"].keys() == {"dull", "good"}
    assert sum(own["shares"].values()) == pytest.approx(1) and own["shares"] != plain["shares"]
    (vector,) = site.post(path, {"texts": ["a"], "kind": "embed"})["texts"]
    assert torch.tensor(vector["embedding"]).norm() == pytest.approx(1, abs=1e-5)


# --- Forgetting ------------------------------------------------------------------------------------------------------


def test_forgetting_leaves_evidence_and_nothing_else(site: Site, tmp_path: Path, text_encoder: Encoder) -> None:
    events = {"events": [NEXT]}
    site.post("/v1/users/a-peculiar-name/events", events, headers={"Idempotency-Key": "k"})
    layout = text_encoder.learner.layout
    site.service.adapters.write(NewAdapter("own", drawn(layout, 1)[0], layout, "tiny-bert", 2, "a-peculiar-name"))
    done = good(site.ask("DELETE", "/v1/users/a-peculiar-name"))
    evidence = {key: done["evidence"][key] for key in ("events", "slot", "adapters", "idempotency_keys")}
    assert done["state"] == "done"
    assert evidence == {"events": 1, "slot": True, "adapters": 1, "idempotency_keys": 1}
    problem(site.ask("GET", "/v1/users/a-peculiar-name"), 404)
    problem(site.ask("DELETE", "/v1/users/a-peculiar-name"), 404)
    assert site.get(f"/v1/forget-requests/{done['id']}", who="auditor") == done
    assert site.get("/v1/forget-requests", who="auditor")["forget_requests"] == [done]
    assert site.get("/v1/forget-requests", who="user-001")["forget_requests"] == []
    problem(site.ask("GET", f"/v1/forget-requests/{done['id']}", who="user-001"), 404)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file.name for file in files if b"a-peculiar-name" in file.read_bytes()] == []
    assert site.post("/v1/users/a-peculiar-name/events", events)["new"]


def test_a_request_that_was_cut_off_is_carried_out_at_the_next_start(site: Site) -> None:
    service = site.service
    forgetting: Any = service.forgetting
    erasers = forgetting._erasers

    def killed(_: str) -> Any:
        raise SystemExit

    forgetting._erasers = (erasers[0], killed)
    with pytest.raises(SystemExit):
        forgetting.ask("user-005", asked_by=None)
    (cut,) = forgetting.all()
    assert cut.state == "accepted"
    forgetting._erasers = erasers
    assert forgetting.resume() == 1 and forgetting.resume() == 0
    assert forgetting.get(cut.id).state == "done" and service.users is not None and "user-005" not in service.users


def test_no_answer_after_its_end_uses_a_forgotten_slot(site: Site, in_threads: Callable[..., None]) -> None:
    """Linearisability: whoever asks after the forget request was answered gets 404, whatever else is going on."""
    people = [f"user-{number:03d}" for number in range(12)]
    stop, gone, lock = threading.Event(), dict[str, float](), threading.Lock()
    late: list[tuple[str, int]] = []

    def ask(path: Callable[[str], tuple[str, str, dict[str, Any]]], first: int) -> None:
        turn = first
        while not stop.is_set():
            turn += 5
            user = people[turn % len(people)]
            with lock:
                over = user in gone
            method, where, more = path(user)
            response = site.ask(method, where, **more)
            assert response.status_code in (200, 404), response.text
            if over and response.status_code == 200:
                late.append((user, turn))

    def recommendations(user: str) -> tuple[str, str, dict[str, Any]]:
        return "GET", f"/v1/users/{user}/recommendations", {"params": {"count": 2}}

    def completions(user: str) -> tuple[str, str, dict[str, Any]]:
        return "POST", "/v1/completions", {"json": {"model": user, "prompt": "12/20 The", "max_tokens": 12}}

    def shown(user: str) -> tuple[str, str, dict[str, Any]]:
        return "GET", f"/v1/users/{user}", {}

    in_threads(*(lambda p=p, n=n: ask(p, n) for n, p in enumerate([recommendations, completions, shown, completions])))
    time.sleep(0.3)
    for user in people[:8]:
        good(site.ask("DELETE", f"/v1/users/{user}"))
        with lock:
            gone[user] = time.monotonic()
        time.sleep(0.05)
    time.sleep(0.3)
    stop.set()
    assert late == [] and len(gone) == 8


def test_a_text_that_is_being_written_ends_when_its_user_is_forgotten(site: Site) -> None:
    service = site.service
    operator, started = service.keys.caller(site.key("operator")), threading.Event()
    asked = WriteAsked("user-006", "12/20", 400, listener=lambda _: started.set())
    future = service.complete(operator, asked)
    assert started.wait(30)
    service.forget(operator, "user-006")
    assert future.done()
    with pytest.raises(Unknown, match="forgotten"):
        future.result()


# --- Adapters and completions ----------------------------------------------------------------------------------------


def test_adapters_leave_and_come_as_peft_directories(site: Site, log: Interactions, tmp_path: Path) -> None:
    archive = site.ask("GET", "/v1/adapters/user-003", who="user-003")
    assert archive.status_code == 200 and archive.headers["content-type"] == "application/zip"
    put = site.ask("PUT", "/v1/adapters/copy", content=archive.content, params={"owner": "zoë", "model": "base"})
    assert good(put)["owner"] == "zoë"
    ask = {"model": "copy", "prompt": "14/20 The", "max_tokens": 8}
    copy = site.post("/v1/completions", ask, who="zoë")
    own = site.post("/v1/completions", ask | {"model": "user-003"}, who="user-003")
    assert copy["choices"] == own["choices"] and copy["whose"][0]["adapter"] == "copy"
    problem(site.ask("GET", "/v1/adapters/copy", who="user-003"), 404)
    problem(site.ask("POST", "/v1/completions", json=ask, who="user-003"), 404)
    assert "copy" not in [model["id"] for model in site.get("/v1/models", who="user-003")["data"]]
    assert {"copy", "base", "zoë"} - {m["id"] for m in site.get("/v1/models", who="zoë")["data"]} == {"zoë"}
    again = site.ask("PUT", "/v1/adapters/copy", content=archive.content, params={"model": "base"})
    assert "there already" in problem(again, 422)
    assert "a user is named" in problem(
        site.ask("PUT", "/v1/adapters/user-001", content=archive.content, params={"model": "base"}), 422
    )
    assert site.ask("DELETE", "/v1/adapters/copy").status_code == 204
    problem(site.ask("POST", "/v1/completions", json=ask, who="zoë"), 404)
    with zipfile.ZipFile(io.BytesIO(archive.content)) as inside:
        inside.extractall(tmp_path / "peft")
    # The same seed makes the same weights, which are not adapted here.
    plain = new_reader(log, ReaderSettings(vocabulary=400, width=16, layers=1, heads=2, hidden=24))
    theirs = PeftModel.from_pretrained(plain.model, tmp_path / "peft")
    ids = torch.tensor([plain.tokenizer(ask["prompt"])["input_ids"]])
    with torch.no_grad():
        found = theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    text = plain.tokenizer.decode([token for token in found if token != 2])
    assert text == own["choices"][0]["text"]


def zipped(**files: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return data.getvalue()


PLAIN = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 3}'
ARCHIVES = {
    "empty": b"",
    "cut": b"PK\x03\x04",
    "none": b"no archive",
    "other": zipped(x=b"y"),
    "half": zipped(adapter_config__json=b"{"),
    "damaged": zipped(adapter_config__json=b"{}", adapter_model__safetensors=b"x" * 100),
    "bomb": zipped(adapter_config__json=PLAIN, adapter_model__safetensors=bytes(70_000_000)),
}


@pytest.mark.parametrize("data", ARCHIVES.values(), ids=ARCHIVES)
def test_archives_that_are_none_are_refused(site: Site, data: bytes) -> None:
    response = site.ask("PUT", "/v1/adapters/x", content=data, params={"model": "base"})
    assert "/tmp" not in problem(response, 422)
    assert site.get("/v1/adapters")["adapters"] == []


def test_completions_are_openais(site: Site) -> None:
    ask = {"model": "user-001", "prompt": ["14/20 The", "x"], "max_tokens": 5, "temperature": 0.8, "seed": 3}
    whole = site.post("/v1/completions", ask)
    assert whole["object"] == "text_completion" and [each["index"] for each in whole["choices"]] == [0, 1]
    assert whole == site.post("/v1/completions", ask) | {"id": whole["id"], "created": whole["created"]}
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    base = site.post("/v1/completions", ask | {"model": "base"})
    assert not base["whose"][0]["personalized"] and whole["whose"][0]["gate"] == {"user-001": 1.0}
    problem(site.ask("POST", "/v1/completions", json=ask | {"model": "nobody"}), 404)
    problem(site.ask("POST", "/v1/completions", json=ask | {"max_tokens": 4000}), 422)
    problem(site.ask("POST", "/v1/completions", json=ask | {"stream": True}), 422)
    problem(site.ask("POST", "/v1/completions", json=ask | {"prompt": []}), 422)


def test_a_stream_adds_up_to_the_whole(site: Site) -> None:
    ask = {"model": "user-001", "prompt": "14/20 The", "max_tokens": 12}
    whole = site.post("/v1/completions", ask)
    response = site.ask("POST", "/v1/completions", json=ask | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["whose"] == whole["whose"] and events[-1]["usage"] == whole["usage"]
    problem(site.ask("POST", "/v1/completions", json=ask | {"stream": True, "model": "nobody"}), 404)


# --- Operation -------------------------------------------------------------------------------------------------------


def test_health_and_figures(site: Site) -> None:
    site.get("/v1/users/user-001/recommendations")
    site.get("/v1/users/nobody/recommendations", params={"fallback": "cold"})
    assert site.get("/healthz", who="") == site.get("/readyz", who="") == {"status": "ok", "faults": []}
    figures = site.client.get("/metrics").text
    assert 'lethe_answers_total{personalized="true",task="recommend"} 1.0' in figures
    assert 'lethe_answers_total{personalized="false",task="recommend"} 1.0' in figures
    assert 'route="/v1/users/{user}/recommendations",status="200"} 2.0' in figures and "user-001" not in figures
    site.service.engines["recommending"].close()
    not_ready = site.client.get("/readyz")
    assert not_ready.status_code == 503 and "recommending" in not_ready.json()["faults"][0]
    answer = site.ask("GET", "/v1/users/user-001/recommendations")
    problem(answer, 503)
    assert int(answer.headers["retry-after"]) >= 1
