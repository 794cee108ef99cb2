"""Federation runs for the service's console: figures and curves as the report draws them."""

from pathlib import Path

from lethe.record import RUNS, read_record
from lethe.report import accuracy_chart, epsilon_chart, facts, headline
from lora.errors import RunError
from server.console.runs import RunShown


class ShownRuns:
    """The runs below a folder, read anew whenever they are asked for, so that a run that is going on is followed.

    | case | what is shown |
    |---|---|
    | a folder that is not there | no runs |
    | a personal run | nothing: it is no federation |
    | a run that has not finished | as far as it got |
    | damaged metrics | the run, with the error in place of its figures |
    | a name that leads elsewhere, such as `../x` | nothing: only what the folder lists is opened |
    """

    def __init__(self, root: Path = RUNS) -> None:
        self.root = root

    @property
    def place(self) -> str:
        """The folder as it was given."""
        return f"{self.root}/"

    def names(self) -> list[str]:
        """Return all federation runs, the latest first."""
        return sorted(self._found(), key=lambda name: (-self._found_at(name), name))

    def _found(self) -> list[str]:
        configs = self.root.glob("*/config.yaml") if self.root.is_dir() else ()
        return [file.parent.name for file in configs if not _personal(file) and not file.parent.name.startswith(".")]

    def _found_at(self, name: str) -> float:
        file = self.root / name / "metrics.jsonl"
        return file.stat().st_mtime if file.is_file() else 0.0

    def shown(self, name: str) -> RunShown:
        """Return a run as far as it got."""
        report = (self.root / name / "report.html").is_file()
        try:
            record = read_record(self.root / name)
            charts = [chart for chart in (accuracy_chart(record), epsilon_chart(record)) if chart]
            return RunShown(name, finished=record.finished, facts=facts(record), figures=headline(record),
                            charts=charts, report=report)  # fmt: skip
        except (RunError, KeyError, TypeError, ValueError, AttributeError) as error:
            # Lines that are JSON but of another shape are damage as well.
            told = str(error) if isinstance(error, RunError) else f"its files are damaged ({type(error).__name__})"
            return RunShown(name, fault=told, report=report)

    def report(self, name: str) -> str | None:
        """Return a run's report; None for one that is not listed, or has none."""
        file = self.root / name / "report.html"
        return file.read_text(encoding="utf-8") if name in self._found() and file.is_file() else None


def _personal(config: Path) -> bool:
    return any(line.split("#")[0].split() == ["kind:", "personal"] for line in config.read_text("utf-8").splitlines())
