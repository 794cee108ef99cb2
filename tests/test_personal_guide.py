"""The guide to personal adapters: its tables are those of the results file, and leave no arm out."""

import json
import re
from pathlib import Path

from benchmarks.reclora import HEADING, READER, SIMPLE
from strategies.personal.variants import VARIANTS
from strategies.personal.world import RECOMMENDERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "personal.md").read_text(encoding="utf-8")
FIGURES = json.loads((ROOT / "benchmarks" / "results" / "reclora.json").read_text())["figures"]
ALIKE = {"single-lora-equal-rank"}
"""What the uniform gate is over one frame."""
ELSEWHERE = {"retrieved-history", "reclora-factor-shared-user", "reclora-factor-shared-pair"}
"""Not in the table: measured with one seed, or the same as product mixing over one frame."""


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading, without its own heading."""
    (table,) = re.findall(r"^\|.*?(?=^[^|]|\Z)", TEXT.split(heading)[1].split("\n**")[0].split("\n- ")[0], re.M | re.S)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def shown(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def told(value: float) -> str:
    return ("-" if value < 0 else "") + shown(abs(value))


def interval(key: str) -> str:
    value, low, high = (FIGURES[key + end] for end in ("", "_low", "_high"))
    return f"{'+' if value >= 0 else '-'}{shown(abs(value))} [{told(low)}, {told(high)}]"


def test_every_figure_of_the_tables_is_the_results_files() -> None:
    others = ("single_lora_equal_parameters", "uniform_gate", "swapped gate")
    for heading, split in (("**Per user**", "per_user"), ("**By time**", "global_time")):
        for arm, *cells in rows(heading):
            key = f"{split}_{arm}".replace(" + ", "_").replace(" ", "_").replace("-", "_")
            minus = f"{split}_{arm}_minus_".replace("-", "_")
            places = {0: "auc", 1: "log_loss", 2: "ndcg10", 6: "stacked"}
            expected = {
                place: f"{shown(FIGURES[f'{key}_{figure}'])} ±{shown(FIGURES[f'{key}_{figure}_spread'])}"
                for place, figure in places.items()
                if f"{key}_{figure}" in FIGURES
            }
            beside = dict(enumerate(others, start=3)) | {7: "stack", 8: f"{others[0]}_stacked"}
            expected |= {place: interval(minus + other) for place, other in beside.items() if minus + other in FIGURES}
            assert cells == [expected.get(place, "") for place in range(9)], (heading, arm)


def test_no_arm_is_left_out() -> None:
    assert "swapped gate" in HEADING
    for heading in ("**Per user**", "**By time**"):
        arms = {arm for arm, *_ in rows(heading)}
        assert arms == {*SIMPLE, READER, *RECOMMENDERS, "stack", *VARIANTS} - ALIKE - ELSEWHERE
