"""The finished adapter as a directory: PEFT's files, the head, and what is needed to answer with them."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from lora.peft_files import export_adapter
from tasks.exported import CARD, HEAD
from tasks.learner import Classification, Learner

__all__ = ["CARD", "HEAD", "export"]


def export(learner: Learner, vector: Tensor, directory: Path, *, labels: Sequence[str]) -> Path:
    """Write the global adapter; `lethe.json` says how the head reads the token states."""
    blocks = learner.peft_blocks(vector)
    causal = learner.base.causal
    card: dict[str, object] = {"frame_digest": learner.adapted.frame.digest, "labels": list(labels)}
    extra = learner.files(vector)
    if isinstance(learner.task, Classification):
        head = learner.task.head
        weight, bias = blocks.get(("head", "weight"), head.weight), blocks.get(("head", "bias"), head.bias)
        extra[HEAD] = save({"weight": weight.contiguous(), "bias": bias.contiguous()})
        card |= {
            "pooling": learner.task.pooling,
            "logits": "weight @ (sqrt(20) * normalize(pooled token states)) + bias",
        }
    extra[CARD] = (json.dumps(card, indent=1) + "\n").encode()
    return export_adapter(
        learner.adapted,
        blocks,
        directory,
        reference=learner.base.reference,
        task_type="CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
        extra=extra,
    )
