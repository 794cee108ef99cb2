"""`lethe personalize`: its figures hang together, its adapter loads, and mistakes leave nothing behind."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, roc_auc_score
from transformers import AutoModelForCausalLM

from lethe.cli import main
from lethe.progress import SINGLE_UNTRAINED, UNTRAINED, personal_lines
from lethe.report import write_report
from strategies.personal.comparison import Comparison
from tests.ratings import LITTLE, write_ratings

ARMS = ["MF", "recommender", "stack", "single-lora", "uniform-gate", "reclora", "stack-with-reclora"]
ASKED_FOR = (
    *("auc_recommender", "auc_single_lora", "auc_reclora", "auc_stack", "auc_stack_with_reclora", "ndcg10_recommender"),
    *("ndcg10_reclora", "gate_entropy", "swap_auc_drop", "users", "seeds"),
)


class Played:
    def __init__(self, place: Path, out: str, logits: dict[str, np.ndarray], labels: np.ndarray) -> None:
        self.place, self.out, self.logits, self.labels = place, out, logits, labels
        self.run = place / "runs" / "little"
        self.summary: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        self.lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The recipe on a little copy of MovieLens, two seeds, and what every arm said."""
    place = tmp_path_factory.mktemp("personal")
    data = write_ratings(place / "data")
    kept: list[Comparison] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run = Comparison.run

        def spied(self: Comparison, *given: Any, **named: Any) -> Any:
            kept.append(self)
            return run(self, *given, **named)

        patch.setattr(Comparison, "run", spied)
        capture: list[str] = []
        patch.setattr("lethe.progress.Progress._print", lambda self, line: capture.append(line))
        more = ["comparison.seeds=2", "comparison.arms=[uniform-gate]", "comparison.show_user=7", "name=little"]
        assert main(["personalize", "movielens", f"ratings.path={data}", *LITTLE, *more]) == 0
    logits = {name: np.stack(each.logits) for name, each in kept[0].found.items()}
    return Played(place, "\n".join(capture), logits, kept[0].asked.labels)


def test_the_summary_has_what_was_asked_for(played: Played) -> None:
    summary = played.summary
    assert [key for key in ASKED_FOR if not math.isfinite(summary[key])] == []
    assert (summary["users"], summary["seeds"], summary["user_shown"]) == (30, 2, "7")
    assert [each["name"] for each in summary["arms"]] == ARMS
    assert 0 <= summary["gate_entropy_share"] <= 1
    assert summary["gate_entropy"] == pytest.approx(summary["gate_entropy_share"] * math.log(3))
    assert sum(summary["gate_usage"]) == pytest.approx(1)


def test_figures_are_scikit_learns_over_seeds(played: Played) -> None:
    for name, logits in played.logits.items():
        aucs, rights = zip(*((roc_auc_score(played.labels, row), accuracy_score(played.labels, row > 0))
                             for row in logits), strict=True)  # fmt: skip
        for figure, each in (("auc", aucs), ("accuracy", rights)):
            key = f"{figure}_{name.lower().replace('-', '_')}"
            assert played.summary[key] == pytest.approx(np.mean(each))
            assert played.summary[f"{key}_spread"] == pytest.approx(np.std(each, ddof=1), abs=1e-9)


def test_differences_are_those_of_the_table_and_inside_their_intervals(played: Played) -> None:
    aucs = {each["name"]: each["auc"] for each in played.summary["arms"]}
    pairs = {(each["one"], each["other"]): each for each in played.summary["differences"]}
    assert [*pairs] == [("reclora", "single-lora"), ("reclora", "recommender"), ("stack-with-reclora", "stack")]
    for (one, other), each in pairs.items():
        assert each["value"] == pytest.approx(aucs[one] - aucs[other])
        assert each["low"] <= each["high"]


def test_the_single_lora_trains_at_least_as_much_and_hardly_more(played: Played) -> None:
    numbers = {each["name"]: each["numbers"] for each in played.summary["arms"] if each["numbers"]}
    assert 1 <= numbers["single-lora"] / numbers["reclora"] < 1.1


def test_the_metrics_hold_every_part_and_the_terminal_says_it(played: Played) -> None:
    arms = [line for line in played.lines if line["kind"] == "arm"]
    assert [line["name"] for line in arms] == ARMS * 2
    assert [line["seed"] for line in arms] == [0] * len(ARMS) + [1] * len(ARMS)
    assert all(len(line["curve"]) == 3 for line in arms if line["name"] in ("single-lora", "uniform-gate", "reclora"))
    for line in arms:
        assert f"seed {line['seed']}  {line['name']}  AUC {line['auc']:.4f}" in played.out
    for name in ("adapter", "report", "metrics"):
        assert re.search(rf"^{name} +runs/little/{name}", played.out, flags=re.M)
    assert played.lines[0]["kind"] == "start" and played.lines[-1]["kind"] == "end"


