"""`lethe config memory`: the arithmetic of a run's model, from its config alone."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from lethe.cli import main
from lethe.config import find_recipe, load_run_file
from lethe.notation import parse
from strategies.federated.job import Job
from tasks.device import place


def test_the_7b_recipe_is_shown_by_its_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ).save_pretrained(tmp_path)
    assert main(["config", "memory", "llama7b", f"model.path={tmp_path}"]) == 0
    shown = {line[:11].strip(): line.split()[-1] and line for line in capsys.readouterr().out.splitlines()}
    assert "12.6 GiB" in shown["weights"] and "6,738,415,616 parameters, bfloat16" in shown["weights"]
    assert "41.5 MiB" in shown["adapter"] and "10,878,976 numbers" in shown["adapter"]
    assert "41.5 MiB" in shown["sent up"]
    assert "tokens" in shown["24 GiB GPU"] and "with checkpointing" in shown["24 GiB GPU"]


def test_a_gpu_that_is_too_small_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ).save_pretrained(tmp_path)
    assert main(["config", "memory", "llama7b", f"model.path={tmp_path}", "model.dtype=float32"]) == 0
    assert "24 GiB GPU  too small" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [[], ["federation.strategy=lora"]])
def test_every_strategy_is_counted(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "memory", "quickstart", "model.name=tiny-bert", *overrides]) == 0
    world = Job.model_validate(load_run_file("quickstart", ["model.name=tiny-bert", *overrides]).model_dump()).world
    assert f"{world.learner.layout.size:,} numbers" in capsys.readouterr().out


def test_the_7b_recipe_asks_for_what_a_gpu_needs_in_few_keys() -> None:
    run = load_run_file("llama7b")
    assert run.model.gradient_checkpointing and run.privacy.private
    assert place(run.model).dtype == torch.bfloat16
    tree = parse(find_recipe("llama7b").read_text(), source="llama7b")
    assert isinstance(tree, dict)
    assert sum(len(section) for section in tree.values()) <= 15
