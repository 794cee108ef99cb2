"""The arithmetic of memory, against what autograd keeps: a 7B Llama without weights, by shape on the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lora.codec import Layout
from lora.config import AdapterConfig
from lora.gradients import ExampleGradients
from lora.model import AdaptedModel
from tasks.config import ModelConfig
from tasks.learner import CausalLM
from tasks.memory import in_gib, memory_of
from tasks.models import BaseModel, shape_of
from tasks.tokens import Batch

ROWS, TOKENS = 3, 16
LLAMA_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    use_cache=False,
)


class FusedAttention(torch.autograd.Function):
    """Keeps what a GPU's kernels keep (queries, keys, values, answer); on meta torch would keep all the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, answer)
        return answer

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@pytest.fixture(autouse=True)
def gpu_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: FusedAttention.apply(q, k, v))
    # Looks into the position ids whether several texts are packed into a row; on meta there is nothing to look at.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)


def llama() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LLAMA_7B).bfloat16()


def bert() -> nn.Module:
    with torch.device("meta"):
        return BertModel(BertConfig(), add_pooling_layer=False).bfloat16()


def attached(base: nn.Module, *, recompute: bool) -> tuple[AdaptedModel, Layout]:
    adapted = AdaptedModel.attach(base, AdapterConfig(rank=8))
    if recompute:
        adapted.recompute_blocks()
    return adapted, Layout(adapted.entries("B"))


def kept_bytes(adapted: AdaptedModel, work: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return what autograd keeps of a forward pass, beside weights and frame, and the pass's result."""
    storages: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    own = [*adapted.base.parameters(), *adapted.frame.matrices.values()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    for tensor in own:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values()), result


@pytest.mark.parametrize("recompute", [False, True])
def test_a_llama_of_7b_runs_forward_and_backward_by_shape(recompute: bool) -> None:
    """One step of private training with adapters on all matrices, bfloat16, as `recipes/llama7b.yaml` asks for."""
    adapted, layout = attached(llama(), recompute=recompute)
    memory = memory_of(adapted, layout, causal=True, recomputed=recompute)
    task = CausalLM(BaseModel(adapted.base, None, "llama-7b", True), TOKENS)
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="meta")
    blocks = layout.views(torch.zeros(layout.size, device="meta"))
    sink = ExampleGradients(layout, ("B",))

    def answer() -> Tensor:
        with adapted.bound(blocks, sink=sink) as model:
            return task.answer(model, Batch(ids, None, ids), blocks, sink).loss

    kept, loss = kept_bytes(adapted, answer)
    assert (loss.shape, loss.dtype) == ((ROWS,), torch.float32)
    loss.sum().backward()

    assert len(adapted.sites) == 7 * 32
    assert layout.size == 8 * 32 * (5 * 4096 + 2 * 11008) == 10_878_976
    shapes = {name: tuple(block.shape) for (_, name), block in sink.blocks.items()}
    assert shapes == {site.name: (ROWS, site.d_out, 8) for site in adapted.sites}
    assert {block.dtype for block in sink.blocks.values()} == {torch.float32}

    assert memory.weights == 2 * sum(p.numel() for p in adapted.base.parameters()) == 13_476_831_232
    assert memory.frame == 4 * 8 * 32 * (6 * 4096 + 11008)
    assert memory.vector == memory.sent == 4 * layout.size
    # What is kept: by the blocks, and of the logits 4 bytes an entry (their log-softmax).
    estimated = (memory.inputs if recompute else memory.blocks) + 4 * 32000
    one_block = memory.blocks // 32 if recompute else 0  # lives in the backward pass only
    factors = 0 if recompute else 2 * (layout.size + memory.frame // 4)
    found = (kept - factors) / (ROWS * TOKENS)
    assert 0.98 < (estimated - one_block) / found < 1.1
    assert memory.inputs < memory.blocks / 10
    print(f"7B: {in_gib(memory.weights)} weights, {in_gib(memory.sent)} B, {in_gib(memory.token)} a token")


@pytest.mark.parametrize("recompute", [False, True])
def test_an_encoder_is_counted_too(recompute: bool) -> None:
    adapted, layout = attached(bert(), recompute=recompute)
    memory = memory_of(adapted, layout, causal=False, recomputed=recompute)
    ids = torch.zeros(ROWS, 256, dtype=torch.long, device="meta")
    sink = ExampleGradients(layout, ("B",))

    def answer() -> Tensor:
        with adapted.bound(layout.views(torch.zeros(layout.size, device="meta")), sink=sink) as model:
            return model(input_ids=ids).last_hidden_state

    kept, states = kept_bytes(adapted, answer)
    states.float().sum().backward()
    estimated = memory.inputs - memory.blocks // 12 if recompute else memory.blocks
    assert 0.9 < estimated * ROWS * 256 / kept < 1.5
    assert memory.logits == 0
    assert memory.token == (memory.inputs if recompute else memory.blocks)
    assert memory.row == 2 * memory.vector == 8 * layout.size


@pytest.mark.parametrize(("causal", "dtype"), [(True, "bfloat16"), (False, "float32"), (False, "auto")])
def test_a_shape_has_no_weights(causal: bool, dtype: Any) -> None:
    shape = shape_of(ModelConfig(name="tiny-llama", dtype=dtype), causal=causal)
    assert {p.device.type for p in shape.parameters()} == {"meta"}
    assert {p.dtype for p in shape.parameters()} == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}


def test_bytes_are_told_in_three_digits() -> None:
    assert [in_gib(size) for size in (12, 2048, 43_515_904, 13_476_839_424)] == [
        "12 B",
        "2 KiB",
        "41.5 MiB",
        "12.6 GiB",
    ]
