"""What vLLM would refuse or drop is refused here, by name; what it serves passes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora.config import AdapterConfig
from lora.errors import ModelError
from lora.model import AdaptedModel
from lora.peft_files import CONFIG, WEIGHTS, export_adapter
from lora.vllm import RANKS, check_for_vllm
from strategies.personal.slots import UserSlots

SMALL = LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=20)


def exported(model: Any, folder: Path, *, rank: int = 2, targets: Any = "all", task: str | None = "CAUSAL_LM") -> Path:
    adapted = AdaptedModel.attach(model, AdapterConfig(rank=rank, alpha=4, targets=targets))
    layout = UserSlots.of(adapted).layout
    return export_adapter(adapted, layout.views(torch.ones(layout.size)), folder, reference="llama", task_type=task)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return exported(LlamaForCausalLM(SMALL), tmp_path / "adapter")


@pytest.mark.parametrize("rank", [1, 2, 8, 9])
def test_a_decoders_adapter_passes_with_the_smallest_rank_that_takes_it(tmp_path: Path, rank: int) -> None:
    folder = exported(LlamaForCausalLM(SMALL), tmp_path / "a", rank=rank)
    found = check_for_vllm(folder)
    assert found.rank == rank and found.max_lora_rank == {1: 1, 2: 8, 8: 8, 9: 16}[rank]
    assert found.command("ana", folder) == (
        f"vllm serve llama --enable-lora --max-lora-rank {found.max_lora_rank} --lora-modules ana={folder}"
    )
    assert [*RANKS] == sorted(RANKS)


def test_what_peft_itself_writes_passes_or_is_named(tmp_path: Path) -> None:
    plain = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM(SMALL), plain).save_pretrained(tmp_path / "plain")
    assert check_for_vllm(tmp_path / "plain").rank == 4
    for key, more in {
        "use_dora": {"use_dora": True},
        "rank_pattern": {"rank_pattern": {"q_proj": 8}},
        "alpha_pattern": {"alpha_pattern": {"q_proj": 8}},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "bias": {"bias": "lora_only"},
    }.items():
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
        get_peft_model(LlamaForCausalLM(SMALL), config).save_pretrained(tmp_path / key)
        with pytest.raises(ModelError, match=f"^{key}="):
            check_for_vllm(tmp_path / key)


def test_encoders_and_other_decoders_are_refused(tmp_path: Path) -> None:
    bert = BertModel(BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ModelError, match="task_type=FEATURE_EXTRACTION: vLLM serves adapters of decoders only"):
        check_for_vllm(exported(bert, tmp_path / "bert", task="FEATURE_EXTRACTION"))
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(ModelError, match=r"fan_in_fan_out|knows no such module"):
        check_for_vllm(exported(gpt, tmp_path / "gpt"))


def changed(folder: Path, **config: Any) -> None:
    old = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(old | config))


def renamed(folder: Path, change: Callable[[str], str | None], dtype: torch.dtype | None = None) -> None:
    tensors = load_file(folder / WEIGHTS)
    kept = {new: value.to(dtype or value.dtype) for name, value in tensors.items() if (new := change(name)) is not None}
    save_file(kept, folder / WEIGHTS)


def test_a_wrong_beginning_would_answer_from_the_base(folder: Path) -> None:
    renamed(folder, lambda name: name.replace("base_model.model.model.", "base_model.model."))
    with pytest.raises(ModelError, match="would answer from the base model"):
        check_for_vllm(folder)


def test_half_pairs_other_ranks_and_other_numbers_are_refused(folder: Path) -> None:
    changed(folder, r=3)
    with pytest.raises(ModelError, match="not of rank 3"):
        check_for_vllm(folder)
    changed(folder, r=1024)
    with pytest.raises(ModelError, match="from 1 to 512"):
        check_for_vllm(folder)
    changed(folder, r=2)
    renamed(folder, lambda name: name, torch.float64)
    with pytest.raises(ModelError, match="F64"):
        check_for_vllm(folder)
    renamed(folder, lambda name: None if "layers.1.mlp.up_proj.lora_B" in name else name, torch.bfloat16)
    with pytest.raises(ModelError, match=r"up_proj\.lora_A.*comes without"):
        check_for_vllm(folder)


def test_what_is_no_adapter_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=CONFIG):
        check_for_vllm(tmp_path)
    (folder / WEIGHTS).write_bytes(b"x")
    with pytest.raises(ModelError, match=WEIGHTS):
        check_for_vllm(folder)
    changed(folder, lora_alpha=None)
    with pytest.raises(ModelError, match="lora_alpha"):
        check_for_vllm(folder)
