"""The report: complete, escaped, self-contained, quick, and honest about what is not known."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lethe.report import write_report
from lora.errors import RunError

VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.values: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.values += [f"{tag}.{name}={value}" for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.values += [f"{tag}.{name}={value}" for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def outline(path: Path) -> Outline:
    page = Outline()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def words(path: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(outline(path).text))


KINDS = {
    "private": {"private": True, "resumed": 4, "refuse": 0.2},
    "open": {"clients": 10, "labels": 150, "rounds": 20},
    "crowd": {"clients": 120, "rounds": 60, "private": True, "fraction": 0.5, "refuse": 0.02},
    "causal": {"clients": 20, "causal": True},
    "half": {"private": True, "finished": False},
    "two": {"clients": 2, "rounds": 2, "labels": 1, "finished": False},
    "empty": {"rounds": 1, "finished": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_report_nests_and_loads_nothing(make_run, kind: str) -> None:
    path = write_report(make_run(kind, **KINDS[kind]))
    page = outline(path)
    text = path.read_text()
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|<img|<iframe", text)
    assert not [value for value in page.values if re.match(r"\w+\.(src|href|on\w+)=", value)]
    assert "prefers-color-scheme:dark" in text
    assert kind in page.text[0]
    assert not re.search(r'="[^"]*(nan|inf|None)\b', text)
    assert "None" not in re.sub(r"<pre>.*</pre>", "", text, flags=re.DOTALL)


def test_headline_figures(make_run) -> None:
    text = words(write_report(make_run(private=True)))
    assert "Accuracy 87 % 21 % before training; test split" in text
    assert "Epsilon, at most 7.98 delta 1e-05, per example, add/remove one, poisson sampling, simulated" in text
    assert "Sent by a client per round 74 kB plain LoRA would send 148 kB" in text
    assert "Aggregation error 2.4e-08" in text
    assert "Refused replies 0 every reply was used" in text
    assert "The frozen frame A did not change: abababababababab" in text
    assert "10 of 10 rounds" in text


def test_epsilon_comes_with_everything_it_rests_on(make_run) -> None:
    text = words(write_report(make_run(private=True)))
    for fact in (
        "budget 8 ",
        "delta 1e-05",
        "unit example",
        "adjacency add/remove one",
        "sampling Poisson lots",
        "adversary the server and everybody after it",
        "assumption 3 no other release",
        "simulated yes: one machine played all clients",
    ):
        assert fact in text


def test_an_open_run_claims_no_privacy(make_run) -> None:
    text = words(write_report(make_run()))
    assert "Privacy none this run adds no noise and claims no privacy" in text
    assert "rests on" not in text
    assert "Training loss of the clients by round" in text
    assert "Accuracy by client, sorted" in text


def test_a_half_finished_run_reports_what_there_is(make_run) -> None:
    directory = make_run(private=True, finished=False)
    text = words(write_report(directory))
    assert "not finished" in text
    assert "5 of 10 rounds" in text
    assert "validation split, so far" in text
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{100 * last['accuracy']:.3g} %" in text
    assert f"Epsilon, at most {max(last['epsilon'].values()):.4g}" in text


def test_a_run_of_which_only_the_start_is_known(make_run) -> None:
    directory = make_run(finished=False)
    metrics = directory / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    text = words(write_report(directory))
    assert "Accuracy 21 %" in text
    assert "0 of 10 rounds" in text


def test_words_that_privacy_lacks_are_not_made_up(make_run) -> None:
    directory = make_run(private=True)
    metrics = directory / "metrics.jsonl"
    start, *rest = metrics.read_text().splitlines()
    metrics.write_text("\n".join([json.dumps(json.loads(start) | {"privacy": None}), *rest]))
    text = words(write_report(directory))
    assert "unit (not recorded)" in text
    assert "Epsilon, at most 7.98" in text


def test_refused_replies_are_named_and_explained(make_run) -> None:
    directory = make_run(clients=30, refuse=0.3)
    path = write_report(directory)
    text = words(path)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    refused = [(line["round"], each) for line in lines if line["kind"] == "round" for each in line["refused"]]
    assert len(refused) > 20
    assert f"Refused replies {len(refused)} " in text
    rows = re.findall(r"<tr><td>(\d+)</td><td>(\d+)</td><td>([a-z]+)</td><td>(.*?)</td></tr>", path.read_text())
    assert [(int(n), client, reason) for n, client, reason, _ in rows] == [
        (number, each["client"], each["reason"]) for number, each in refused
    ]
    assert {detail for *_, detail in rows} == {"&lt;b&gt;odd&lt;/b&gt;"}
    assert "missing: no reply before the round&#x27;s timeout" in path.read_text()


def test_causal_models_show_next_token_accuracy_and_perplexity(make_run) -> None:
    text = words(write_report(make_run(causal=True)))
    assert "Next-token accuracy 87 %" in text
    assert "Perplexity 1.568 5.003 before training; loss 0.45 nats per token" in text


def test_names_from_data_are_escaped(make_run) -> None:
    text = write_report(make_run()).read_text()
    assert "label &lt;0&gt; &amp; co" in text
    assert "label <0>" not in text


def test_few_labels_are_colours_and_many_a_heat_map(make_run) -> None:
    few, many = (words(write_report(make_run(str(n), labels=n))) for n in (8, 150))
    assert "Examples by client and label" in few
    assert "Share of every label" not in few
    assert "Share of every label in a client's examples" in many
    assert "The 40 most frequent of 150 labels." in many


def test_a_changed_frame_is_not_passed_over(make_run) -> None:
    directory = make_run()
    summary = json.loads((directory / "summary.json").read_text()) | {"frame_digest_end": "cd" * 32}
    (directory / "summary.json").write_text(json.dumps(summary))
    assert "CHANGED, which must never happen: abababababababab became cdcdcdcdcdcdcdcd" in words(
        write_report(directory)
    )


def test_a_crowd_stays_readable_small_and_quick(make_run) -> None:
    directory = make_run(clients=2000, rounds=100, labels=150, fraction=0.2, refuse=0.01)
    began = time.process_time()
    path = write_report(directory)
    assert time.process_time() - began < 3
    assert path.stat().st_size < 2_000_000
    text = words(path)
    assert "The first 200 of 2000 clients." in text
    assert "200 of 2000 clients, evenly spaced in this order." in text


def test_the_report_is_replaced_as_a_whole(make_run) -> None:
    directory = make_run()
    (directory / "report.html").write_text("old")
    write_report(directory)
    assert (directory / "report.html").read_text().endswith("</html>\n")
    assert not list(directory.glob("*.part"))


def test_a_directory_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)
