"""The frame and the style of reports: light and dark by the reader's setting, nothing loaded from anywhere."""

from collections.abc import Iterable, Sequence
from html import escape

_HUES = {
    "light": ("#a8abb0", "#2f6fd0", "#d9622b", "#169a72", "#b98300", "#8456c9", "#c93d77", "#4a9bb5", "#7a8b2a"),
    "dark": ("#70757c", "#6ea3f0", "#f08a55", "#43c39a", "#e0b040", "#af8bea", "#ec75a4", "#78c3da", "#aebd58"),
}
_TALL = 15
_BASE = """
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 26px; margin: 0 }
h2 { font-size: 18px; margin: 34px 0 12px }
h3 { font-size: 15px; margin: 18px 0 6px }
header p, .quiet, figure p, footer { color: var(--quiet) }
header p { margin: 4px 0 20px }
footer { margin-top: 36px; font-size: 13px }
.chip { font-size: 12px; font-weight: 500; vertical-align: middle; padding: 3px 9px; border-radius: 10px;
  border: 1px solid var(--h3); color: var(--h3) }
.chip.open { border-color: var(--h2); color: var(--h2) }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 0 }
.tiles div, figure, details, .facts { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.tiles div { padding: 12px 14px }
.tiles dt { color: var(--quiet); font-size: 13px }
.tiles dd { margin: 2px 0; font-size: 25px; font-weight: 600 }
.tiles p { margin: 0; color: var(--quiet); font-size: 12.5px; line-height: 1.4 }

.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px }
figure { margin: 0; padding: 12px 14px }
figure.wide { grid-column: 1 / -1 }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px }
figure p { margin: 2px 0 0; font-size: 12.5px }
.plot, .scroll { overflow-x: auto }
.tall { max-height: 440px; overflow-y: auto }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--quiet); font-size: 11.5px }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--quiet); margin-bottom: 4px }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px;
  vertical-align: -1px }
.legend i.level, .legend i.resumed { height: 0; width: 16px; border-radius: 0; border-top: 2px dashed var(--ink);
  vertical-align: 4px }
.legend i.resumed { border-top: 2px dotted var(--quiet) }
line.rule { stroke: var(--rule); stroke-width: 1 }
line.level { stroke: var(--ink); stroke-dasharray: 5 4; stroke-width: 1.4 }
line.resumed { stroke: var(--quiet); stroke-dasharray: 2 3 }
line.whisker { stroke: var(--h1); stroke-width: 1.2 }
line.median { stroke: var(--ink); stroke-width: 2 }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round }
.dashed { stroke-dasharray: 7 5 }
.band { opacity: .18 }
.soft { fill-opacity: .35 }

.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; padding: 12px 14px; margin: 0 }
.facts dt { color: var(--quiet) }
.facts dd { margin: 0 }
details { margin-top: 12px; padding: 10px 14px }
summary { cursor: pointer }
pre { overflow-x: auto; font-size: 12.5px; line-height: 1.45; margin: 8px 0 0 }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--quiet); font-weight: 500 }
@media (max-width: 760px) { .grid { grid-template-columns: minmax(0, 1fr) } .wide svg { min-width: 760px } }
@media (max-width: 520px) { .facts { grid-template-columns: 1fr } .facts dd { margin-bottom: 6px } }
"""


def _variables(mode: str, rest: str) -> str:
    return ":root{" + rest + "".join(f"--h{i}:{hue};" for i, hue in enumerate(_HUES[mode])) + "}"


_LIGHT = _variables("light", "--bg:#fbfbfa;--card:#fff;--ink:#1d1e20;--quiet:#62666d;--line:#e2e3e5;--rule:#e9eaec;")
_DARK = _variables("dark", "--bg:#17181a;--card:#1f2123;--ink:#e8e9ea;--quiet:#a0a4aa;--line:#34373b;--rule:#2d3033;")
_CHARTS = "".join(
    f".f{i}{{fill:var(--h{i})}}.s{i}{{stroke:var(--h{i})}}.c{i}{{background:var(--h{i})}}\n" for i in range(9)
)

STYLE = f":root{{color-scheme:light dark}}{_LIGHT}\n@media(prefers-color-scheme:dark){{{_DARK}}}{_BASE}{_CHARTS}"
"""The whole style sheet; classes f0 to f8 fill, s0 to s8 stroke, c0 to c8 colour a legend's key."""


def document(name: str, top: str, sections: Iterable[tuple[str, str]], *, footer: str) -> str:
    """Return a whole page; sections without content are left out."""
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections if content)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"{top}{body}{footer}</main></body></html>\n"
    )


def header(name: str, facts: Iterable[str], *, finished: bool) -> str:
    """Return the run's name, whether it has finished, and facts in one line."""
    state, style = ("finished", "done") if finished else ("not finished", "open")
    shown = " · ".join(map(escape, facts))
    return f'<header><h1>{escape(name)} <span class="chip {style}">{state}</span></h1><p>{shown}</p></header>'


def tile_list(tiles: Iterable[tuple[str, str, str]]) -> str:
    """Return headline figures: name, value, note."""
    boxes = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{boxes}</dl>'


def grid(charts: Sequence[str]) -> str:
    """Put charts side by side."""
    shown = "".join(charts)
    return f'<div class="grid">{shown}</div>' if shown else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, which scrolls when it is long."""
    top = "".join(f"<th>{escape(each)}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    style = "scroll tall" if len(rows) > _TALL else "scroll"
    return f'<div class="{style}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def settings_of(config: str) -> str:
    """Return the run file, folded away."""
    return f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>" if config else ""


def duration(seconds: float) -> str:
    """Write seconds in a unit that suits them."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
