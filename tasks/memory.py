"""How much memory a model with adapters needs, from its shapes alone: nothing is loaded or run."""

from collections import defaultdict
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora.codec import Layout
from lora.model import AdaptedModel

KEPT = 1.6
"""Numbers kept for the backward pass for every output of a block's linear layers (frozen weights keep no inputs): one
for what attention, activation and product keep, the rest for the norms' float32 inputs. A little above what Llama and
BERT keep, without the matrix of attention scores, which fused attention never makes."""
LOGIT_BYTES = 16
"""Bytes an entry of the logits costs at the peak: itself and its gradient in half precision, and in float32 itself, its
log-softmax and its gradient. A float32 base needs a little less."""


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for; `token` and `row` are multiplied by the size of a pass."""

    weights: int
    """The frozen base, in its own precision."""
    frame: int
    """The frozen A's, float32."""
    vector: int
    """All that trains of one client, float32; one example's gradient is as large."""
    sent: int
    """B, float32: what a client sends after a round of FFA-LoRA, and a trained head with it."""
    blocks: int
    """What the blocks keep of a token for the backward pass, without gradient checkpointing."""
    inputs: int
    """What they keep with it: every block's input, and one block that is being run again."""
    logits: int
    """Logits of a token, where a language model predicts it."""
    recomputed: bool
    """Whether gradient checkpointing is on."""

    @property
    def token(self) -> int:
        """Bytes that a token costs in a training pass."""
        return (self.inputs if self.recomputed else self.blocks) + self.logits

    @property
    def row(self) -> int:
        """Bytes that a row costs beside its tokens: its client's vector and a gradient of its own."""
        return 2 * self.vector


def memory_of(adapted: AdaptedModel, layout: Layout, *, causal: bool, recomputed: bool) -> Memory:
    """Add up the shapes of a model with adapters, on any device, also `meta`."""
    parameters = list(adapted.base.parameters())
    size = next(p.dtype for p in parameters if p.is_floating_point()).itemsize
    blocks = _outputs(adapted.base)
    kept = [int(KEPT * outputs * size) for outputs in blocks]
    width = int(getattr(adapted.base.config, "hidden_size", 0))
    last = 4 * width  # the last norm's input, float32
    vocabulary = int(getattr(adapted.base.config, "vocab_size", 0)) if causal else 0
    return Memory(
        weights=sum(p.numel() * p.element_size() for p in parameters),
        frame=4 * sum(entry.size for entry in adapted.entries("A")),
        vector=4 * layout.size,
        sent=4 * layout.length(["B", "head"]),
        blocks=sum(kept) + last,
        inputs=len(blocks) * width * size + max(kept, default=0) + last,
        logits=vocabulary * LOGIT_BYTES,
        recomputed=recomputed,
    )


def _outputs(base: nn.Module) -> list[int]:
    """Return, for every numbered block of the model, the outputs of its linear layers together."""
    found: dict[str, int] = defaultdict(int)
    for name, module in base.named_modules():
        block = _block(name)
        if block is not None and isinstance(module, nn.Linear | Conv1D):
            found[block] += module.out_features if isinstance(module, nn.Linear) else int(module.nf)
    return list(found.values())


def _block(name: str) -> str | None:
    pieces = name.split(".")
    first = next((place for place, piece in enumerate(pieces) if piece.isdigit()), None)
    return None if first is None else ".".join(pieces[: first + 1])


def in_gib(count: float) -> str:
    """Return bytes as a person reads them: 13.5 GiB, 41.5 MiB, 262 KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
