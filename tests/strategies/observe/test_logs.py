import json
import logging
from datetime import UTC, datetime, timedelta
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest

from lora.errors import BudgetExceeded, ConfigError, DataError, LetheError
from strategies.observe.logs import (
    FILE_BYTES,
    FILE_VARIABLE,
    FILES,
    LOG_VARIABLE,
    ROOTS,
    described,
    event,
    structured,
)

SECRET = "patient 4711 has the flu"
log = logging.getLogger("lethe.test")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def caught(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        if cause is not None:
            raise error from caught(cause)
        raise error
    except type(error) as found:
        return found


def test_an_event_is_one_line_of_json_with_its_time_in_utc(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "server.jsonl"
    with structured(file=file, run="first", engine="deployment") as on:
        assert on
        event("round", round=3, seconds=1.5, bytes_up=4, epsilon=2.0, delta=1e-5)
        event("refused", level=logging.WARNING, client="node-1", reason="nan")
    first, second = lines(file.read_text())
    assert datetime.now(UTC) - datetime.fromisoformat(first.pop("time")) < timedelta(minutes=1)
    assert first == {
        "level": "info",
        "logger": "lethe.events",
        "event": "round",
        "run": "first",
        "engine": "deployment",
        "round": 3,
        "seconds": 1.5,
        "bytes_up": 4,
        "epsilon": 2.0,
        "delta": 1e-5,
    }
    assert second["time"].endswith("+00:00")
    assert (second["level"], second["client"], second["reason"]) == ("warning", "node-1", "nan")


def test_fields_outside_the_list_are_left_out_and_infinite_figures_are_null(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    with structured(file=file):
        event("round", texts=[SECRET], loss=float("nan"))  # type: ignore[call-arg]
        log.info("plain", extra={"text": SECRET})
    assert SECRET not in file.read_text()
    assert lines(file.read_text())[0]["loss"] is None


def test_the_message_of_a_foreign_exception_is_in_no_line(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    with structured(file=file):
        try:
            float(SECRET)
        except ValueError as error:
            log.exception("a message could not be handled")
            log.warning("given up: %s", error)
            log.warning("given up: %(why)s", {"why": error})
            log.error(error)
    assert SECRET not in file.read_text()
    first, *others = lines(file.read_text())
    assert first["exception"]["type"] == "ValueError"
    assert [place.rpartition(":")[0] for place in first["exception"]["at"]] == ["tests/strategies/observe/test_logs.py"]
    assert [each["event"] for each in others] == ["given up: ValueError"] * 2 + ["ValueError"]


@pytest.mark.parametrize("error", [BudgetExceeded("epsilon 3 of 2"), ConfigError("no such key"), LetheError("moved")])
def test_the_message_of_lethe_s_own_errors_is_told(error: LetheError) -> None:
    assert described(caught(error))["message"] == str(error)


def test_an_error_about_data_is_told_without_its_words_because_they_quote_the_row() -> None:
    told = described(caught(DataError(f"label '{SECRET}' is not among the labels")))
    assert told.keys() == {"type", "at"}


def test_causes_are_told_by_the_same_rule() -> None:
    told = described(caught(ConfigError("the file is wrong"), cause=ValueError(SECRET)))
    assert told["message"] == "the file is wrong"
    assert told["cause"].keys() == {"type", "at"}
    assert SECRET not in json.dumps(told)


def test_a_suppressed_context_and_an_endless_chain_are_left_out() -> None:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError:
            raise LetheError("mended") from None
    except LetheError as error:
        assert "cause" not in described(error)
    circular = caught(ValueError("a"))
    circular.__context__ = circular
    assert json.dumps(described(circular)).count('"type"') == 5


def test_nothing_else_prints_what_the_lines_leave_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with structured(file=tmp_path / "log.jsonl"):
        try:
            raise ValueError(SECRET)
        except ValueError:
            for root in ROOTS:
                logging.getLogger(root).exception("failed")
    assert SECRET not in caplog.text
    assert capfd.readouterr() == ("", "")
    assert len(lines((tmp_path / "log.jsonl").read_text())) == len(ROOTS)


def test_json_without_a_file_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LOG_VARIABLE, "json")
    with structured(run="first"):
        event("begun")
    (line,) = lines(capsys.readouterr().err)
    assert (line["event"], line["run"]) == ("begun", "first")


def test_without_a_wish_nothing_changes_and_events_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    before = [(logging.getLogger(root).handlers[:], logging.getLogger(root).propagate) for root in ROOTS]
    with structured() as on:
        assert not on
        event("refused", level=logging.ERROR, reason="nan")
        assert [(logging.getLogger(root).handlers[:], logging.getLogger(root).propagate) for root in ROOTS] == before
    assert capfd.readouterr() == ("", "")


def test_loggers_are_left_as_they_were_found(tmp_path: Path) -> None:
    before = [vars(logging.getLogger(root)).copy() | {"_cache": None} for root in ROOTS]
    with structured(file=tmp_path / "log.jsonl"):
        assert all(not logging.getLogger(root).propagate for root in ROOTS)
    assert [vars(logging.getLogger(root)).copy() | {"_cache": None} for root in ROOTS] == before


def test_a_logger_that_prints_on_its_own_account_does_so_no_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printing, handler = logging.getLogger("lethe.server"), logging.StreamHandler()
    printing.addHandler(handler)
    try:
        with structured(file=tmp_path / "log.jsonl"):
            printing.warning("once")
        assert (capsys.readouterr().err, len(lines((tmp_path / "log.jsonl").read_text()))) == ("", 1)
        assert printing.handlers == [handler]
    finally:
        printing.removeHandler(handler)


@pytest.mark.parametrize(
    ("asked", "form", "file", "expected"),
    [
        (None, "json", False, "stream"),
        (None, "json", True, "file"),
        ("json", "text", True, "file stream"),
        ("text", "json", True, "file"),
        ("text", "json", False, ""),
    ],
)
def test_lines_go_where_they_are_asked_for(
    *,
    asked: str | None,
    form: str,
    file: bool,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if asked:
        monkeypatch.setenv(LOG_VARIABLE, asked)
    path = tmp_path / "log.jsonl"
    with structured(form=form, file=path if file else None):
        event("begun")
    found = {"stream": '"begun"' in capsys.readouterr().err, "file": path.exists() and '"begun"' in path.read_text()}
    assert " ".join(sorted(name for name, there in found.items() if there)) == expected


def test_the_environment_s_file_wins_and_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "theirs.jsonl"))
    with structured(form="text", file=tmp_path / "ours.jsonl"):
        (handler,) = logging.getLogger("lethe").handlers
        assert isinstance(handler, RotatingFileHandler)
        assert (handler.maxBytes, handler.backupCount) == (FILE_BYTES, FILES)
        event("begun")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.jsonl"]


def test_a_file_that_cannot_be_opened_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with structured(file=tmp_path / "file" / "log.jsonl") as on:
        assert on
        event("begun")
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("{")]
    assert json.loads(line)["event"] == "begun"


def test_an_unknown_form_is_an_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_VARIABLE, "jsn")
    with pytest.raises(ConfigError, match=r"LETHE_LOG=jsn: .* did you mean 'json'"), structured():
        pass
