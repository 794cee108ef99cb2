"""Where the base model computes, in which precision and why; and how large a pass may be there."""

from dataclasses import dataclass

import torch

from lora.errors import ModelError
from tasks.config import ModelConfig

CPU_TOKENS = 2048
"""Most tokens in a pass on a CPU: bounds memory whatever the number of rows or clients; activations stay in cache."""
MOST_TOKENS = 65_536
"""Most tokens in a pass anywhere: the matrix products of any model are large enough to keep a GPU busy by then."""
MEMORY_SHARE = 0.5
"""Share of the free memory that a pass may fill; the rest is for one block's own gradients, clients' vectors, optimizer
states, and what the allocator cannot use."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees: its name, and whether it computes bfloat16 natively."""

    name: str
    bfloat16: bool


@dataclass(frozen=True)
class Machine:
    """What there is to compute on beside the CPU; GPU i of `gpus` is `cuda:i`."""

    gpus: tuple[Gpu, ...] = ()
    mps: bool = False

    @classmethod
    def here(cls) -> "Machine":
        """Look at this machine; nothing is allocated on any device."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return cls(tuple(_gpu(index) for index in range(count)), torch.backends.mps.is_available())


def _gpu(index: int) -> Gpu:
    # AMD's GPUs, which torch also calls cuda, all have it; NVIDIA's have from Ampere (8.0) on.
    native = torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)
    return Gpu(torch.cuda.get_device_name(index), native)


@dataclass(frozen=True)
class Placement:
    """Device and precision of a base model, and the reason for the device."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        """Say it as a run prints it: `bfloat16 base on cuda:0, NVIDIA H100: the only GPU`."""
        return f"{str(self.dtype).removeprefix('torch.')} base on {self.reason}"


ON_CPU = Placement(torch.device("cpu"), torch.float32, "cpu: as it was made")


def place(config: ModelConfig, machine: Machine | None = None) -> Placement:
    """Choose device and precision for `model.device` and `model.dtype`.

    `auto` takes the first GPU, else the CPU; and bfloat16 where a GPU computes it natively, else float32. Raises
    ModelError for a device that is not there.
    """
    seen = Machine.here() if machine is None else machine
    device, reason = _device(config.device, seen)
    dtype = _dtype(device, seen) if config.dtype == "auto" else getattr(torch, config.dtype)
    return Placement(device, dtype, reason)


def _device(wish: str, machine: Machine) -> tuple[torch.device, str]:
    kind, _, number = wish.partition(":")
    if wish == "cpu":
        return torch.device("cpu"), "cpu: as model.device asks"
    if wish == "mps" and machine.mps:
        return torch.device("mps"), "mps, Apple's GPU: as model.device asks"
    if wish == "auto" and not machine.gpus:
        only = "Apple's GPU is used where it is asked for, model.device=mps" if machine.mps else "no GPU is visible"
        return torch.device("cpu"), f"cpu: {only}"
    index = int(number or 0)
    if kind == "mps" or index >= len(machine.gpus):
        raise ModelError(f"model.device={wish}: {_visible(machine)}; use one of them, or model.device=auto")
    count = len(machine.gpus)
    why = "as model.device asks" if number else "the only GPU" if count == 1 else f"the first of {count} GPUs"
    return torch.device("cuda", index), f"cuda:{index}, {machine.gpus[index].name}: {why}"


def _visible(machine: Machine) -> str:
    names = [f"cuda:{index} ({gpu.name})" for index, gpu in enumerate(machine.gpus)]
    names += ["mps"] if machine.mps else []
    return f"torch sees {', '.join(names)} and cpu" if names else "torch sees no GPU, only cpu"


def _dtype(device: torch.device, machine: Machine) -> torch.dtype:
    native = device.type == "cuda" and machine.gpus[device.index].bfloat16
    return torch.bfloat16 if native else torch.float32


@dataclass(frozen=True)
class Room:
    """How large a pass may be: at most `tokens`, where every row counts as `row` tokens more than it is long."""

    tokens: int = CPU_TOKENS
    row: int = 0

    @classmethod
    def within(cls, free: int, *, token: int, row: int) -> "Room":
        """Return the room in `free` bytes, where a pass costs `token` bytes a token and `row` bytes a row.

        Half of the free memory, and at most MOST_TOKENS; a single row is never refused.
        """
        tokens = int(free * MEMORY_SHARE) // max(token, 1)
        return cls(max(1, min(tokens, MOST_TOKENS)), -(-row // max(token, 1)))


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device now; None where passes are not bound by its memory (the CPU)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def release(device: torch.device) -> None:
    """Give memory that nothing uses back to the device, for whoever else computes there."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
