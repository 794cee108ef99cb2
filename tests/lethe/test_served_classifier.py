"""A classifier's run is served as it answers, with users' adapters over it and behind what it was asked to forget."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lethe.serve import Place, open_service
from lethe.served_classifier import open_classifier
from lora.errors import RunError, Unavailable
from server.forgetting.asking import wish_classes
from server.forgetting.gates import StoreGates
from server.forgetting.requests import ForgetRequests
from server.forgetting.sources import store_of_run
from server.forgetting.store import MANIFEST
from server.service.adapters import NewAdapter
from server.service.answers import COLD
from server.service.identity import Caller
from server.service.service import Service
from server.service.texts import TextAnswer, TextAsked
from server.service.warm import Warm
from strategies.unlearning.config import ForgettingConfig
from tasks.exported import ExportedClassifier
from tasks.models import load_base
from tests.queries import LABELS, TINY, export_classifier, queries, write_queries

OPERATOR = Caller("k", "operator", None)
QUICK = ForgettingConfig(rank=2, epochs=5, batch=10, rate=0.01, folds=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    write_queries(tmp_path / "rows.jsonl", queries(0, 1, 2, 3))
    data = {"path": str(tmp_path / "rows.jsonl"), "labels": list(LABELS), "holdout": 0.2}
    (made / "config.yaml").write_text(yaml.safe_dump({"model": TINY.model_dump(mode="json"), "data": data}))
    export_classifier(made / "adapter")
    return made


def asked(service: Service, texts: tuple[str, ...], *, user: str = "ada", cold: bool = True) -> list[TextAnswer]:
    found: list[TextAnswer] = []
    for first in range(0, len(texts), 32):
        rows = [TextAsked(user, text) for text in texts[first : first + 32]]
        found += [future.result(60) for future in service.texts(OPERATOR, user, rows, cold=cold)]
    return found


def guesses(answers: list[TextAnswer]) -> list[int]:
    return [int(np.argmax(answer.values)) for answer in answers]


def test_it_answers_as_the_exported_classifier_for_whom_it_does_not_know(run: Path) -> None:
    service = open_service(run, Place(), say=print)
    texts = queries(0, 1, 2, 3).texts[::5]
    learner, values = ExportedClassifier.read(run / "adapter", max_length=64).over(load_base(TINY, causal=False))
    tokens = learner.task.tokenize(queries(0, 1, 2, 3))
    scores = learner.score(values, tokens)
    found = asked(service, queries(0, 1, 2, 3).texts)
    right = np.mean(np.array(guesses(found)) == np.array(queries(0, 1, 2, 3).labels))
    assert right == pytest.approx(scores.accuracy) and right > 0.9 and service.labels == LABELS
    whose = found[0].provenance
    assert (whose.adapter, whose.personalized, whose.reason, whose.gate) == (None, False, COLD, {})
    # A user's own adapter moves the answers, and says so.
    slot = 0.5 * torch.randn(service.served["texts"].layout.size, generator=torch.Generator().manual_seed(1))
    service.adapters.write(NewAdapter("ada", slot, service.served["texts"].layout, "tiny-bert", 2, None))
    own = asked(service, texts, cold=False)
    assert own[0].provenance.adapter == "ada" and own[0].provenance.personalized
    assert np.abs(np.array(own[0].values) - np.array(found[0].values)).max() > 1e-4
    assert service.take(OPERATOR, "ada")
    service.close()


def test_adapters_are_kept_in_half_the_bytes_where_that_is_asked_for(run: Path) -> None:
    service = open_service(run, Place(warm=Warm(4, torch.bfloat16, ("ada",))), say=print)
    layout = service.served["texts"].layout
    names = ["ada", *map(str, range(6))]
    rows = 0.5 * torch.randn(len(names), layout.size, generator=torch.Generator().manual_seed(1))
    service.adapters.write(*[NewAdapter(n, row, layout, "b", 2, None) for n, row in zip(names, rows, strict=True)])
    (kept,) = service._warm
    first = asked(service, ("wake me",), user="ada", cold=False)
    for name in names:
        asked(service, ("wake me",), user=name, cold=False)
    assert kept.data.dtype == torch.bfloat16 and len(kept) == 4 and "ada" in kept
    assert asked(service, ("wake me",), user="ada", cold=False) == first
    service.close()


def test_what_it_was_asked_to_forget_holds_in_the_service_from_then_on(run: Path) -> None:
    store = store_of_run(run, config=QUICK)
    service = open_service(run, Place(), say=print)
    texts = queries(0, 3).texts
    before = asked(service, texts)
    requests = ForgetRequests(store)
    done = requests.add(wish_classes(store, ["alarm"], rows=queries(0))).request.id
    requests.carry_out()
    # The service was not told: the next batch sees it.
    after = asked(service, texts)
    served = store.served().asked(queries(0, 3))
    assert guesses(after) == served.guess.tolist() and guesses(after) != guesses(before)
    gates = [answer.provenance.gate.get(done, 0.0) for answer in after]
    np.testing.assert_allclose(gates, served.weights[:, 0].numpy(), atol=1e-6)
    assert max(gates) == 1.0 and all(answer.provenance.gate == {} for answer in before)
    service.close()
    again = open_service(run, Place(), say=print)
    assert guesses(asked(again, texts)) == guesses(after)
    again.close()


def test_a_request_that_replaced_the_adapter_stops_answers_until_the_next_start(run: Path) -> None:
    store = store_of_run(run, config=QUICK)
    service = open_service(run, Place(), say=print)
    assert asked(service, ("wake me at noon",))
    file = store.directory / MANIFEST
    file.write_text(file.read_text().replace(f'"{store.manifest.adapter}"', '"another"'))
    with pytest.raises(Unavailable, match="start the service again"):
        asked(service, ("wake me at noon",))
    service.close()


def test_what_is_no_finished_classifier_says_so(run: Path) -> None:
    assert open_classifier(run).gates is None
    store_of_run(run, config=QUICK)
    assert isinstance(open_classifier(run).gates, StoreGates)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "forgetting")
    with pytest.raises(RunError, match="lethe resume run"):
        open_classifier(run)
    writes = {"model": {"name": "tiny-llama"}, "task": {"kind": "causal-lm"}, "data": {"path": "x.txt"}}
    (run / "config.yaml").write_text(yaml.safe_dump(writes))
    with pytest.raises(RunError, match="language model"):
        open_classifier(run)
