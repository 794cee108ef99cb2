"""Where the base computes and why, how large passes are there, and that every tensor of a pass is where it must be."""

from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from lora.errors import ModelError
from tasks.config import ModelConfig
from tasks.device import CPU_TOKENS, MOST_TOKENS, Gpu, Machine, Room, free_bytes, place, release
from tasks.tokens import Batch, _sent

NEW, OLD = Gpu("NVIDIA H100", True), Gpu("Tesla T4", False)
NONE, ONE, TWO, MAC = Machine(), Machine((NEW,)), Machine((OLD, NEW)), Machine(mps=True)


@pytest.mark.parametrize(
    ("wish", "machine", "expected"),
    [
        ("auto", NONE, "cpu: no GPU is visible"),
        ("auto", ONE, "cuda:0, NVIDIA H100: the only GPU"),
        ("auto", TWO, "cuda:0, Tesla T4: the first of 2 GPUs"),
        ("auto", MAC, "cpu: Apple's GPU is used where it is asked for, model.device=mps"),
        ("cpu", TWO, "cpu: as model.device asks"),
        ("cuda", ONE, "cuda:0, NVIDIA H100: the only GPU"),
        ("cuda:1", TWO, "cuda:1, NVIDIA H100: as model.device asks"),
        ("mps", MAC, "mps, Apple's GPU: as model.device asks"),
    ],
)
def test_a_device_is_chosen_with_a_reason(wish: str, machine: Machine, expected: str) -> None:
    chosen = place(ModelConfig(device=wish), machine)
    assert chosen.reason == expected
    assert expected.startswith(str(chosen.device))
    assert str(chosen) == f"{str(chosen.dtype).removeprefix('torch.')} base on {expected}"


@pytest.mark.parametrize(
    ("wish", "machine", "seen"),
    [
        ("cuda", NONE, "torch sees no GPU, only cpu"),
        ("cuda:2", TWO, r"torch sees cuda:0 \(Tesla T4\), cuda:1 \(NVIDIA H100\) and cpu"),
        ("cuda", MAC, "torch sees mps and cpu"),
        ("mps", ONE, r"torch sees cuda:0 \(NVIDIA H100\) and cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(wish: str, machine: Machine, seen: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.device={wish}: {seen}; use one of them, or model\.device=auto"):
        place(ModelConfig(device=wish), machine)


@pytest.mark.parametrize("wish", ["gpu", "cuda:", "cuda:x", "cpu:0", "CPU", ""])
def test_what_names_no_device_is_refused(wish: str) -> None:
    with pytest.raises(ValueError, match="device"):
        ModelConfig(device=wish)


@pytest.mark.parametrize(
    ("dtype", "device", "machine", "expected"),
    [
        ("auto", "auto", NONE, torch.float32),
        ("auto", "cpu", ONE, torch.float32),
        ("auto", "auto", ONE, torch.bfloat16),
        ("auto", "cuda:0", TWO, torch.float32),
        ("auto", "cuda:1", TWO, torch.bfloat16),
        ("auto", "mps", MAC, torch.float32),
        ("float16", "cuda:0", TWO, torch.float16),
        ("float32", "auto", ONE, torch.float32),
        ("bfloat16", "auto", NONE, torch.bfloat16),
    ],
)
def test_precision_follows_the_device_unless_it_is_named(
    dtype: Any, device: str, machine: Machine, expected: torch.dtype
) -> None:
    assert place(ModelConfig(dtype=dtype, device=device), machine).dtype == expected


def test_this_machine_is_looked_at() -> None:
    found = Machine.here()
    assert len(found.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert all(gpu.name for gpu in found.gpus)


@pytest.mark.parametrize(
    ("hip", "capability", "native"), [(None, (7, 5), False), (None, (9, 0), True), ("6", (7, 0), True)]
)
def test_gpus_are_known_by_name_and_precision(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, capability: tuple[int, int], native: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert Machine.here().gpus == (Gpu("GPU 0", native), Gpu("GPU 1", native))


# --- How large a pass may be -----------------------------------------------------------------------------------------


def test_a_pass_fills_half_of_the_free_memory_and_no_more_than_keeps_a_gpu_busy() -> None:
    assert Room() == Room(CPU_TOKENS, 0)
    assert Room.within(2_000_000, token=100, row=250) == Room(10_000, 3)
    assert Room.within(2**40, token=100, row=0) == Room(MOST_TOKENS, 0)
    assert Room.within(0, token=100, row=10) == Room(1, 1)


def test_memory_binds_passes_on_gpus_only() -> None:
    for kind in ("cpu", "meta"):
        assert free_bytes(torch.device(kind)) is None
        release(torch.device(kind))


# --- Batches ---------------------------------------------------------------------------------------------------------


def batch(*, mask: bool) -> Batch:
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    return Batch(ids, torch.tensor([[1, 1, 1], [1, 1, 0]]) if mask else None, torch.tensor([0, 1]))


@pytest.mark.parametrize("mask", [False, True])
def test_a_batch_moves_as_a_whole_and_only_once(mask: bool) -> None:
    own = batch(mask=mask)
    assert own.to(torch.device("cpu")) is own
    moved = own.to(torch.device("meta"))
    assert moved.to(torch.device("meta")) is moved
    tensors = [moved.input_ids, moved.labels, moved.last, *([moved.mask] if moved.mask is not None else [])]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.mask is None) == (own.mask is None)
    assert np.array_equal(own.last.numpy(), [2, 1] if mask else [2, 2])


def test_a_batch_for_a_gpu_is_pinned_and_the_cpu_does_not_wait() -> None:
    tensor = MagicMock(spec=Tensor)
    device = torch.device("cuda", 1)
    assert _sent(tensor, device) is tensor.pin_memory.return_value.to.return_value
    tensor.pin_memory.return_value.to.assert_called_once_with(device, non_blocking=True)
