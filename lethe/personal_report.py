"""The report of a personal run: arms and their intervals, training, the gate, and one user in pictures."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lethe import plots
from lethe.page import document, duration, grid, header, settings_of, table, tile_list
from lethe.plots import Series, percent, plain
from lethe.progress import UNTRAINED
from lethe.record import RunRecord
from lethe.row_plots import intervals, row_bars

WORDS = {
    "recommender": "recommender alone",
    "single-lora": "single LoRA of equal parameters",
    "reclora": "RecLoRA",
    "stack": "stack of recommenders",
    "stack-with-reclora": "stack with RecLoRA",
    "single-lora-equal-rank": "single LoRA of equal rank",
    "unadapted": "language model without adapter",
    "uniform-gate": "uniform gate",
    "random-gate": "random gate",
    "score-in-prompt": "score told in the prompt",
    "retrieved-history": "most similar events told",
}
_LIKED, _NOT_LIKED = 3, 2
_FILES = ("adapter", "base", "metrics.jsonl", "summary.json", "config.yaml")


def personal_page(record: RunRecord) -> str:
    """Return the whole page, of a run that has finished or not."""
    name = str(record.summary.get("name") or record.directory.name)
    sections = [
        ("Arms", _arms(record)),
        ("Training", _training(record)),
        (f"User {record.portrait.get('user')}", _user(record.portrait)),
        ("Which meta-LoRAs were mixed", _mixture(record.portrait, zero=bool(record.summary.get("untrained")))),
        ("The run file, all defaults filled in", settings_of(record.config)),
    ]
    return document(name, _header(name, record) + _tiles(record.summary), sections, footer=_footer(record))


def _header(name: str, record: RunRecord) -> str:
    start = record.start
    facts = [
        f"{start[key]:,} {words}"
        for key, words in (("users", "users"), ("items", "items"), ("interactions", "interactions"))
        if start.get(key) is not None
    ]
    facts += [str(start[key]) for key in ("model", "split") if start.get(key)]
    seeds = record.settings.get("comparison", {}).get("seeds")
    facts += [f"{seeds} seed{'s'[: seeds > 1]}"] if seeds else []
    return header(name, facts, finished=record.finished)


def _tiles(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    tiles = [
        (
            "AUC, RecLoRA",
            _figure(summary, "auc_reclora"),
            UNTRAINED
            if summary["untrained"]
            else f"single LoRA {_figure(summary, 'auc_single_lora')}{_started(summary)}",
        ),
        (
            "AUC, stack with RecLoRA",
            _figure(summary, "auc_stack_with_reclora"),
            f"stack alone {_figure(summary, 'auc_stack')}",
        ),
        (
            "NDCG@10, RecLoRA",
            _figure(summary, "ndcg10_reclora"),
            f"recommender {_figure(summary, 'ndcg10_recommender')}",
        ),
        (
            "Gate entropy",
            percent(summary["gate_entropy_share"]),
            "of a uniform gate's" + ("; the gate has collapsed" if summary["gate_collapsed"] else ""),
        ),
        ("AUC lost by a swapped gate", _figure(summary, "swap_auc_drop"), "routed as another user"),
        ("Time", duration(summary["wall_s"]), f"{summary['test_rows']:,} test rows"),
    ]
    return tile_list(tiles)


def _started(summary: Mapping[str, Any]) -> str:
    return ", which kept its start" if summary.get("kept_epoch_single_lora") == 0 else ""


def _figure(summary: Mapping[str, Any], key: str) -> str:
    value, spread = summary.get(key), summary.get(f"{key}_spread")
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ±{spread:.4f}" if spread is not None else "")


# --- Arms ------------------------------------------------------------------------------------------------------------


def _arms(record: RunRecord) -> str:
    arms = record.summary.get("arms") or ()
    if not arms:
        return ""
    differences = [
        (f"{_named(each['one'])} minus {_named(each['other'])}", each["value"], each["low"], each["high"])
        for each in record.summary["differences"]
    ]
    aucs = [float(each["auc"]) for each in arms]
    base = max(0.0, math.floor(50 * min(aucs) - 0.5) / 50)
    charts = [
        intervals(
            "Difference of AUC",
            differences,
            form=_signed,
            label="AUC",
            note="Lines: 95 %, whole users redrawn, the same for both; a grey dot: zero is inside.",
        ),
        row_bars(
            f"AUC above {base:.2f}",
            [_named(each["name"]) for each in arms],
            [("AUC", [value - base for value in aucs])],
            form=lambda value: f"{value + base:.3f}",
            label="AUC of likes, test rows",
        ),
    ]
    heading = ["arm", "AUC", "log loss", "accuracy", "NDCG@10", "Hit@10", "numbers trained"]
    return grid(charts) + table(heading, _rows(arms))


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("+0.0000", "0").replace("-0.0000", "0")


def _rows(arms: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = ("auc", "log_loss", "accuracy", "ndcg10", "hit10")
    return [
        [
            _named(each["name"]),
            *(_figure(each, key) for key in columns),
            f"{each['numbers']:,.0f}" if each.get("numbers") else "",
        ]
        for each in arms
    ]


def _named(name: str) -> str:
    return WORDS.get(name, name)


def _training(record: RunRecord) -> str:
    """Chart the log loss on validation rows by epoch: the first seed of every trained arm."""
    curves = {str(each["name"]): each["curve"] for each in reversed(record.arms) if each.get("curve")}
    ordered = sorted(curves, key=lambda name: list(WORDS).index(name) if name in WORDS else len(WORDS))
    series = [
        Series(_named(name), [(float(epoch), float(loss)) for epoch, loss in enumerate(curves[name])], hue=1 + i % 8)
        for i, name in enumerate(ordered)
    ]
    seconds = {_named(name): [float(e["seconds"]) for e in record.arms if e["name"] == name] for name in ordered}
    charts = [
        plots.lines(
            "Log loss on validation rows",
            series,
            form=plain,
            label="epoch",
            note="Epoch 0: recommender and unadapted model, weighed. First seed; the best epoch is kept.",
        ),
        row_bars(
            "Seconds to train an arm",
            list(seconds),
            [("seconds", [sum(each) / len(each) for each in seconds.values()])],
            form=plain,
            label="seconds",
        ),
    ]
    return grid(charts) if series else ""


# --- One user --------------------------------------------------------------------------------------------------------


def _user(portrait: Mapping[str, Any]) -> str:
    if not portrait:
        return ""
    shown = portrait["recommended"]
    without = next(name for name in shown if name != "reclora")
    same = portrait["overlap"][without]
    charts = [
        _history(portrait),
        _recommended("Recommended with personalisation (RecLoRA)", shown["reclora"]),
        _recommended(
            f"Recommended without (the {_named(without)})", shown[without], note=f"{same} of these are above as well."
        ),
    ]
    return grid(charts)


def _history(portrait: Mapping[str, Any]) -> str:
    events = portrait["history"]
    latest = f"the last {len(events)} of {portrait['events']} ratings, oldest first"
    return row_bars(
        f"History: {latest}" if events else "History",
        [str(each["title"]) for each in events],
        [("rating", [float(each["rating"]) for each in events])],
        form=plain,
        label="rating",
        hues=[[_LIKED if each["liked"] else _NOT_LIKED for each in events]],
        note="Green: liked; orange: not.",
    )


def _recommended(title: str, items: Sequence[Mapping[str, Any]], *, note: str = "") -> str:
    arms = list(items[0]["likes"]) if items else []
    marks = {True: " ✓", False: " ✗", None: ""}
    later = "✓ liked later, ✗ rated lower later (test rows, which nobody learned from)."
    return row_bars(
        title,
        [f"{each['title']}{marks[each['later']]}" for each in items],
        [(_named(arm), [float(each["likes"][arm]) for each in items]) for arm in arms],
        form=percent,
        label="probability of a like",
        top=1.03,
        note=" ".join(filter(None, [note, later])),
    )


def _mixture(portrait: Mapping[str, Any], *, zero: bool) -> str:
    if not portrait:
        return ""
    empty = " All are still zero, so the weights change no answer yet." if zero else ""
    columns = [str(number) for number in range(1, len(portrait["usage"]) + 1)]
    charts = [
        plots.heat(
            "Weight of every meta-LoRA in this user's adapter, by matrix",
            [_short(name) for name in portrait["matrices"]],
            columns,
            portrait["weights"],
            label="meta-LoRA",
            note=f"A row sums to one.{empty}",
        ),
        row_bars(
            "Mean weight over the matrices",
            [f"meta-LoRA {number}" for number in columns],
            [("this user", portrait["usage"]), ("all users' test rows", portrait["usage_of_all"])],
            form=percent,
            label="weight",
        ),
    ]
    return grid(charts)


def _short(name: str) -> str:
    """Leave the end of a module's name, which tells it apart."""
    parts = [part for part in name.split(".") if part not in ("model", "base_model", "layers", "encoder", "layer")]
    return ".".join([parts[0], parts[-1]]) if len(parts) > 2 else ".".join(parts)


def _footer(record: RunRecord) -> str:
    there = [name for name in _FILES if (record.directory / name).exists()]
    files = " · ".join(f"<code>{escape(name)}</code>" for name in there)
    return f"<footer><p>Beside this file: {files}</p></footer>"
