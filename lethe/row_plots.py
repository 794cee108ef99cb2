"""Charts with one row a name, for names that are too long to stand below a column, such as titles."""

from collections.abc import Sequence

from lethe.plots import Canvas, Format, figure, ticks

_LETTERS = 48
_LEFT, _FOOT, _HEAD = 330, 36, 12
"""Room for names, for the axis (as Canvas has it), and above the first row."""

Row = tuple[str, float, float, float]
"""Name, value, low, high."""


def row_bars(
    title: str,
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    form: Format,
    label: str,
    top: float | None = None,
    hues: Sequence[Sequence[int]] = (),
    note: str = "",
) -> str:
    """Chart bars to the right, for every name one of each series.

    The axis starts at zero and ends at `top` or at the greatest value. `hues[series][name]` are colours other than that
    of the series.
    """
    if not names or not series:
        return ""
    thick = 15 if len(series) == 1 else 9
    canvas = _canvas(len(names), thick * len(series) + 7, (0.0, top or _greatest(series)))
    _values(canvas, form, label)
    for i, name in enumerate(names):
        above = _HEAD + i * (thick * len(series) + 7) + 3
        _name(canvas, name, above + thick * len(series) / 2 + 4)
        for j, (layer, values) in enumerate(series):
            hue = hues[j][i] if hues else j + 1
            what = f", {layer}" if len(series) > 1 else ""
            width, tip = canvas.x(values[i]) - canvas.left, f"{name}{what}: {form(values[i])}"
            canvas.box(canvas.left, above + j * thick, width, thick - 1, style=f"f{hue}", tip=tip)
    legend = [(f"c{j}", layer) for j, (layer, _) in enumerate(series, start=1)] if len(series) > 1 else []
    return figure(title, canvas.svg(title), legend=legend, note=note, wide=True)


def intervals(title: str, rows: Sequence[Row], *, form: Format, label: str, note: str = "") -> str:
    """Chart values with their intervals, and a line at zero, which an interval that holds it does not rule out."""
    if not rows:
        return ""
    edges = [0.0, *(edge for _, *values in rows for edge in values)]
    room = 0.08 * ((max(edges) - min(edges)) or 1.0)
    canvas = _canvas(len(rows), 30, (min(edges) - room, max(edges) + room))
    _values(canvas, form, label)
    canvas.line((canvas.x(0), _HEAD), (canvas.x(0), canvas.height - _FOOT), "level")
    for i, (name, value, low, high) in enumerate(rows):
        y = _HEAD + 30 * i + 15.0
        _name(canvas, name, y + 4)
        canvas.line((canvas.x(low), y), (canvas.x(high), y), "whisker")
        tip = f"{name}: {form(value)}, from {form(low)} to {form(high)}"
        canvas.dot(canvas.x(value), y, style="f1" if low > 0 or high < 0 else "f0", tip=tip, radius=5)
    return figure(title, canvas.svg(title), note=note, wide=True)


def _canvas(rows: int, each: int, x_range: tuple[float, float]) -> Canvas:
    return Canvas(x_range, (0, rows), width=980, height=_HEAD + rows * each + _FOOT, left=_LEFT)


def _greatest(series: Sequence[tuple[str, Sequence[float]]]) -> float:
    return max((value for _, values in series for value in values), default=0.0) or 1.0


def _values(canvas: Canvas, form: Format, label: str) -> None:
    """Draw vertical grid lines with their values, and what they are."""
    marks = ticks(*canvas.x_range)
    for value in marks:
        canvas.line((canvas.x(value), _HEAD), (canvas.x(value), canvas.height - _FOOT), "rule")
    canvas.x_axis(label, [(value, form(value)) for value in marks])


def _name(canvas: Canvas, name: str, y: float) -> None:
    words = name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
    canvas.text(canvas.left - 7, y, words, "end")
