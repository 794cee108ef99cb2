"""A run directory is read as it was left: finished, resumed, or cut off in the middle of a line."""

import json
import os
from pathlib import Path

import pytest

from lethe.record import find_run, latest_ledger, natural, read_record
from lora.errors import RunError


def test_a_run_is_found_by_name_and_by_path(make_run, tmp_path: Path) -> None:
    directory = make_run("first")
    assert find_run("first", root=tmp_path / "runs") == directory
    assert find_run(str(directory), root=tmp_path / "elsewhere") == directory


def test_of_a_round_that_was_repeated_the_last_counts(make_run) -> None:
    record = read_record(make_run(resumed=4))
    assert [line["round"] for line in record.rounds] == list(range(1, 11))
    assert record.rounds[3]["accuracy"] == 0.5
    assert record.resumed == (4,)


def test_a_last_line_that_was_cut_off_is_left_out(make_run) -> None:
    directory = make_run(finished=False)
    metrics = directory / "metrics.jsonl"
    whole = read_record(directory)
    metrics.write_text(metrics.read_text() + '{"kind": "round", "rou')
    assert read_record(directory).rounds == whole.rounds
    assert not whole.finished
    assert (whole.done, whole.planned) == (5, 10)


@pytest.mark.parametrize("damage", ["{", "[1]", "3", "null"])
def test_a_damaged_line_inside_is_named(make_run, damage: str) -> None:
    metrics = make_run() / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:2], damage, *lines[2:]]))
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 3: not a JSON object"):
        read_record(metrics.parent)


def test_a_damaged_summary_is_named(make_run) -> None:
    directory = make_run()
    (directory / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"summary\.json: not a JSON object; `lethe resume first`"):
        read_record(directory)


def test_epsilon_is_carried_over_rounds_without_the_client(tmp_path: Path) -> None:
    lines = [{"kind": "round", "round": 1, "epsilon": {"0": 1.0, "1": 1.5}}]
    lines += [{"kind": "round", "round": 2, "epsilon": {"1": 2.0}}, {"kind": "round", "round": 3}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = read_record(tmp_path)
    assert record.epsilon_by_round() == [(n, {"0": 1.0, "1": 2.0 if n > 1 else 1.5}) for n in (1, 2, 3)]
    assert record.epsilon == {"0": 1.0, "1": 2.0}


def test_privacy_that_the_start_does_not_mention_is_taken_from_the_run_file(make_run) -> None:
    directory = make_run(private=True)
    metrics = directory / "metrics.jsonl"
    start, *rest = metrics.read_text().splitlines()
    bare = {key: value for key, value in json.loads(start).items() if key not in ("privacy", "clients")}
    metrics.write_text("\n".join([json.dumps(bare), *rest]))
    record = read_record(directory)
    assert record.privacy == {"epsilon_budget": 8.0, "delta": 1e-5, "sampling": "poisson"}
    assert record.clients == ["0", "1", "2", "3"]


def test_a_run_without_privacy_claims_none(make_run) -> None:
    assert read_record(make_run()).privacy is None


def test_the_latest_ledger_is_the_one_charged_last(make_run, tmp_path: Path) -> None:
    for name, age in {"old": 1, "new": 3, "middle": 2}.items():
        ledger = make_run(name) / "ledger.sqlite"
        ledger.touch()
        os.utime(ledger, (0, age))
    assert latest_ledger(root=tmp_path / "runs").parent.name == "new"


def test_numbered_clients_sort_by_number() -> None:
    assert sorted(["10", "b", "2", "a1"], key=natural) == ["2", "10", "a1", "b"]
