"""Small random models of every family that Lethe promises to adapt."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from lora.model import AdaptedModel

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def _bert() -> nn.Module:
    return BertModel(BertConfig(**TEXT))


def _roberta() -> nn.Module:
    return RobertaModel(RobertaConfig(**TEXT, max_position_embeddings=64))


def _distilbert() -> nn.Module:
    return DistilBertModel(DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48))


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2))


def _qwen() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**TEXT, num_key_value_heads=2))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))


def _vit() -> nn.Module:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4))


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], nn.Module]

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def inputs(self, rows: int = 5) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(1)
        if self.name == "vit":
            return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=source)}
        ids = torch.randint(3, 99, (rows, 9), generator=source)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    @staticmethod
    def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        answer = model(**inputs)
        return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state


FAMILIES = [
    Family(name, build)
    for name, build in {
        "bert": _bert,
        "roberta": _roberta,
        "distilbert": _distilbert,
        "llama": _llama,
        "qwen": _qwen,
        "gpt2": _gpt2,
        "vit": _vit,
    }.items()
]


@pytest.fixture
def random_blocks() -> Callable[..., dict[tuple[str, str], Tensor]]:
    """Random B's for an adapted model; another seed gives another owner's."""

    def make(adapted: AdaptedModel, *, seed: int = 0) -> dict[tuple[str, str], Tensor]:
        source = torch.Generator().manual_seed(seed)
        return {(e.part, e.name): 0.3 * torch.randn(e.shape, generator=source) for e in adapted.entries("B")}

    return make


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param
