"""Runs as the console shows them: figures and curves of the report, and nothing outside the folder."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from lethe.record import read_record
from lethe.report import headline, write_report
from lethe.shown_runs import ShownRuns
from server.console.pages import STATIC

PRIVACY = {"epsilon_budget": 8.0, "delta": 1e-4, "unit": "example", "adjacency": "add/remove", "sampling": "poisson"}


def line(number: int) -> dict[str, Any]:
    return {"kind": "round", "round": number, "accuracy": 0.2 * number, "loss": 1.0 / number,
            "epsilon": {"a": float(number), "<b>": number / 2}, "accepted": ["a", "<b>"], "refused": []}  # fmt: skip


def write_run(directory: Path, *, rounds: int = 3, finished: bool = True) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("kind: federation # not personal\nfederation:\n  rounds: 3\n")
    start = {"kind": "start", "accuracy": 0.1, "privacy": PRIVACY, "clients": [{"client": "<b>", "examples": 3}]}
    lines = [start, *(line(number) for number in range(1, rounds + 1))]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if finished:
        summary = {"name": "<i>x</i>", "accuracy_final": 0.61, "epsilon_max": 3.0, "wall_s": 12.0}
        (directory / "summary.json").write_text(json.dumps(summary))
        write_report(directory)
    return directory


def test_a_run_has_its_reports_figures_and_both_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "one")
    shown = ShownRuns(tmp_path / "runs").shown("one")
    assert shown.finished and shown.report and not shown.fault
    assert [*shown.figures] == headline(read_record(run))
    assert ("Epsilon, at most", "3") in [each[:2] for each in shown.figures]
    accuracy, epsilon = shown.charts
    assert "Accuracy on the validation split" in accuracy and "budget 8" in epsilon
    assert all(chart in (run / "report.html").read_text() for chart in shown.charts)


def test_charts_use_classes_that_the_console_draws(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    drawn = " ".join(ShownRuns(tmp_path).shown("one").charts)
    used = {name for group in re.findall(r'class="([^"]+)"', drawn) for name in group.split()}
    style = (STATIC / "console.css").read_text()
    assert used and {name for name in used if not re.search(rf"\.{name}\b", style)} == set()
    assert " style=" not in drawn and "<script" not in drawn


def test_runs_are_listed_latest_first_and_personal_ones_are_not(tmp_path: Path) -> None:
    for place, name in enumerate(("old", "new")):
        write_run(tmp_path / name, finished=False)
        os.utime(tmp_path / name / "metrics.jsonl", (1000 + place, 1000 + place))
    personal = write_run(tmp_path / "mine")
    (personal / "config.yaml").write_text("kind: personal\n")
    (tmp_path / "no-run").mkdir()
    runs = ShownRuns(tmp_path)
    assert runs.names() == ["new", "old"] and runs.place == f"{tmp_path}/"
    assert not runs.shown("new").finished and not runs.shown("new").report
    assert ShownRuns(tmp_path / "nowhere").names() == []


@pytest.mark.parametrize(
    "damage", ["", "{\n{}\n", '{"kind": "round"}\n', '{"kind": "start", "clients": 7}\n', "[]\n1\n"]
)
def test_a_damaged_run_says_so_and_hides_no_other(tmp_path: Path, damage: str) -> None:
    write_run(tmp_path / "whole")
    run = write_run(tmp_path / "broken", finished=False)
    (run / "metrics.jsonl").write_text(damage)
    runs = ShownRuns(tmp_path)
    assert sorted(runs.names()) == ["broken", "whole"] and runs.shown("whole").charts
    shown = runs.shown("broken")
    assert shown.fault or not shown.charts


def test_only_listed_reports_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "outside")
    runs = ShownRuns(tmp_path / "runs")
    assert "<!doctype html>" in str(runs.report("one"))
    assert [runs.report(name) for name in ("../outside", "/etc", "", ".", "two", "one/.")] == [None] * 6
