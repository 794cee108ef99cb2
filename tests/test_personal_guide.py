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


def test_every_figure_of_the_tables_is_the_results_files() -> None:
    for heading, split in (("**Per user**", "per_user"), ("**By time**", "global_time")):
        for arm, *cells in rows(heading):
            key = f"{split}_{arm}".replace(" + ", "_").replace(" ", "_").replace("-", "_")
            for cell, figure in zip(cells[:3], ("auc", "log_loss", "ndcg10"), strict=True):
                if cell:
                    mean, spread = FIGURES[f"{key}_{figure}"], FIGURES[f"{key}_{figure}_spread"]
                    assert cell == f"{shown(mean)} ±{shown(spread)}", (heading, arm, figure)
            if cells[3]:
                value, low = re.findall(r"[+-]?\.\d+", cells[3])[:2]
                minus = f"{split}_{arm}_minus_single_lora_equal_parameters".replace("-", "_")
                assert abs(float(value) - FIGURES[minus]) <= 5e-5 + 1e-9
                assert abs(float(low) - FIGURES[f"{minus}_low"]) <= 5e-5 + 1e-9


def test_no_arm_is_left_out() -> None:
    assert "swapped gate" in HEADING
    for heading in ("**Per user**", "**By time**"):
        arms = {arm for arm, *_ in rows(heading)}
        assert arms == {*SIMPLE, READER, *RECOMMENDERS, "stack", *VARIANTS} - ALIKE - ELSEWHERE
