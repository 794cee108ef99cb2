"""What a run's model takes in memory and on the wire, as lines to print."""

from lethe.config import RunFile
from lora.codec import Layout
from lora.model import AdaptedModel
from lora.plan import PLANS
from tasks.device import Room
from tasks.memory import Memory, in_gib, memory_of
from tasks.models import shape_of

GPU_BYTES = (24 * 2**30, 80 * 2**30)
"""GPUs for which the room is told."""


def memory_lines(run: RunFile) -> list[tuple[str, str, str]]:
    """Return (what, size, of what) for weights, adapters, passes and wire.

    Only the model's config is read, and a head, which depends on the data, is left out. Raises ModelError for a model
    that cannot be found.
    """
    causal = run.task.kind == "causal-lm"
    adapted = AdaptedModel.attach(shape_of(run.model, causal=causal), run.adapter)
    moves_frame = PLANS[run.federation.strategy].moves_frame
    layout = Layout((*(adapted.entries("A") if moves_frame else ()), *adapted.entries("B")))
    memory = memory_of(adapted, layout, causal=causal, recomputed=run.model.gradient_checkpointing)
    numbers = sum(parameter.numel() for parameter in adapted.base.parameters())
    dtype = next(adapted.base.parameters()).dtype
    return [
        (
            "weights",
            in_gib(memory.weights),
            f"{numbers:,} parameters, {str(dtype).removeprefix('torch.')}, frozen",
        ),
        ("frame A", in_gib(memory.frame), f"rank {run.adapter.rank}, {len(adapted.sites)} matrices, float32, frozen"),
        ("adapter", in_gib(memory.vector), f"{layout.size:,} numbers, float32; one example's gradient is as large"),
        ("sent up", in_gib(memory.sent), "B of one client and round, float32"),
        ("a token", in_gib(memory.blocks), "kept for the backward pass, without gradient checkpointing"),
        ("", in_gib(memory.inputs), "kept for the backward pass, with gradient checkpointing"),
        ("", in_gib(memory.logits), "its logits"),
        *(_room(memory, size) for size in GPU_BYTES),
    ]


def _room(memory: Memory, size: int) -> tuple[str, str, str]:
    """Say how many tokens fit into one training pass on a GPU of a size."""
    gpu, checkpointing = f"{size // 2**30} GiB GPU", "with" if memory.recomputed else "without"
    free = size - memory.weights - memory.frame
    if free <= 0:
        return gpu, "too small", "the weights alone do not fit"
    room = Room.within(free, token=memory.token, row=memory.row)
    return (
        gpu,
        f"{room.tokens:,} tokens",
        f"in one pass, each row counted as {room.row} more; {checkpointing} checkpointing",
    )
