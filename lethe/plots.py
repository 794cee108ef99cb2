"""Charts as SVG text that needs nothing else: colours come from the page's style, so they follow light and dark."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from statistics import median, quantiles

Format = Callable[[float], str]

HUES = 8
"""Colours that the page's style names c1 to c8; one more layer is grey."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 36
_DOTS = 20
_COLUMNS = 90


@dataclass(frozen=True)
class Series:
    """A line over rounds, with an optional band around it."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    """Round, low, high."""
    hue: int = 1
    dashed: bool = False
    """For a line that may lie on another."""


@dataclass(frozen=True)
class Level:
    """A dashed line across the chart, such as a budget."""

    name: str
    value: float


def plain(value: float) -> str:
    """Write a number with up to four significant digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    """Write a share as a percentage: `81.2 %`."""
    return f"{100 * value:.3g} %"


def size(value: float) -> str:
    """Write bytes with a decimal unit: `147 kB`."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            return f"{value / step:.3g} {unit}"
    return f"{value:.0f} B"


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """Return round numbers inside [low, high], about `count` of them."""
    step = _step((high - low) / count)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next(power * nice for nice in (1, 2, 5, 10) if raw <= power * nice * 1.0000001)


@dataclass
class Canvas:
    """A plot area with two linear axes; what is drawn collects in `parts`."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = 480
    height: int = 250
    left: int = _LEFT
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Return the horizontal position of a value."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - _RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical position of a value; small values are low."""
        low, high = self.y_range
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def y_axis(self, form: Format) -> None:
        """Draw horizontal grid lines with their values."""
        for value in ticks(*self.y_range):
            y = self.y(value)
            self.line((self.left, y), (self.width - _RIGHT, y), "rule")
            self.text(self.left - 7, y + 4, form(value), "end")

    def x_axis(self, label: str, values: Iterable[tuple[float, str]]) -> None:
        """Write the values below the plot, and what they are."""
        for value, name in values:
            self.text(self.x(value), self.height - _BOTTOM + 16, name, "middle")
        self.text((self.left + self.width - _RIGHT) / 2, self.height - 4, label, "middle")

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        """Draw a straight line between two positions."""
        (x1, y1), (x2, y2) = start, end
        self.parts.append(f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(self, x: float, y: float, words: str, anchor: str) -> None:
        """Write words at a position."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, *, style: str, tip: str, opacity: float = 1) -> None:
        """Draw a rectangle; `tip` shows when the pointer rests on it."""
        faded = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self.parts.append(
            f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.4):.1f}" '
            f'height="{max(height, 0):.1f}"{faded}>{title}</rect>'
        )

    def dot(self, x: float, y: float, *, style: str, tip: str, radius: float = 3) -> None:
        """Draw a point with a tip."""
        title = f"<title>{escape(tip)}</title>"
        self.parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{title}</circle>')

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Draw a line through values (not positions)."""
        steps = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{style}" points="{steps}"/>')

    def area(self, band: Sequence[tuple[float, float, float]], style: str) -> None:
        """Fill between a low and a high line."""
        there = [f"{self.x(x):.1f},{self.y(low):.1f}" for x, low, _ in band]
        back = [f"{self.x(x):.1f},{self.y(high):.1f}" for x, _, high in reversed(band)]
        self.parts.append(f'<polygon class="{style}" points="{" ".join(there + back)}"/>')

    def svg(self, label: str) -> str:
        """Return the picture; `label` is what a screen reader says."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">'
            f"{''.join(self.parts)}</svg>"
        )


def figure(title: str, svg: str, *, legend: Sequence[tuple[str, str]] = (), note: str = "", wide: bool = False) -> str:
    """Frame a chart with its title, a legend of (style, name) and a note."""
    keys = "".join(f'<span><i class="{style}"></i>{escape(name)}</span>' for style, name in legend)
    shown = f'<div class="legend">{keys}</div>' if keys else ""
    below = f"<p>{escape(note)}</p>" if note else ""
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption>{escape(title)}</figcaption>{shown}"
        f'<div class="plot">{svg}</div>{below}</figure>'
    )


def lines(
    title: str,
    series: Sequence[Series],
    *,
    form: Format,
    levels: Sequence[Level] = (),
    resumed: Sequence[int] = (),
    from_zero: bool = False,
    note: str = "",
    label: str = "round",
) -> str:
    """Chart lines over rounds (or what `label` says), with bands, dashed levels and marks where the run was resumed."""
    series = [_finite(each) for each in series]
    heights = [y for each in series for _, y in each.points] + [1.04 * level.value for level in levels]
    heights += [edge for each in series for _, low, high in each.band for edge in (low, high)]
    rounds = [x for each in series for x, _ in each.points]
    if not rounds:
        return ""
    canvas = Canvas(_widened(min(rounds), max(rounds)), _padded(heights, from_zero=from_zero))
    canvas.y_axis(form)
    canvas.x_axis(label, [(x, f"{x:g}") for x in ticks(*canvas.x_range, whole=True)])
    for mark in resumed:
        canvas.line((canvas.x(mark), _TOP), (canvas.x(mark), canvas.height - _BOTTOM), "resumed")
    for level in levels:
        canvas.line((canvas.left, canvas.y(level.value)), (canvas.width - _RIGHT, canvas.y(level.value)), "level")
    for each in series:
        _draw(canvas, each, form, label)
    legend = [(f"c{each.hue}", each.name) for each in series] if len(series) > 1 or levels else []
    legend += [("level", f"{level.name} {form(level.value)}") for level in levels]
    legend += [("resumed", "resumed")] if resumed else []
    return figure(title, canvas.svg(title), legend=legend, note=note)


def _finite(series: Series) -> Series:
    points = [(x, y) for x, y in series.points if math.isfinite(y)]
    band = [(x, low, high) for x, low, high in series.band if math.isfinite(low) and math.isfinite(high)]
    return replace(series, points=points, band=band)


def _draw(canvas: Canvas, series: Series, form: Format, label: str) -> None:
    if len(series.band) > 1:
        canvas.area(series.band, f"band f{series.hue}")
    canvas.path(series.points, f"curve s{series.hue}{' dashed' if series.dashed else ''}")
    radius = 3 if len(series.points) <= 40 else 1.6
    for x, y in series.points:
        canvas.dot(canvas.x(x), canvas.y(y), style=f"f{series.hue}", tip=f"{label} {x:g}: {form(y)}", radius=radius)


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """Leave room around the values, ending at round numbers; an empty or flat range becomes one that can be drawn."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = min(low, 0.0) if from_zero else low
    if high <= low:
        low, high = (low, low + 1) if from_zero else (low - 0.5, high + 0.5)
    step = _step((high - low) / 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def bars(
    title: str,
    names: Sequence[str],
    layers: Sequence[tuple[str, Sequence[float]]],
    *,
    form: Format,
    label: str,
    levels: Sequence[Level] = (),
    note: str = "",
    wide: bool = False,
) -> str:
    """Chart one bar per name, stacked from layers; names that would overlap are thinned out."""
    if not names:
        return ""
    totals = [math.fsum(values[i] for _, values in layers) for i in range(len(names))]
    top = _padded([*totals, *(1.04 * level.value for level in levels)], from_zero=True)
    canvas = Canvas((0, len(names)), top, width=980 if wide else 480)
    canvas.y_axis(form)
    canvas.x_axis(label, _thinned(names, canvas))
    gap = 0.15 if len(names) <= 60 else 0.05
    for i, name in enumerate(names):
        base = 0.0
        for hue, (layer, values) in enumerate(layers, start=1):
            height = canvas.y(base) - canvas.y(base + values[i])
            what = f", {layer}" if len(layers) > 1 else ""
            if values[i] > 0:
                left, width = canvas.x(i + gap), canvas.x(i + 1 - gap) - canvas.x(i + gap)
                tip = f"{name}{what}: {form(values[i])}"
                canvas.box(left, canvas.y(base + values[i]), width, height, style=_fill(hue), tip=tip)
            base += values[i]
    for level in levels:
        canvas.line((canvas.left, canvas.y(level.value)), (canvas.width - _RIGHT, canvas.y(level.value)), "level")
    legend = [(f"c{hue}" if hue <= HUES else "c0", name) for hue, (name, _) in enumerate(layers, start=1)]
    legend = legend if len(layers) > 1 or levels else []
    legend += [("level", f"{level.name} {form(level.value)}") for level in levels]
    return figure(title, canvas.svg(title), legend=legend, note=note, wide=wide)


def _fill(hue: int) -> str:
    return f"f{hue}" if hue <= HUES else "f0"


def _thinned(names: Sequence[str], canvas: Canvas) -> list[tuple[float, str]]:
    """Return the middle and the name of every k-th column, k such that names of this length do not touch."""
    room = (canvas.width - canvas.left - _RIGHT) / len(names)
    needed = 7 * min(12, max(map(len, names))) + 8
    every = max(1, math.ceil(needed / room))
    return [(i + 0.5, _short(name)) for i, name in enumerate(names) if i % every == 0]


def _short(name: str, length: int = 12) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    *,
    note: str = "",
    label: str = "client",
) -> str:
    """Chart a share in [0, 1] for every row and column; the darker, the larger, scaled to the largest."""
    if not rows or not columns:
        return ""
    cell = max(13, min(18, 420 // len(rows)))
    height = cell * len(rows) + _TOP + _BOTTOM
    canvas = Canvas((0, len(columns)), (0, len(rows)), width=980, height=height, left=150)
    largest = max((value for row in shares for value in row), default=0) or 1.0
    width = canvas.x(1) - canvas.x(0)
    for i, row in enumerate(rows):
        y = canvas.y(len(rows) - i)
        canvas.text(canvas.left - 7, y + cell / 2 + 4, _short(row, 20), "end")
        for j, column in enumerate(columns):
            if shares[i][j] > 0:
                tip = f"{row}, {label} {column}: {percent(shares[i][j])}"
                shade = 0.08 + 0.92 * shares[i][j] / largest
                canvas.box(canvas.x(j), y, width - 0.5, cell - 0.5, style="f1", tip=tip, opacity=shade)
    canvas.x_axis(label, _thinned(columns, canvas))
    return figure(title, canvas.svg(title), note=note, wide=True)


def spread(
    title: str, values: Mapping[int, Mapping[str, float]], *, form: Format = plain, note: str = "", wide: bool = False
) -> str:
    """Chart how a value spreads over clients in every round: range, middle half, median, and few clients one by one."""
    kept = {number: _numbers(each) for number, each in sorted(values.items())}
    kept = {number: each for number, each in kept.items() if each}
    if not kept:
        return ""
    shown = list(kept)[:: max(1, math.ceil(len(kept) / _COLUMNS))]
    heights = [value for number in shown for value in kept[number].values()]
    ends = (shown[0] - 0.6, shown[-1] + 0.6)
    canvas = Canvas(ends, _padded(heights, from_zero=min(heights) >= 0), width=980 if wide else 480)
    canvas.y_axis(form)
    canvas.x_axis(
        "round", [(x, f"{x:g}") for x in ticks(shown[0], shown[-1], whole=True)] or [(shown[0], str(shown[0]))]
    )
    half = min(9.0, (canvas.x(ends[1]) - canvas.x(ends[0])) / len(shown) * 0.32)
    for number in shown:
        _whiskers(canvas, number, kept[number], half=half, form=form)
    return figure(title, canvas.svg(title), note=note, wide=wide)


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _whiskers(canvas: Canvas, number: int, values: Mapping[str, float], *, half: float, form: Format) -> None:
    ordered = sorted(values.values())
    low, _, high = quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    x, middle = canvas.x(number), median(ordered)
    canvas.line((x, canvas.y(ordered[0])), (x, canvas.y(ordered[-1])), "whisker")
    tip = (
        f"round {number}, {len(ordered)} clients: median {form(middle)}, half of them {form(low)} to {form(high)}, "
        f"all {form(ordered[0])} to {form(ordered[-1])}"
    )
    top = canvas.y(high)
    canvas.box(x - half, top, 2 * half, max(canvas.y(low) - top, 1), style="f1 soft", tip=tip)
    canvas.line((x - half, canvas.y(middle)), (x + half, canvas.y(middle)), "median")
    if len(ordered) <= _DOTS:
        for name, value in values.items():
            canvas.dot(x, canvas.y(value), style="f2", tip=f"round {number}, client {name}: {form(value)}", radius=2.2)
