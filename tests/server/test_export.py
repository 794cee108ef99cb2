"""The exported adapter in PEFT's hands: equal token states, and with the head file equal logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file

from server.checkpoint import Checkpoints
from server.export import CARD, HEAD, export
from server.job import ServerJob
from tasks.models import load_base
from tasks.tokens import collate

Make = Callable[..., Any]
CAUSAL = {"model": {"name": "tiny-llama"}, "task": {"kind": "causal-lm"}}
CASES: dict[str, dict[str, Any]] = {
    "trained head": {},
    "frozen head": {"task": {"head": "frozen", "head_init": "labels"}},
    "label embeddings": {"task": {"head": "none"}},
    "lora": {"federation": {"strategy": "lora"}},
    "decoder": {"model": {"name": "tiny-llama"}},
    "first token": {"task": {"pooling": "first"}},
    "causal": CAUSAL,
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_s_adapter_loads_in_peft_with_equal_answers(federation: Make, case: str) -> None:
    each = federation(**CASES[case])
    driver = each.driver()
    summary = driver.run()
    learner, world = driver.learner, driver.world
    directory = Path(summary["adapter_path"])
    assert directory == each.directory / "adapter"
    base = load_base(driver.job.model, causal=learner.base.causal)
    bare = load_base(driver.job.model, causal=learner.base.causal).model.eval()
    model = PeftModel.from_pretrained(base.model, str(directory)).eval()
    vector = Checkpoints(each.directory / "checkpoints").latest().vector  # type: ignore[union-attr]
    batch = collate([(world.test, row) for row in range(6)], pad=learner.pad)
    with torch.no_grad(), learner.adapted.bound(learner.layout.views(vector)) as adapted:
        ours = adapted(input_ids=batch.input_ids, attention_mask=batch.mask)[0]
    with torch.no_grad():
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.mask)[0]
        before = bare(input_ids=batch.input_ids, attention_mask=batch.mask)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 1e-3
    card = json.loads((directory / CARD).read_text())
    assert card["frame_digest"] == learner.adapted.frame.digest
    assert tuple(card["labels"]) == world.splits.label_names
    if case == "causal":
        assert not (directory / HEAD).exists()
        return
    logits = answer(theirs, batch, load_file(directory / HEAD), card["pooling"])
    found = learner.answers(vector, batch)
    assert torch.equal(logits.argmax(1), found.guess)
    torch.testing.assert_close(
        F.cross_entropy(logits, batch.labels, reduction="none"), found.loss, rtol=1e-5, atol=1e-5
    )


def answer(states: torch.Tensor, batch: Any, head: dict[str, torch.Tensor], pooling: str) -> torch.Tensor:
    """Answer as `lethe.json` says: weight @ (sqrt(20) * normalize(pooled token states)) + bias."""
    lengths = batch.mask.sum(1) if batch.mask is not None else torch.full((len(states),), states.shape[1])
    rows = [state[:length] for state, length in zip(states, lengths.tolist(), strict=True)]
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean": lambda row: row.mean(0),
        "first": lambda row: row[0],
        "last": lambda row: row[-1],
    }
    pooled = ways[pooling]
    features = F.normalize(torch.stack([pooled(row) for row in rows]), dim=1) * 20**0.5
    return features @ head["weight"].T + head["bias"]


def test_an_earlier_export_is_replaced(federation: Make) -> None:
    each = federation()
    job = ServerJob.model_validate(each.tree)
    learner, names = job.world.learner, job.world.splits.label_names
    first = export(learner, learner.start(), each.directory / "adapter", labels=names)
    (first / "stale.txt").write_text("old")
    moved = learner.start() + 1.0
    export(learner, moved, each.directory / "adapter", labels=names)
    assert not (first / "stale.txt").exists()
    weights = load_file(first / "adapter_model.safetensors")
    assert all(bool((value == 1.0).all()) for key, value in weights.items() if "lora_B" in key)
    assert [path.name for path in each.directory.iterdir()] == ["adapter"]
