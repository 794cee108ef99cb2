"""What is measured of a request, before and after it, and what can be measured again later."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora.errors import DataError
from server.forgetting.files import Held, RequestFile
from server.forgetting.sources import of_classes
from strategies.unlearning.forgotten import Forgotten
from tasks.examples import Examples


def measured(
    served: Forgotten,
    request: RequestFile,
    *,
    held_back: Examples | None,
    rows: Examples | None,
    earlier: Sequence[Held],
    labels: Mapping[str, int],
) -> dict[str, Any]:
    """Ask what is served about a request's held-back rows and about rows that nothing was trained on.

    Accuracies are shares of right answers; None where there is no row to ask about. `caught` is the share of held-back
    rows that any request's slot answers, `utility` is over all classes that nobody has asked to be forgotten, and
    `touched` the share of those rows that a slot is mixed into. `earlier` is Acc_o of every earlier request for whole
    classes: their own rows are gone, so it is measured on rows of their classes.
    """
    gone = {name for each in earlier for name in each.classes}
    whole = set(request.classes) if request.kind in ("class", "client") else set[str]()
    asked = None if held_back is None else served.asked(held_back)
    staying = _rows(rows, {labels[name] for name in gone | whole}, without=True)
    kept = None if staying is None else served.asked(staying)
    return {
        "forgotten": None if asked is None or held_back is None else asked.accuracy(held_back),
        "caught": None if asked is None else asked.touched,
        "forgotten_unseen": _accuracy(served, _rows(rows, {labels[name] for name in whole})),
        "utility": None if kept is None or staying is None else kept.accuracy(staying),
        "touched": None if kept is None else kept.touched,
        "rows": {"held_back": _count(held_back), "utility": _count(staying)},
        "earlier": {
            each.request: _accuracy(served, _rows(rows, {labels[name] for name in each.classes})) for each in earlier
        },
    }


def forgotten_again(served: Forgotten, rows: Examples) -> dict[str, float]:
    """Ask about rows of a request that somebody has kept, or has new: accuracy, and the share that a slot answers."""
    if not len(rows):
        raise DataError("there is no row to ask about; give some by --examples FILE")
    asked = served.asked(rows)
    return {"forgotten": asked.accuracy(rows), "caught": asked.touched}


def _rows(rows: Examples | None, classes: set[int], *, without: bool = False) -> Examples | None:
    found = None if rows is None else of_classes(rows, classes, without=without)
    return found if found is not None and len(found) else None


def _accuracy(served: Forgotten, rows: Examples | None) -> float | None:
    return None if rows is None else served.asked(rows).accuracy(rows)


def _count(rows: Examples | None) -> int:
    return 0 if rows is None else len(rows)
