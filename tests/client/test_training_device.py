"""Training beside the CPU and below float32: what is private stays float32, and nothing stays on the device."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from client import training
from client.job import ClientJob
from client.training import Trained, Work, train
from lora.codec import Part
from lora.gradients import ExampleGradients
from lora.plan import PLANS
from privacy.mechanism import Mechanism
from privacy.plan import PrivatePlan
from privacy.randomness import SeededRandomness
from strategies.federated.job import Job, World
from tasks.device import Placement
from tasks.tokens import Tokens

MakeJob = Callable[..., ClientJob]
CLIP, HEAD_CLIP = 0.01, 0.02
HALF = {"model": {"name": "tiny-bert", "dtype": "bfloat16"}}
CAUSAL_HALF = {"causal": True, "model": {"name": "tiny-llama", "dtype": "bfloat16"}}


def begin(job: ClientJob) -> Tensor:
    learner = job.world.learner
    source = torch.Generator().manual_seed(5)
    return learner.start() + 0.05 * torch.randn(learner.layout.size, generator=source)


def work(job: ClientJob, index: int, *, private: bool, noise: float = 0.8, tokens: Tokens | None = None) -> Work:
    tokens = tokens or job.world.client(index)
    head_clip = HEAD_CLIP if job.trains_head else None
    plan = PrivatePlan(Mechanism(CLIP, head_clip, noise), 0.5, 0.5 * len(tokens), 10, None, 1e-5)
    return Work(str(index), tokens, plan, SeededRandomness(3, index)) if private else Work(str(index), tokens)


def fit(job: ClientJob, *, clients: int = 2, private: bool = True, noise: float = 0.8) -> Trained:
    learner = job.world.learner
    parts: tuple[Part, ...] = PLANS[job.federation.strategy].at(1, head="head" in learner.layout.parts).train
    works = [work(job, index, private=private, noise=noise) for index in range(clients)]
    return train(learner, works, start=begin(job), config=job.training, parts=parts, seed=0, number=1)


# --- Half precision --------------------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Collects the floating types of everything that any operation takes or gives."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        self.dtypes |= {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()}
        return out


def watch(monkeypatch: pytest.MonkeyPatch, home: Any, name: str, seen: Seen) -> list[Any]:
    """Run a function of the private path under `seen`; returns the arguments of all its calls."""
    real, calls = getattr(home, name), []

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        with seen:
            return real(*arguments, **options)

    monkeypatch.setattr(home, name, watched)
    return calls


@pytest.mark.parametrize("traits", [HALF, CAUSAL_HALF, HALF | {"federation": {"strategy": "lora"}}])
def test_the_private_path_is_float32_over_a_bfloat16_base(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, traits: dict[str, Any]
) -> None:
    job = make_job(**traits)
    assert {p.dtype for p in job.world.learner.base.model.parameters()} == {torch.bfloat16}
    seen, taken = Seen(), watch(monkeypatch, ExampleGradients, "take", Seen())
    sums = watch(monkeypatch, training, "add_clipped", seen)
    for name in ("clip_factors", "_add_noise"):
        assert watch(monkeypatch, training, name, seen) == []
    steps = watch(monkeypatch, training._Optimizer, "step", seen)
    values = fit(job).values
    assert taken and {gradient.dtype for (_, _, _, gradient), _ in taken} == {torch.float32}
    assert sums and steps and values.dtype == torch.float32
    # Norms are float64, so that the square of any float32 fits; nothing is narrower than float32.
    assert seen.dtypes == {torch.float32, torch.float64}


@pytest.mark.parametrize("traits", [HALF, CAUSAL_HALF])
def test_clipped_gradients_of_a_bfloat16_base_keep_the_bound(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, traits: dict[str, Any]
) -> None:
    calls = watch(monkeypatch, training, "add_clipped", Seen())
    monkeypatch.setattr(ExampleGradients, "take", keep_for_good)
    fit(make_job(**traits))
    clipped = 0
    for (_, blocks), options in calls:
        rows = torch.cat([block.flatten(1) for block in blocks], dim=1)
        bound = HEAD_CLIP if blocks[-1].dim() == 2 and len(blocks) == 2 else CLIP
        norms = (rows * options["factors"][:, None]).double().norm(dim=1)
        assert (norms <= bound * (1 + 1e-6)).all()
        clipped += int((options["factors"] < 1).sum())
    assert clipped > 0


def keep_for_good(sink: ExampleGradients, part: Part, name: str, gradient: Tensor) -> None:
    sink.blocks[part, name] = gradient.clone()


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("traits", [HALF, CAUSAL_HALF])
def test_a_bfloat16_base_trains_towards_where_a_float32_base_does(
    make_job: MakeJob, traits: dict[str, Any], private: bool
) -> None:
    exact = make_job(**traits | {"model": traits["model"] | {"dtype": "float32"}})
    moved = [fit(job, private=private, noise=0.0).values - begin(job) for job in (make_job(**traits), exact)]
    assert torch.cosine_similarity(*moved, dim=1).min() > 0.98


# --- Gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("traits", [{}, {"causal": True}, {"federation": {"strategy": "lora"}}, CAUSAL_HALF])
def test_checkpointing_changes_no_result(make_job: MakeJob, traits: dict[str, Any], private: bool) -> None:
    job = make_job(**traits)
    other = job.model_copy(update={"model": job.model.model_copy(update={"gradient_checkpointing": True})})
    assert other.world.learner.adapted.recomputes and not job.world.learner.adapted.recomputes
    plain, again = fit(job, private=private), fit(other, private=private)
    torch.testing.assert_close(again.values, plain.values, rtol=1e-6, atol=1e-6)
    assert again.losses == pytest.approx(plain.losses, rel=1e-6)
    assert not torch.equal(plain.values[0], begin(job))


# --- Another device --------------------------------------------------------------------------------------------------


def live() -> int:
    """Return the bytes of all tensors that are alive."""
    gc.collect()
    places = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            places[storage.data_ptr()] = storage.nbytes()
    return sum(places.values())


@pytest.mark.parametrize("private", [False, True])
def test_a_round_leaves_nothing_behind_but_its_result(make_job: MakeJob, private: bool) -> None:
    job = make_job(training={"optimizer": "adamw"})
    fit(job, private=private)
    before = live()
    trained = fit(job, private=private)
    assert live() - before == trained.values.untyped_storage().nbytes()
    del trained
    assert live() == before


ELSEWHERE = Placement(torch.device("meta"), torch.bfloat16, "meta, a device that holds no numbers: for tests")


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    """Move parameters and buffers one by one: torch's own way does not take fake tensors."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


@contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch, *, slots: Callable[[int], list[int]]) -> Iterator[None]:
    """A double for a GPU: tensors without numbers, on a second device that refuses to meet tensors of the CPU.

    What would be read from the device is made up: a test sees where every tensor is, not what it holds.
    """
    monkeypatch.setattr("tasks.models.place", lambda config: ELSEWHERE)
    monkeypatch.setattr(PreTrainedModel, "to", _moved)
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: True)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: slots(len(tensor)))
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield


def one(count: int) -> list[int]:
    return [0] * count


def alternating(count: int) -> list[int]:
    return [row % 2 for row in range(count)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("clients", "private"), [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("traits", [{}, {"causal": True}, {"federation": {"strategy": "lora"}}])
def test_a_step_on_another_device_mixes_no_devices(  # noqa: PLR0917
    make_job: MakeJob,
    monkeypatch: pytest.MonkeyPatch,
    traits: dict[str, Any],
    clients: int,
    private: bool,
    checkpointing: bool,
) -> None:
    """Passes, clipping, noise and optimizer compute on one device, and the result comes back."""
    name = "tiny-llama" if "causal" in traits else "tiny-bert"
    job = make_job(**traits, model={"name": name, "gradient_checkpointing": checkpointing})
    shared = Job.model_validate_json(job.shared_json())
    shares = [World(shared).client(index) for index in range(clients)]
    with elsewhere(monkeypatch, slots=one if clients == 1 else alternating):
        world = World(shared)
        learner = world.learner
        parts: tuple[Part, ...] = PLANS[job.federation.strategy].at(1, head="head" in learner.layout.parts).train
        works = [work(job, index, private=private, tokens=share) for index, share in enumerate(shares)]
        begun = learner.start()
        devices = placed(learner.adapted.base) | {
            matrix.device.type for matrix in learner.adapted.frame.matrices.values()
        }
        trained = train(learner, works, start=begun, config=job.training, parts=parts, seed=0, number=1)
    assert (learner.device.type, devices, learner.workers) == ("meta", {"meta"}, 1)
    assert (begun.device.type, begun.dtype) == ("cpu", torch.float32)
    assert (trained.values.device.type, trained.values.dtype) == ("cpu", torch.float32)
    assert trained.values.shape == (clients, learner.layout.size)


def placed(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def test_the_double_refuses_to_mix_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(monkeypatch, slots=one), pytest.raises(RuntimeError, match="on the same device"):
        torch.zeros(3, 4, device="meta") @ torch.zeros(4, 2)
