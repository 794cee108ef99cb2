"""A run's report: one HTML file made from the run directory alone, readable offline, finished or not."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lethe import plots
from lethe.page import document, duration, grid, header, settings_of, table, tile_list
from lethe.personal_report import personal_page
from lethe.plots import Format, Level, Series, percent, plain, size
from lethe.record import RunRecord, natural, read_record

_REASONS = {
    "missing": "no reply before the round's timeout",
    "error": "the client failed",
    "nan": "the update holds values that are not finite",
    "shape": "the update has the wrong length",
    "digest": "the client holds another frame A or layout",
    "declined": "the client declined, such as for too few examples",
    "budget": "the step would pass the client's privacy budget",
}
_LABELS = 40
_BARS = 200
_ROWS = 500


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from its own files, and return its path.

    Raises RunError when the run has no metrics yet, or when they are damaged.
    """
    record = read_record(run_dir)
    text = personal_page(record) if record.personal else page(record)
    path = run_dir / "report.html"
    aside = path.with_name("report.html.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path


def page(record: RunRecord) -> str:
    """Return the whole page."""
    name = str(record.summary.get("name") or record.directory.name)
    sections = [
        ("Quality", _quality(record)),
        ("Privacy", _privacy(record)),
        ("Traffic", _traffic(record)),
        ("Clients", _clients(record)),
        ("Refused replies", _refused(record)),
        ("Time", _time(record)),
        ("The run file, all defaults filled in", settings_of(record.config)),
    ]
    return document(name, _header(name, record) + tile_list(headline(record)), sections, footer=_footer(record))


def _header(name: str, record: RunRecord) -> str:
    return header(name, facts(record), finished=record.finished)


def facts(record: RunRecord) -> list[str]:
    """Return what the run is, in few words each."""
    settings = record.settings
    found = [
        record.summary.get("strategy") or settings.get("federation", {}).get("strategy"),
        record.summary.get("model") or settings.get("model", {}).get("path") or settings.get("model", {}).get("name"),
        f"{len(record.clients)} clients" if record.clients else None,
        f"{record.done} of {record.planned or record.done} rounds",
        f"engine {record.start['engine']}" if record.start.get("engine") else None,
    ]
    return [str(fact) for fact in found if fact]


# --- Headline figures ------------------------------------------------------------------------------------------------


def headline(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return the headline figures: name, value, note."""
    tiles = [_accuracy_tile(record), *_loss_tile(record), _privacy_tile(record), *_traffic_tile(record)]
    tiles += _aggregation_tile(record)
    tiles.append(("Refused replies", str(len(record.refused)), _reason_counts(record) or "every reply was used"))
    if record.summary.get("wall_s") is not None:
        tiles.append(("Time", duration(record.summary["wall_s"]), f"{record.done} rounds"))
    return tiles


def _accuracy_tile(record: RunRecord) -> tuple[str, str, str]:
    final, start = _final(record, "accuracy"), _start(record, "accuracy")
    name = "Next-token accuracy" if record.causal else "Accuracy"
    before = f"{percent(start)} before training; " if start is not None else ""
    return name, percent(final) if final is not None else "-", f"{before}{_split(record)}"


def _loss_tile(record: RunRecord) -> list[tuple[str, str, str]]:
    loss, start = _final(record, "loss"), _start(record, "loss")
    if loss is None or not math.isfinite(loss):
        return []
    if not record.causal:
        before = f"{plain(start)} before training; " if start is not None else ""
        return [("Loss", plain(loss), f"{before}cross-entropy in nats, {_split(record)}")]
    before = f"{_perplexity(start)} before training; " if start is not None else ""
    return [("Perplexity", _perplexity(loss), f"{before}loss {plain(loss)} nats per token, {_split(record)}")]


def _final(record: RunRecord, key: str) -> float | None:
    """Return the figure on the test split; of a run that is not finished, the last on the validation split."""
    return _first(record.end.get(f"{key}_final"), record.summary.get(f"{key}_final"), record.latest(key))


def _start(record: RunRecord, key: str) -> float | None:
    """Return the figure before training, on the same split as the final one."""
    if not record.finished:
        return _first(record.start.get(key))
    return _first(record.summary.get(f"{key}_initial"), record.start.get(f"test_{key}"), record.start.get(key))


def _split(record: RunRecord) -> str:
    return "test split" if record.finished else "validation split, so far"


def _perplexity(loss: float) -> str:
    return plain(math.exp(loss)) if loss < 700 else "∞"


def _privacy_tile(record: RunRecord) -> tuple[str, str, str]:
    privacy = record.privacy
    if not privacy:
        return "Privacy", "none", "this run adds no noise and claims no privacy"
    spent = _first(record.summary.get("epsilon_max"), max(record.epsilon.values(), default=None))
    stated = [
        f"delta {_said(privacy, 'delta')}, per {_said(privacy, 'unit')}",
        _said(privacy, "adjacency"),
        f"{_said(privacy, 'sampling')} sampling",
        "simulated" if privacy.get("simulated", True) else "",
    ]
    return "Epsilon, at most", plain(spent) if spent is not None else "-", ", ".join(filter(None, stated))


def _said(privacy: Mapping[str, Any], key: str) -> str:
    """Return a word that goes with epsilon; what the start of the run did not record is not made up."""
    value = privacy.get(key)
    return "(not recorded)" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _traffic_tile(record: RunRecord) -> list[tuple[str, str, str]]:
    up = record.summary.get("bytes_up_per_client_round")
    if up is None:
        return []
    other = record.summary.get("bytes_up_plain_lora")
    note = f"plain LoRA would send {size(other)}" if other else "per client and round"
    return [("Sent by a client per round", size(up), note)]


def _aggregation_tile(record: RunRecord) -> list[tuple[str, str, str]]:
    error = _first(record.summary.get("aggregation_error"), record.latest("aggregation_error"))
    if error is None:
        return []
    return [("Aggregation error", f"{error:.2g}", "mean of products against product of means, relative")]


def _reason_counts(record: RunRecord) -> str:
    counts = Counter(str(each.get("reason")) for _, each in record.refused)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


# --- Sections --------------------------------------------------------------------------------------------------------


def accuracy_chart(record: RunRecord) -> str:
    """Chart the accuracy by round; empty for a run without rounds."""
    name = "Next-token accuracy" if record.causal else "Accuracy"
    return plots.lines(
        f"{name} on the validation split",
        [Series(name, record.series("accuracy"))],
        form=percent,
        resumed=record.resumed,
    )


def _quality(record: RunRecord) -> str:
    charts = [
        accuracy_chart(record),
        plots.lines(
            "Loss on the validation split", [Series("loss", record.series("loss"))], form=plain, resumed=record.resumed
        ),
    ]
    return grid(charts)


def _budget(privacy: Mapping[str, Any]) -> list[Level]:
    budget = privacy.get("epsilon_budget")
    return [Level("budget", budget)] if budget is not None else []


def epsilon_chart(record: RunRecord) -> str:
    """Chart what was spent by round; empty for a run that claims no privacy."""
    if not record.privacy:
        return ""
    history = record.epsilon_by_round()
    largest = Series("largest of all clients", [(n, max(each.values())) for n, each in history if each])
    band = [(n, min(each.values()), max(each.values())) for n, each in history if each]
    return plots.lines(
        "Epsilon spent by round",
        [Series(largest.name, largest.points, band)],
        form=plain,
        levels=_budget(record.privacy),
        from_zero=True,
        note="The band spans all clients that were charged.",
    )


def _privacy(record: RunRecord) -> str:
    privacy = record.privacy
    if not privacy:
        return ""
    each = _by_client("Epsilon by client, sorted", record.epsilon, form=plain, levels=_budget(privacy))
    return grid([epsilon_chart(record), each]) + _assumptions(privacy)


def _assumptions(privacy: Mapping[str, Any]) -> str:
    budget = privacy.get("epsilon_budget")
    rows = {
        "budget": plain(budget) if budget is not None else "none: noise was given, epsilon is what it costs",
    } | {key: _said(privacy, key) for key in ("delta", "unit", "adjacency", "sampling")}
    stated = privacy.get("assumptions") or ()
    if isinstance(stated, Mapping):
        rows |= {str(name): str(words) for name, words in stated.items()}
    else:
        rows |= dict(_named(str(words), number) for number, words in enumerate(stated, start=1))
    rows["simulated"] = (
        "yes: one machine played all clients, so this run shows what the mechanism costs and protects no real client"
        if privacy.get("simulated", True)
        else "no: every client kept its own data and ledger"
    )
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in rows.items())
    return f'<h3>What every epsilon here rests on</h3><dl class="facts">{listed}</dl>'


def _named(words: str, number: int) -> tuple[str, str]:
    """Split `delta: 1e-05` into its name and its words; words without a name are numbered."""
    name, colon, rest = words.partition(": ")
    return (name, rest) if colon and len(name) <= 20 else (f"assumption {number}", words)


def _traffic(record: RunRecord) -> str:
    numbers = [int(each["round"]) for each in record.rounds]
    if not numbers:
        return ""
    up = [(float(n), float(each.get("bytes_up") or 0)) for n, each in zip(numbers, record.rounds, strict=True)]
    down = [(float(n), float(each.get("bytes_down") or 0)) for n, each in zip(numbers, record.rounds, strict=True)]
    by_round = [Series("sent by clients", up), Series("received by clients", down, hue=3, dashed=True)]
    in_all = [Series("sent by clients", _cumulated(up))]
    if other := record.summary.get("bytes_up_plain_lora"):
        replies = [len(each.get("accepted") or ()) for each in record.rounds]
        theirs = [(float(n), float(count * other)) for n, count in zip(numbers, replies, strict=True)]
        by_round.append(Series("plain LoRA would send", theirs, hue=2))
        in_all.append(Series("plain LoRA would send", _cumulated(theirs), hue=2))
    charts = [
        plots.lines("Bytes by round, all clients", by_round, form=size, from_zero=True),
        plots.lines("Sent since the start", in_all, form=size, from_zero=True),
    ]
    return grid(charts)


def _cumulated(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    total, grown = 0.0, []
    for number, value in points:
        total += value
        grown.append((number, total))
    return grown


def _clients(record: RunRecord) -> str:
    norms = {int(each["round"]): each.get("update_norm") or {} for each in record.rounds}
    losses = {int(each["round"]): each.get("train_loss") or {} for each in record.rounds}
    boxes = "Line: all clients; box: the middle half; bar: the median."
    charts = [
        _holdings(record),
        _label_mix(record),
        plots.spread("Norm of the updates by round", norms, note=boxes),
        plots.spread("Training loss of the clients by round", losses, note=boxes),
        _participation(record),
        _client_accuracy(record),
    ]
    return grid(charts) + _client_table(record)


def _holdings(record: RunRecord) -> str:
    """Chart how many examples a client has; of which labels, where they are few enough to tell by colour."""
    held = _shown_clients(record)
    names, counts = [str(each["client"]) for each in held], [each.get("labels") or {} for each in held]
    labels = _ranked(counts)
    layers = [("examples", [float(each["examples"]) for each in held])]
    if 0 < len(labels) <= plots.HUES:
        layers = [(label, [float(each.get(label, 0)) for each in counts]) for label in labels]
    title = "Examples by client" if len(layers) == 1 else "Examples by client and label"
    note = f"The first {_BARS} of {len(record.clients)} clients." if len(record.clients) > _BARS else ""
    return plots.bars(title, names, layers, form=plain, label="client", wide=True, note=note)


def _label_mix(record: RunRecord) -> str:
    """Chart the label mix as a heat map, where labels are too many for colours."""
    held = _shown_clients(record)
    names, counts = [str(each["client"]) for each in held], [each.get("labels") or {} for each in held]
    labels = _ranked(counts)
    if len(labels) <= plots.HUES:
        return ""
    totals = [math.fsum(each.values()) or 1.0 for each in counts]
    shown = labels[:_LABELS]
    shares = [[each.get(label, 0) / total for each, total in zip(counts, totals, strict=True)] for label in shown]
    note = f"The {_LABELS} most frequent of {len(labels)} labels." if len(labels) > _LABELS else ""
    return plots.heat("Share of every label in a client's examples", shown, names, shares, note=note)


def _shown_clients(record: RunRecord) -> list[Mapping[str, Any]]:
    return sorted(record.start.get("clients") or (), key=lambda each: natural(str(each["client"])))[:_BARS]


def _ranked(counts: Sequence[Mapping[str, float]]) -> list[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update({label: int(count) for label, count in each.items()})
    return [label for label, _ in total.most_common()]


def _participation(record: RunRecord) -> str:
    names = [str(each["round"]) for each in record.rounds]
    used = [float(len(each.get("accepted") or ())) for each in record.rounds]
    lost = [float(len(each.get("refused") or ())) for each in record.rounds]
    return plots.bars("Replies by round", names, [("used", used), ("refused", lost)], form=plain, label="round")


def _client_accuracy(record: RunRecord) -> str:
    found = record.end.get("client_accuracy") or {}
    return _by_client("Accuracy by client, sorted", found, form=percent)


def _by_client(title: str, values: Mapping[str, float], *, form: Format, levels: Sequence[Level] = ()) -> str:
    """Chart one figure per client in rising order; of many clients, an even choice that keeps both ends."""
    order = sorted(values, key=lambda name: (values[name], natural(name)))
    count = min(len(order), _BARS)
    names = [order[round(i * (len(order) - 1) / max(count - 1, 1))] for i in range(count)]
    note = f"{count} of {len(order)} clients, evenly spaced in this order." if count < len(order) else ""
    layers = [("clients", [float(values[name]) for name in names])]
    return plots.bars(title, names, layers, form=form, label="client", levels=levels, note=note)


def _client_table(record: RunRecord) -> str:
    spent = record.epsilon
    used = Counter(name for each in record.rounds for name in each.get("accepted") or ())
    lost = Counter(str(each.get("client")) for _, each in record.refused)
    held = {str(each["client"]): each.get("examples") for each in record.start.get("clients") or ()}
    accuracy = record.end.get("client_accuracy") or {}
    rows = [
        [
            name,
            _cell(held.get(name)),
            str(used[name]),
            str(lost[name]),
            _cell(spent.get(name)),
            percent(accuracy[name]) if name in accuracy else "-",
        ]
        for name in record.clients[:_ROWS]
    ]
    head = ["client", "examples", "rounds used", "refused", "epsilon", "accuracy"]
    left_out = f"<p>The first {_ROWS} of {len(record.clients)}.</p>" if len(record.clients) > _ROWS else ""
    return f"<details><summary>All clients in a table</summary>{table(head, rows)}{left_out}</details>" if rows else ""


def _cell(value: float | None) -> str:
    return "-" if value is None else plain(value) if isinstance(value, float) else str(value)


def _refused(record: RunRecord) -> str:
    if not record.refused:
        return ""
    rows = [
        [
            str(number),
            str(each.get("client")),
            str(each.get("reason")),
            str(each.get("detail") or _REASONS.get(str(each.get("reason")), "")),
        ]
        for number, each in record.refused
    ]
    listed = table(["round", "client", "reason", "detail"], rows[:_ROWS])
    seen = {str(each.get("reason")) for _, each in record.refused}
    words = "; ".join(f"{reason}: {_REASONS[reason]}" for reason in sorted(seen & _REASONS.keys()))
    left_out = f" The first {_ROWS} of {len(rows)}." if len(rows) > _ROWS else ""
    return f'{listed}<p class="quiet">{escape(words)}.{left_out}</p>'


def _time(record: RunRecord) -> str:
    totals: Counter[str] = Counter()
    for each in record.rounds:
        for phase, seconds in (each.get("seconds") or {}).items():
            totals[phase] += seconds
    if not totals:
        return ""
    numbers = [str(each["round"]) for each in record.rounds]
    layers = [
        (f"{phase} ({duration(total)})", [float((each.get("seconds") or {}).get(phase, 0)) for each in record.rounds])
        for phase, total in totals.most_common()
    ]
    return grid([plots.bars("Seconds by round", numbers, layers, form=plain, label="round", wide=True)])


def _footer(record: RunRecord) -> str:
    start, end = record.summary.get("frame_digest_start"), record.summary.get("frame_digest_end")
    digest = ""
    if start and end:
        verdict = "did not change" if start == end else "CHANGED, which must never happen"
        digest = f"<p>The frozen frame A {verdict}: <code>{escape(str(start)[:16])}</code>"
        digest += "</p>" if start == end else f" became <code>{escape(str(end)[:16])}</code></p>"
    there = [
        name
        for name in ("adapter", "ledger.sqlite", "metrics.jsonl", "summary.json", "config.yaml")
        if (record.directory / name).exists()
    ]
    files = " · ".join(f"<code>{escape(name)}</code>" for name in there)
    return f"<footer>{digest}<p>Beside this file: {files}</p></footer>"
