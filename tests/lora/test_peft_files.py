"""Adapters leave as PEFT directories and come back from them, with equal outputs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.model import AdaptedModel
from lora.peft_files import CONFIG, WEIGHTS, export_adapter, import_adapter

CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}


def export(adapted: AdaptedModel, blocks: Any, directory: Path, **traits: Any) -> Path:
    return export_adapter(adapted, blocks, directory, **{"reference": "some/base", "task_type": None, **traits})


def trained_by_peft(family: Any, **traits: Any) -> tuple[Any, Any]:
    """Train PEFT's own LoRA for two steps; returns it and its outputs."""
    targets = {"gpt2": ["c_attn"], "distilbert": ["q_lin", "v_lin"], "llama": ["q_proj", "v_proj"]}
    names = targets.get(family.name, ["query", "value"])
    names = ["q_proj", "v_proj"] if family.name in ("qwen", "vit") else names
    torch.manual_seed(7)
    twin = get_peft_model(family.make(), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": names, **traits}))
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.5)
    inputs = family.inputs()
    weights = torch.randn(family.output(twin, inputs).shape)
    for _ in range(2):
        optimizer.zero_grad()
        (family.output(twin, inputs) * weights).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return twin, family.output(twin.eval(), inputs)


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_peft_loads_what_is_exported(family: Any, targets: str, random_blocks: Any, tmp_path: Path) -> None:
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4, alpha=6, targets=targets))
    blocks = random_blocks(adapted)
    directory = export(adapted, blocks, tmp_path / "adapter")
    twin = PeftModel.from_pretrained(family.make(), str(directory)).eval()
    with adapted.bound(blocks) as model, torch.no_grad():
        ours, theirs = family.output(model, family.inputs()), family.output(twin, family.inputs())
        base = family.output(family.make(), family.inputs())
    torch.testing.assert_close(theirs, ours, **CLOSE)
    assert (ours - base).abs().max() > 1e-2


def test_a_trained_a_is_exported_in_place_of_the_frame(family: Any, random_blocks: Any, tmp_path: Path) -> None:
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4))
    blocks = random_blocks(adapted)
    blocks |= {("A", name): -0.5 * matrix for name, matrix in adapted.frame.matrices.items()}
    twin = PeftModel.from_pretrained(family.make(), str(export(adapted, blocks, tmp_path / "adapter"))).eval()
    with adapted.bound(blocks) as model, torch.no_grad():
        torch.testing.assert_close(family.output(twin, family.inputs()), family.output(model, family.inputs()), **CLOSE)


