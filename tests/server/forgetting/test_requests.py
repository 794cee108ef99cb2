"""A request's way from asking to its record: done once, in turn, measured, with nothing left of what it was about."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lora.errors import RunError
from server.forgetting.asking import Wish, wish_classes, wish_examples
from server.forgetting.requests import ForgetRequests
from server.forgetting.steps import Stage
from server.forgetting.store import Store
from strategies.unlearning.folding import plain
from strategies.unlearning.prototypes import Prototypes
from strategies.unlearning.stream import sampled
from tests.queries import LABELS, PLACES, queries


def forget(requests: ForgetRequests, wish: Wish) -> dict[str, Any]:
    """Carry a wish out; returns the record."""
    accepted = requests.add(wish)
    requests.carry_out()
    status = requests.status(accepted.request.id)
    assert status.state == "done" and status.record is not None, status.why
    return dict(status.record)


def everything(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def test_a_class_is_forgotten_and_the_record_says_what_was_asked_done_and_measured(requests: ForgetRequests) -> None:
    record = forget(requests, wish_classes(requests.store, ["alarm"], rows=queries(0)))
    assert record["asked"] == {
        "kind": "class",
        "method": "o3",
        "classes": ["alarm"],
        "rows": 24,
        "rows_from": "file",
    }
    before, after = record["measured"]["before"], record["measured"]["after"]
    assert before["forgotten"] > 0.9 and before["caught"] == 0 and before["utility"] > 0.9
    assert after["forgotten"] < 0.5 and after["caught"] > 0.5
    # The encoder's weights are random, so that its detector takes some strangers for the request's rows.
    assert 0 < after["touched"] < 0.6 and after["utility"] >= before["utility"] - after["touched"]
    assert record["done"]["request_deleted"] and record["done"]["attempts"] == 1
    audit = record["done"]["trained"]["audit"]
    assert audit["foreign"] == 0 and audit["files"] == 0 and audit["rows"] == 19
    audit = record["done"]["trained"]["detector_audit"]
    assert audit["foreign"] == 0 and audit["files"] == 0 and audit["rows"] == 24


def test_nothing_of_a_request_is_left_in_the_store(requests: ForgetRequests) -> None:
    accepted = requests.add(wish_examples(requests.store, queries(2)))
    assert b"will it rain" in everything(requests.store.directory)
    requests.carry_out()
    assert requests.status(accepted.request.id).state == "done"
    left = everything(requests.store.directory)
    assert not any(text.encode() in left for text in queries(2).texts)


def test_a_later_request_leaves_an_earlier_one_as_it_is_and_measures_it(requests: ForgetRequests) -> None:
    first = forget(requests, wish_classes(requests.store, ["alarm"], rows=queries(0)))
    slot = requests.store.slot(first["request"]).read_bytes()
    second = forget(requests, wish_classes(requests.store, ["money"], rows=queries(3)))
    assert requests.store.slot(first["request"]).read_bytes() == slot
    earlier = second["measured"]["after"]["earlier"]
    assert earlier.keys() == {first["request"]} and earlier[first["request"]] < 0.5
    assert [each.block for each in requests.store.manifest.held] == [0, 1]
    served = requests.stage.served
    asked = served.asked(queries(0, 3))
    assert asked.accuracy(queries(0, 3)) < 0.5 and served.without().asked(queries(0, 3)).accuracy(queries(0, 3)) > 0.9


def test_a_row_that_no_request_is_near_to_is_answered_as_before_to_the_bit(requests: ForgetRequests) -> None:
    forget(requests, wish_classes(requests.store, ["alarm"], rows=queries(0)))
    served, rows = requests.stage.served, queries(1, 2, 3)
    now = served.asked(rows)
    untouched = (now.weights == 0).all(1)
    assert 0.4 < untouched.double().mean() < 1
    tokens = served.learner.task.tokenize(rows)
    for places, batch in served.learner.batches([(tokens, row) for row in range(len(tokens))]):
        far = untouched[torch.from_numpy(places)]
        plain = served.learner.answers(served.values, batch)
        gated = served.learner.answers(served.values, batch, overlay=served.overlay(served.weights(batch)))
        assert torch.equal(plain.loss[far], gated.loss[far])


def test_examples_are_forgotten_while_their_class_stays(requests: ForgetRequests) -> None:
    rows = queries(0, places=PLACES[:4])
    record = forget(requests, wish_examples(requests.store, rows))
    assert record["asked"]["classes"] == ["alarm"] and record["done"]["forgets_whole_classes"] == []
    assert record["measured"]["after"]["forgotten"] < record["measured"]["before"]["forgotten"]
    assert requests.store.manifest.forgotten == ()


def test_the_same_twice_is_the_first_request(requests: ForgetRequests) -> None:
    wish = wish_classes(requests.store, ["alarm"], rows=queries(0))
    first = requests.add(wish)
    again = requests.add(wish_classes(requests.store, ["alarm"], rows=queries(0)))
    assert first.new and not again.new and again.request == first.request
    requests.carry_out()
    record = requests.store.record(first.request.id).read_bytes()
    late = requests.add(wish_classes(requests.store, ["alarm"], rows=queries(0)))
    requests.carry_out()
    assert not late.new and late.request == first.request
    assert requests.store.record(first.request.id).read_bytes() == record
    assert len(requests.store.manifest.held) == 1


def test_a_request_while_one_runs_waits_for_its_turn(store: Store) -> None:
    requests, order = ForgetRequests(store), []
    first = requests.add(wish_classes(store, ["alarm"], rows=queries(0)))

    def told(request: str, step: str) -> None:
        order.append(request)
        if step == "train slot" and request == first.request.id:
            # Another process asks meanwhile.
            ForgetRequests(store).add(wish_classes(store, ["money"], rows=queries(3)))
            assert requests.status(first.request.id).state == "running"
            assert requests.status(store.requests()[1].id).state == "waiting"

    requests.carry_out(told=told)
    second = store.requests()[1]
    assert store.done(first.request.id) and store.done(second.id)
    assert order == [first.request.id] * order.count(first.request.id) + [second.id] * order.count(second.id)


def test_another_process_that_works_is_waited_for(store: Store) -> None:
    said: list[str] = []
    requests = ForgetRequests(store)
    requests.add(wish_classes(store, ["alarm"], rows=queries(0)))
    with store.held():
        late = threading.Thread(target=lambda: requests.carry_out(say=said.append))
        late.start()
        late.join(timeout=1.0)
        assert late.is_alive() and len(said) == 1
    late.join(timeout=60)
    assert not store.unfinished()


def test_gs_lora_folds_a_class_into_the_adapter_and_keeps_one_adapter(of_run: Store) -> None:
    requests = ForgetRequests(of_run)
    before = of_run.manifest
    record = forget(requests, wish_classes(of_run, ["alarm"], method="gs-lora"))
    now = of_run.manifest
    assert now.adapter != before.adapter and now.files != before.files
    assert [path.name for path in (of_run.directory / "adapters").iterdir()] == [now.adapter]
    assert record["done"]["adapter"] == now.files and record["asked"]["rows_from"] == "run"
    assert record["done"]["trained"]["replay_rows"] == 15 and requests.stage.served.learner.adapted.frame.rank > 2


def test_gs_lora_plus_plus_keeps_the_prototypes_of_the_first_model_without_those_of_what_is_forgotten(
    of_run: Store,
) -> None:
    requests, first = ForgetRequests(of_run), plain(of_run.exported(), of_run.base())
    train = requests.stage.sources.splits.train
    original = Prototypes.of(first, train, classes=len(LABELS))
    shares = {}
    for name, gone in (("alarm", {0}), ("weather", {0, 2})):
        record = forget(requests, wish_classes(of_run, [name], method="gs-lora++"))
        assert record["asked"]["method"] == of_run.manifest.held[-1].method == "gs-lora++"
        (file,) = prototypes_of(of_run)
        kept = Prototypes.load(file)
        assert of_run.manifest.files[file.name] == record["done"]["adapter"][file.name]
        assert kept.known.tolist() == [place not in gone for place in range(len(LABELS))]
        assert not kept.means[sorted(gone)].any() and not kept.spread[sorted(gone)].any()
        # Also after the second request these are the means by the model before the first.
        torch.testing.assert_close(kept.means[kept.known], original.means[kept.known])
        shares[name] = record["measured"]["after"]["forgotten"]
    assert max(shares.values()) < 0.5
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(RunError, match="damaged or replaced"):
        requests.stage.store.exported()


def test_gs_lora_keeps_prototypes_for_a_later_gs_lora_plus_plus(of_run: Store) -> None:
    requests, first = ForgetRequests(of_run), plain(of_run.exported(), of_run.base())
    original = Prototypes.of(first, requests.stage.sources.splits.train, classes=len(LABELS))
    forget(requests, wish_classes(of_run, ["alarm"], method="gs-lora"))
    forget(requests, wish_classes(of_run, ["weather"], method="gs-lora++"))
    (file,) = prototypes_of(of_run)
    torch.testing.assert_close(Prototypes.load(file).means[[1, 3]], original.means[[1, 3]])


def test_what_o3_forgets_between_requests_by_gs_lora_keeps_no_prototype(of_run: Store) -> None:
    requests = ForgetRequests(of_run)
    forget(requests, wish_classes(of_run, ["alarm"], method="gs-lora"))
    for wish, known in (
        (wish_classes(of_run, ["music"]), [False, False, True, True]),
        (wish_examples(of_run, queries(2).take(range(12))), [False, False, False, True]),
    ):
        forget(requests, wish)
        (file,) = prototypes_of(of_run)
        kept = Prototypes.load(file)
        assert kept.known.tolist() == known and not kept.means[~kept.known].any()
        assert of_run.manifest.files.keys() == {path.name for path in file.parent.iterdir()}
    forget(requests, wish_classes(of_run, ["weather"], method="gs-lora++"))
    assert Prototypes.load(*prototypes_of(of_run)).known.tolist() == known


def prototypes_of(store: Store) -> list[Path]:
    return list((store.directory / "adapters" / str(store.manifest.adapter)).glob("prototypes*"))


def test_requests_of_every_kind_and_method_leave_each_other_forgotten(of_run: Store) -> None:
    requests = ForgetRequests(of_run)
    forget(requests, wish_classes(of_run, ["alarm"]))
    some = queries(1).take(range(12))
    forget(requests, wish_examples(of_run, some))
    shares = [requests.stage.served.asked(rows).accuracy(rows) for rows in (queries(0), some)]
    assert max(shares) < 0.5
    forget(requests, wish_classes(of_run, ["weather"], method="gs-lora"))
    record = forget(requests, wish_classes(of_run, ["money"]))
    assert [each.method for each in of_run.manifest.held] == ["o3", "o3", "gs-lora", "o3"]
    for rows in (queries(0), some, queries(2), queries(3)):
        assert requests.stage.served.asked(rows).accuracy(rows) < 0.5
    earlier = record["measured"]["after"]["earlier"]
    assert len(earlier) == 3 and sum(share is not None and share < 0.5 for share in earlier.values()) == 2


def test_a_class_is_forgotten_by_the_runs_own_rows(of_run: Store) -> None:
    requests = ForgetRequests(of_run)
    record = forget(requests, wish_classes(of_run, ["music"]))
    train = requests.stage.sources.splits.train
    assert record["asked"]["rows"] == len(sampled(train, 100, classes={1}, seed=0))
    assert record["measured"]["after"]["forgotten"] < record["measured"]["before"]["forgotten"]


def test_a_step_that_fails_stops_the_request_and_asking_again_begins_it_anew(
    requests: ForgetRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = wish_classes(requests.store, ["alarm"], rows=queries(0))

    def full(stage: Stage, step: str, request: object) -> None:
        if step == "fit detector":
            raise RunError("no space left")
        run(stage, step, request)

    run: Any = Stage.run
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "run", full)
        first = requests.add(wish)
        requests.carry_out()
    status = requests.status(first.request.id)
    assert (status.state, status.why) == ("stopped", "fit detector: no space left")
    assert not requests.store.slot(first.request.id).exists() and not requests.store.manifest.held
    again = requests.add(wish)
    assert again.again and not again.new
    requests.carry_out()
    done = requests.status(first.request.id)
    assert done.state == "done" and done.record is not None and done.record["done"]["attempts"] == 2


def test_an_unforeseen_failure_tells_the_store_its_kind_alone(
    requests: ForgetRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quote(stage: Stage, step: str, request: object) -> None:
        raise ValueError("wake me at noon")

    monkeypatch.setattr(Stage, "run", quote)
    first = requests.add(wish_classes(requests.store, ["alarm"], rows=queries(0)))
    requests.carry_out()
    why = requests.status(first.request.id).why
    assert why is not None and "ValueError" in why and "wake" not in why
    assert b"wake me" not in (requests.store.directory / "requests.sqlite").read_bytes()


# --- Looking ---------------------------------------------------------------------------------------------------------


def test_verify_measures_again(requests: ForgetRequests) -> None:
    record = forget(requests, wish_classes(requests.store, ["alarm"], rows=queries(0)))
    verdict = requests.verify(record["request"])
    assert verdict.good and verdict.measured["forgotten"] < 0.5
    kept = requests.verify(record["request"], rows=queries(0))
    assert kept.good and kept.measured["asked"] == 24


def test_verify_finds_a_model_that_knows_again(requests: ForgetRequests) -> None:
    record = forget(requests, wish_classes(requests.store, ["alarm"], rows=queries(0)))
    manifest = requests.store.directory / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(tree | {"held": []}))
    verdict = requests.verify(record["request"], rows=queries(0))
    assert not verdict.good and len(verdict.broken) == 2
    assert "does not serve" in verdict.broken[0] and "accuracy" in verdict.broken[1]


def test_a_record_that_was_changed_is_refused(requests: ForgetRequests) -> None:
    record = forget(requests, wish_classes(requests.store, ["alarm"], rows=queries(0)))
    path = requests.store.record(record["request"])
    path.write_text(path.read_text().replace('"rows": 24', '"rows": 25'))
    with pytest.raises(RunError, match="signature does not hold"):
        requests.status(record["request"])


def test_nothing_can_be_verified_before_it_is_done(requests: ForgetRequests) -> None:
    accepted = requests.add(wish_classes(requests.store, ["alarm"], rows=queries(0)))
    with pytest.raises(RunError, match="is waiting"):
        requests.verify(accepted.request.id)
    assert [done for _, done in requests.steps(accepted.request)] == [False] * 7
    requests.carry_out()
    assert [done for _, done in requests.steps(accepted.request)] == [True] * 7


def test_a_store_with_nothing_to_measure_by_says_so(bare: Store) -> None:
    requests = ForgetRequests(bare)
    record = forget(requests, wish_classes(bare, [LABELS[1]], rows=queries(1)))
    assert record["measured"]["after"]["utility"] is None and record["measured"]["after"]["forgotten"] < 0.5
    assert requests.verify(record["request"]).measured["forgotten"] is None
