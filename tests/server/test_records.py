"""Metrics and summary: whole lines only, whatever happens while they are written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import server.records
from lora.errors import RunError
from server.records import METRICS, SUMMARY, Records


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]


def test_records_are_lines_in_order_and_listeners_hear_them(tmp_path: Path) -> None:
    records, heard = Records(tmp_path), list[dict[str, Any]]()
    records.listeners.append(heard.append)
    records.write("start", accuracy=0.5)
    records.write("round", round=1, selected=["0", "ä"])
    assert lines(tmp_path) == heard
    assert [(line["kind"], line.get("round")) for line in heard] == [("start", None), ("round", 1)]
    assert all(isinstance(line["time"], float) for line in heard)


@pytest.mark.parametrize("torn", ['{"kind": "rou', '{"kind": "round", "round": 2}', "\x00\x00"])
def test_a_line_that_a_kill_cut_short_is_dropped_by_the_next(tmp_path: Path, torn: str) -> None:
    Records(tmp_path).write("round", round=1)
    with (tmp_path / METRICS).open("a") as file:
        file.write(torn)
    assert Records(tmp_path).rounds() == {1}
    Records(tmp_path).write("resumed", round=1)
    assert [line["kind"] for line in lines(tmp_path)] == ["round", "resumed"]


def test_rounds_names_the_rounds_that_have_a_line(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.rounds() == set()
    for number in (1, 2, 2, 5):
        records.write("round", round=number)
    records.write("resumed", round=7)
    assert records.rounds() == {1, 2, 5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(tmp_path: Path, value: float) -> None:
    Records(tmp_path).write("round", loss=value, update_norm={"0": value, "1": 1.5}, pair=(1, value))
    Records(tmp_path).summarise({"loss_final": value, "rounds": 3})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    line = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert (line["loss"], line["update_norm"], line["pair"]) == (None, {"0": None, "1": 1.5}, [1, None])
    assert json.loads((tmp_path / SUMMARY).read_text(), parse_constant=refuse) == {"loss_final": None, "rounds": 3}


def test_a_directory_that_is_gone_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    records = Records(tmp_path / "gone")
    with pytest.raises(RunError, match=r"metrics\.jsonl.*resume"):
        records.write("round", round=1)
    with pytest.raises(RunError, match=r"summary\.json.*resume"):
        records.summarise({"rounds": 1})


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path)
    records.summarise({"rounds": 1})

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(RunError, match="No space left"):
        records.summarise({"rounds": 2})
    assert json.loads((tmp_path / SUMMARY).read_text()) == {"rounds": 1}
    assert [path.name for path in tmp_path.iterdir()] == [SUMMARY]


def test_a_full_disk_takes_back_the_part_of_a_line(tmp_path: Path) -> None:
    """A limit on the file's size, set in a process of its own, is a disk that fills up within a line."""
    import subprocess
    import sys

    code = f"""
import resource, signal
from pathlib import Path
from lora.errors import RunError
from server.records import Records
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
records = Records(Path({str(tmp_path)!r}))
records.write("round", round=1, text="x" * 300)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
try:
    records.write("round", round=2, text="y" * 5000)
except RunError as error:
    print(error)
"""
    root = Path(server.records.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "make room and resume" in done.stdout
    assert [line["round"] for line in lines(tmp_path)] == [1]


def test_watchers_hear_also_what_is_only_told(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    watched: list[dict[str, Any]] = []
    records = Records(tmp_path)
    records.listeners.append(heard.append)
    records.watchers.append(watched.append)
    records.tell("roster", online=3)
    records.write("round", round=1)
    assert [record["kind"] for record in heard] == ["round"]
    assert [record["kind"] for record in watched] == ["roster", "round"]
    assert watched[0]["online"] == 3
    assert watched[0]["time"] > 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