@pytest.mark.parametrize("traits", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_what_peft_trained_and_saved_is_imported(family: Any, traits: dict[str, Any], tmp_path: Path) -> None:
    twin, theirs = trained_by_peft(family, **traits)
    twin.save_pretrained(str(tmp_path))
    imported = import_adapter(tmp_path)
    assert imported.alpha == pytest.approx(12 if "use_rslora" in traits else 6)
    adapted, blocks = imported.attach(family.make())
    with adapted.bound(blocks) as model, torch.no_grad():
        ours, base = family.output(model, family.inputs()), family.output(family.make(), family.inputs())
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert (ours - base).abs().max() > 1e-3


def test_an_adapter_survives_both_ways(family: Any, random_blocks: Any, tmp_path: Path) -> None:
    adapted = AdaptedModel.attach(family.make(), AdapterConfig(rank=4, alpha=6))
    blocks = random_blocks(adapted)
    imported = import_adapter(export(adapted, blocks, tmp_path / "adapter"))
    assert imported.frame.digest == adapted.frame.digest
    assert imported.alpha == 6
    assert all(torch.equal(imported.b[name], block) for (_, name), block in blocks.items())


def test_the_config_says_what_servers_ask_for(random_blocks: Any, tmp_path: Path) -> None:
    adapted = small()
    directory = export(adapted, random_blocks(adapted), tmp_path / "x", task_type="CAUSAL_LM", extra={"NOTE": b"hi"})
    config = json.loads((directory / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("CAUSAL_LM", 2, 16)
    assert config["target_modules"] == ["down", "up"]
    assert LoraConfig.from_pretrained(str(directory)).r == 2
    assert sorted(path.name for path in directory.iterdir()) == sorted(["NOTE", CONFIG, WEIGHTS])
    assert (directory / "NOTE").read_bytes() == b"hi"


# -- refusals -------------------------------------------------------------------------------------------------------


def small_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"0": nn.ModuleDict({"up": nn.Linear(6, 5), "down": nn.Linear(5, 6)})})


def small() -> AdaptedModel:
    return AdaptedModel.attach(small_base(), AdapterConfig(rank=2))


@pytest.fixture
def saved(tmp_path: Path, random_blocks: Any) -> Path:
    adapted = small()
    return export(adapted, random_blocks(adapted), tmp_path / "adapter")


def amend(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias=lora_only is not supported; only bias=none"),
        ({"modules_to_save": ["down"], "target_modules": ["up"]}, r"modules_to_save=\['down'\] is not supported"),
        ({"rank_pattern": {"up": 1}}, r"rank_pattern=\{'up': 1\} is not supported"),
        ({"alpha_pattern": {"up": 1}}, r"alpha_pattern=\{'up': 1\} is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora changes the base model"),
    ],
)
def test_what_one_frame_and_scale_cannot_express_is_refused(
    traits: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """PEFT itself writes each of these directories."""
    config = LoraConfig(**{"r": 2, "target_modules": ["up", "down"], **traits})
    get_peft_model(small_base(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=message):
        import_adapter(tmp_path)


def test_another_method_than_lora_is_refused(saved: Path) -> None:
    amend(saved, peft_type="IA3")
    with pytest.raises(ModelError, match="peft_type=IA3; only LORA is read"):
        import_adapter(saved)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(ModelError, match=f"no {name}; give a PEFT LoRA directory"):
        import_adapter(saved)
    with pytest.raises(ModelError, match=f"no {CONFIG}"):
        import_adapter(saved / "nowhere")


@pytest.mark.parametrize(("name", "text"), [(CONFIG, b"{"), (CONFIG, b"\xff"), (CONFIG, b"[]"), (WEIGHTS, b"\0" * 9)])
def test_a_damaged_file_is_an_error_of_ours(name: str, text: bytes, saved: Path) -> None:
    (saved / name).write_bytes(text)
    with pytest.raises(ModelError, match="write the adapter again"):
        import_adapter(saved)


@pytest.mark.parametrize("changes", [{"r": None}, {"r": "many"}, {"lora_alpha": None}])
def test_a_rank_that_is_no_number_is_refused(changes: dict[str, Any], saved: Path) -> None:
    amend(saved, **changes)
    with pytest.raises(ModelError, match="r and lora_alpha must be numbers"):
        import_adapter(saved)


def test_tensors_must_pair_up_and_be_lora(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    odd = "base_model.model.0.up.lora_embedding_A"
    save_file({**tensors, odd: torch.zeros(1)}, saved / WEIGHTS)
    with pytest.raises(ModelError, match=f"'{odd}' is neither lora_A nor lora_B"):
        import_adapter(saved)
    save_file({key: t for key, t in tensors.items() if "up.lora_B" not in key}, saved / WEIGHTS)
    with pytest.raises(ModelError, match="2 lora_A and 1 lora_B tensors do not pair up"):
        import_adapter(saved)
    save_file({}, saved / WEIGHTS)
    with pytest.raises(ModelError, match="0 lora_A and 0 lora_B"):
        import_adapter(saved)


def test_another_base_is_refused(saved: Path) -> None:
    imported = import_adapter(saved)
    with pytest.raises(ModelError, match=r"names '0\.up', which the base model lacks"):
        imported.attach(nn.ModuleDict({"0": nn.ModuleDict({"down": nn.Linear(5, 6)})}))
    wide = nn.ModuleDict({"0": nn.ModuleDict({"up": nn.Linear(7, 5), "down": nn.Linear(5, 6)})})
    with pytest.raises(ModelError, match=r"lora_A of '0.up' has shape \(2, 6\).*need \(2, 7\)"):
        imported.attach(wide)


def test_a_layer_of_the_same_last_names_is_left_alone(saved: Path) -> None:
    base = nn.ModuleDict({"0": small_base()["0"], "other": nn.ModuleDict({"0": small_base()["0"]})})  # type: ignore[index]
    adapted, blocks = import_adapter(saved).attach(base)
    assert {site.name for site in adapted.sites} == {"0.up", "0.down"} == {name for _, name in blocks}


# -- kills ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


def contents(directory: Path) -> dict[str, bytes] | None:
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else None


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Raise Killed in place of the given file-system call, and in place of all later ones; counts the calls."""
    calls = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    monkeypatch.setattr("lora.peft_files.save_file", guarded(save_file))
    monkeypatch.setattr(Path, "write_text", guarded(Path.write_text))
    monkeypatch.setattr(Path, "write_bytes", guarded(Path.write_bytes))
    return lambda: calls


def test_an_existing_directory_is_replaced_as_a_whole(random_blocks: Any, tmp_path: Path) -> None:
    adapted = small()
    first, second = random_blocks(adapted, seed=1), random_blocks(adapted, seed=2)
    old = contents(export(adapted, first, tmp_path / "old", extra={"OLD": b"1"}))
    new = contents(export(adapted, second, tmp_path / "new", extra={"NEW": b"2"}))
    assert old != new
    seen, step, finished = [], 0, False
    while not finished:
        place = tmp_path / str(step)
        place.mkdir()
        directory = place / "adapter"
        export(adapted, first, directory, extra={"OLD": b"1"})
        with pytest.MonkeyPatch.context() as patch:
            kill_at(step, patch)
            try:
                export(adapted, second, directory, extra={"NEW": b"2"})
                finished = True
            except Killed:
                pass
        found = contents(directory)
        seen.append("old" if found == old else "new" if found == new else "gone" if found is None else "partial")
        if found is None:
            assert contents(place / f".adapter.{os.getpid()}.old") == old
        export(adapted, second, directory, extra={"NEW": b"2"})
        assert contents(directory) == new
        assert [path.name for path in place.iterdir()] == ["adapter"]
        step += 1
    assert set(seen) == {"old", "gone", "new"}
    assert seen.count("gone") == 1
    assert seen == sorted(seen, key=["old", "gone", "new"].index)
    assert step > 6
    shutil.rmtree(tmp_path)