def test_adapters_that_stay_at_their_start_are_said_to(played: Played) -> None:
    starts = [np.argmin(line["curve"]) == 0 for line in played.lines if line.get("name") == "reclora"]
    assert played.summary["untrained"] == all(starts)
    assert (UNTRAINED in played.out) == all(starts)
    lines = personal_lines(played.summary | {"untrained": True})
    for kept in (0, 1):
        told = personal_lines(played.summary | {"kept_epoch_single_lora": kept})
        assert any(SINGLE_UNTRAINED in line for line in told) == (kept == 0)
    assert lines[-1] == f"kept     {UNTRAINED}" and len(lines) == 1 + len(
        personal_lines(played.summary | {"untrained": False})
    )


def test_the_planned_parts_are_those_that_are_played(played: Played) -> None:
    from lethe.config import load_personal_run
    from lethe.personal_run import _planned

    run = load_personal_run(played.run / "config.yaml")
    assert _planned(run) == sum(line["kind"] in ("fitted", "arm", "ranked") for line in played.lines)


def test_the_users_adapter_loads_in_peft_with_the_base_beside_it(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(played.place)
    config = json.loads((played.run / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    adapted = PeftModel.from_pretrained(base, played.run / "adapter")
    assert adapted.peft_config["default"].r == 2
    weights = load_file(played.run / "adapter" / "meta" / "personal.safetensors")
    assert weights["meta.b"].shape[0] == 3
    answering = json.loads((played.run / "adapter" / "answering.json").read_text())
    assert {"offset", "language", "bias"} <= answering.keys()


# --- The report ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag == "svg":
            self.pictures.append(str(dict(attrs)["aria-label"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("rect", "line", "polyline", "polygon", "circle")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_shows_arms_curves_and_the_user_in_pictures(played: Played) -> None:
    text = (played.run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    for start in (
        "Difference of AUC",
        "Log loss on validation rows",
        "History: the last",
        "Recommended with personalisation",
        "Recommended without",
        "Weight of every meta-LoRA in this user",
        "Mean weight over the matrices",
    ):
        assert sum(label.startswith(start) for label in page.pictures) == 1, start
    assert ("All are still zero" in text) == played.summary["untrained"]
    assert "prefers-color-scheme:dark" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    (portrait,) = [line for line in played.lines if line["kind"] == "portrait"]
    for event in portrait["history"]:
        assert f"{event['title']}: {event['rating']:g}" in text
    for matrix, row in zip(portrait["matrices"], portrait["weights"], strict=True):
        assert sum(row) == pytest.approx(1, abs=1e-3), matrix


def test_the_report_is_written_anew_from_files_and_of_a_run_that_stopped(played: Played, tmp_path: Path) -> None:
    whole = (played.run / "report.html").read_text()
    assert write_report(played.run).read_text() == whole
    for name in ("config.yaml", "metrics.jsonl"):
        lines = (played.run / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines if name == "config.yaml" else lines[:9]))
    page = Page(write_report(tmp_path).read_text())
    assert page.open == []
    assert not any(label.startswith("Difference") for label in page.pictures)


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["comparison.show_user=user-03"], "comparison.show_user: unknown user 'user-03'; did you mean 'user-"),
        (["ratings.path=nowhere"], "ratings.path: "),
        (["ratings.like_from=5", "ratings.path=DATA"], "likes in"),
        (["comparison.arms=[uniform-gat]"], "unknown variant 'uniform-gat'; did you mean 'uniform-gate'?"),
        (["comparison.arms=[reclora-own]"], "unknown variant 'reclora-own'; did you mean 'reclora-"),
        (["personal.show_user=3"], "personal.show_user: there is no such key; did you mean 'comparison.show_user'?"),
        (["comparison.recommenders=[MF, DINN]"], "did you mean 'DIN'?"),
        (["comparison.routers=[DIN]", "comparison.recommenders=[MF]"], "DIN scores or routes and is no member"),
        (["personal.gate=uniform"], "personal.gate=uniform: nothing would be personal"),
        (["lr=3"], "did you mean 'personal.rate'?"),
        (["model.path=nowhere"], "model.path"),
        (["name=taken"], "runs/taken exists already; choose another name=…"),
    ],
)
def test_a_mistake_is_named_and_leaves_nothing_behind(
    overrides: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    if "ratings.path=DATA" in overrides:
        data = write_ratings(tmp_path / "data")
        ratings = (data / "ratings.csv").read_text().splitlines()
        ratings = [line.replace(",5.0,", ",4.5,") for line in ratings]
        (data / "ratings.csv").write_text("\n".join(ratings))
        overrides = [each.replace("DATA", str(data)) for each in overrides]
    assert main(["personalize", "movielens", *overrides]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert words in message
    assert [each.name for each in (tmp_path / "runs").iterdir()] == ["taken"]


def test_each_command_refuses_the_other_kind(
    played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(played.place)
    for command, words in (
        (["simulate", "movielens"], "it is for `lethe personalize`"),
        (["personalize", "quickstart"], "it is for `lethe simulate`"),
        (["resume", "little"], "a personal run, which cannot be resumed"),
    ):
        assert main(command) == 2
        assert words in " ".join(capsys.readouterr().err.split())
