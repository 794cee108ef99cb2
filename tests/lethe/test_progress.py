"""Progress: a bar on a terminal, plain lines elsewhere, and the terminal left in order."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from lethe.progress import Progress, outcome_lines, round_line


def test_a_round_in_one_line_leaves_out_what_is_not_known() -> None:
    assert round_line({"round": 3}, rounds=12) == "round  3/12  0 of 0 clients  0.0 s"
    full = {
        "round": 3,
        "selected": ["0", "1", "2", "3", "4", "5"],
        "accepted": ["0", "1"],
        "refused": [{"client": str(i), "reason": "missing"} for i in range(2, 6)],
        "seconds": {"train": 1.0, "evaluate": 0.26},
        "accuracy": 0.8123,
        "loss": 0.63219,
        "epsilon": {"0": 1.0, "1": 3.21456},
    }
    assert round_line(full, rounds=5) == (
        "round 3/5  2 of 6 clients  accuracy 81.2%  loss 0.6322  epsilon 3.215  1.3 s  "
        "refused: 2 (missing), 3 (missing), 4 (missing) and 1 more"
    )


def test_an_open_run_says_nothing_of_privacy() -> None:
    assert outcome_lines({"accuracy_final": 0.5, "rounds": 2, "epsilon_max": None}) == ["accuracy 50.0% after 2 rounds"]


def test_a_terminal_gets_a_bar_that_is_gone_afterwards(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with pytest.raises(RuntimeError), Progress(rounds=2, console=console) as progress:
        progress.started(tmp_path, ["a [bold]decision[/bold]"])
        progress.round_done({"round": 1})
        raise RuntimeError
    text = screen.getvalue()
    assert "a [bold]decision[/bold]" in text
    assert "round 1/2" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_places_are_named_when_they_exist(tmp_path: Path) -> None:
    screen = io.StringIO()
    (tmp_path / "report.html").touch()
    (tmp_path / "ledger.sqlite").touch()
    Progress(rounds=1, console=Console(file=screen, width=40)).finished({"adapter_path": "/nowhere"}, tmp_path)
    assert screen.getvalue().splitlines() == [
        f"report   {tmp_path / 'report.html'}",
        f"ledger   {tmp_path / 'ledger.sqlite'}",
    ]
