"""What a run says while it runs: a bar on a terminal, plain lines elsewhere, and at the end where everything is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

SINGLE_UNTRAINED = "no epoch of the single LoRA was better on validation rows than its start; try it another rate"
UNTRAINED = "no epoch of RecLoRA was better on validation rows than its start: its adapters are still zero"
_PLACES = (
    ("adapter", "adapter_path", "adapter"),
    ("report", "report_path", "report.html"),
    ("ledger", "ledger_path", "ledger.sqlite"),
    ("metrics", "metrics_path", "metrics.jsonl"),
)


class Progress:
    """Follows one run; use it as a context manager, so that the terminal is left in order whatever happens."""

    def __init__(
        self, *, rounds: int, unit: str = "round", quiet: bool = False, console: Console | None = None
    ) -> None:
        self.rounds, self.unit = rounds, unit
        self.directory: Path | None = None
        """The run's directory, once it is known."""
        self._quiet = quiet
        self._console = console or Console(highlight=False)
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def started(self, run_dir: Path, lines: Sequence[str]) -> None:
        """Say which run this is and what was decided for it, then show the bar."""
        self.directory = run_dir
        self.note(f"run {run_dir}")
        for line in lines:
            self.note(f"  {line}")
        if self._console.is_terminal and not self._quiet:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task(self.unit, total=self.rounds)
            self._bar.start()

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Show one round's line of the metrics; rounds that a resume skipped count as done."""
        self.done(round_line(record, rounds=self.rounds), int(record["round"]))

    def done(self, line: str, completed: int) -> None:
        """Show one line, and that so many rounds (or what `unit` says) are complete."""
        self.note(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=completed)

    def note(self, line: str) -> None:
        """Show one line, above the bar where there is one."""
        if not self._quiet:
            self._print(line)

    def finished(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Say what came out, and where adapter, report, ledger and metrics are."""
        self._stop()
        if self._quiet:
            self._print(str(run_dir))
            return
        for line in outcome_lines(summary):
            self._print(line)
        for name, key, file in _PLACES:
            path = Path(summary.get(key) or run_dir / file)
            if path.exists():
                self._print(f"{name:<8} {path}")

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def _bar(console: Console) -> Bar:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)


def round_line(record: Mapping[str, Any], *, rounds: int) -> str:
    """Return one round in one line: `round 3/5  4 of 4 clients  accuracy 81.2 %  loss 0.63  epsilon 3.2  1.4 s`."""
    selected, accepted = record.get("selected") or [], record.get("accepted") or []
    seconds = sum((record.get("seconds") or {}).values())
    parts = [
        f"round {record['round']:>{len(str(rounds))}}/{rounds}",
        f"{len(accepted)} of {len(selected)} clients",
        _percent("accuracy", record.get("accuracy")),
        _figure("loss", record.get("loss")),
        _figure("epsilon", max((record.get("epsilon") or {}).values(), default=None)),
        f"{seconds:.1f} s",
        _refusals(record.get("refused") or []),
    ]
    return "  ".join(part for part in parts if part)


def _percent(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.1%}"


def _figure(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.4g}"


def _refusals(refused: Sequence[Mapping[str, Any]]) -> str:
    named = [f"{each.get('client')} ({each.get('reason')})" for each in refused[:3]]
    more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
    return f"refused: {', '.join(named)}{more}" if named else ""


def outcome_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the outcome in one or two lines; an epsilon always with delta, unit, sampling and `simulated`."""
    start, final = summary.get("accuracy_initial"), summary.get("accuracy_final")
    lines = personal_lines(summary) if "auc_reclora" in summary else []
    if final is not None:
        before = f"{start:.1%} -> " if start is not None else ""
        lines.append(f"accuracy {before}{final:.1%} after {summary.get('rounds', '?')} rounds")
    if summary.get("epsilon_max") is not None:
        lines.append(f"privacy  {epsilon_words(summary)}")
    return lines


def personal_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return what personal adapters gain: over one LoRA for all, on top of the stack, and what swapping them costs."""
    seeds = summary["seeds"]
    end = f"{summary['test_rows']:,} test rows, {seeds} seed{'s'[: seeds > 1]}"
    gains = [f"{each['one']} - {each['other']} {_interval(each)}" for each in summary["differences"]]
    return [
        f"AUC      recommender {summary['auc_recommender']:.4f}  single LoRA {summary['auc_single_lora']:.4f}  "
        f"RecLoRA {summary['auc_reclora']:.4f}  stack {summary['auc_stack']:.4f}  "
        f"with RecLoRA {summary['auc_stack_with_reclora']:.4f}  ({end})",
        *(f"{'AUC gain' if not i else '':<8} {gain}" for i, gain in enumerate(gains)),
        f"gate     entropy {summary['gate_entropy_share']:.0%} of uniform, another user's gate costs "
        f"{summary['swap_auc_drop']:+.4f} AUC{', collapsed' if summary['gate_collapsed'] else ''}",
        *([f"single   {SINGLE_UNTRAINED}"] if summary.get("kept_epoch_single_lora") == 0 else []),
        *([f"kept     {UNTRAINED}"] if summary["untrained"] else []),
    ]


def _interval(each: Mapping[str, Any]) -> str:
    return f"{each['value']:+.4f} [{each['low']:+.4f}, {each['high']:+.4f}]"


def epsilon_words(summary: Mapping[str, Any]) -> str:
    """Return `epsilon at most 7.98 at delta 1e-05 per example, poisson sampling (simulated)`."""
    simulated = " (simulated)" if summary.get("simulated", True) else ""
    return (
        f"epsilon at most {summary['epsilon_max']:.4g} at delta {summary.get('delta')} per {summary.get('unit')}, "
        f"{summary.get('sampling')} sampling{simulated}"
    )
