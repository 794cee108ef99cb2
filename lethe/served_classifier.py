"""A finished federation's classifier as a service needs it: its adapter, its head, and what it was asked to forget."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lethe.config import load_run_file
from lora.errors import RunError
from server.forgetting.gates import StoreGates
from server.forgetting.sources import FOLDER
from server.forgetting.store import STORE, Store
from server.service.texts import Gates
from tasks.exported import ExportedClassifier
from tasks.heads import Head
from tasks.learner import Classification, Learner
from tasks.models import load_base


@dataclass(frozen=True)
class ServedClassifier:
    """The learner, the vector that answers for nobody in particular, and the gates of forget requests, if any."""

    learner: Learner
    shared: Tensor
    gates: Gates | None


def open_classifier(directory: Path) -> ServedClassifier:
    """Read a finished federation's classifier. Raises RunError for a run that cannot be served."""
    run = load_run_file(directory / "config.yaml")
    if run.task.kind != "classification":
        raise RunError(f"{directory} is a language model's run; lethe serve takes classifiers and personal runs, and "
                       "its adapter is served by whatever serves PEFT directories")  # fmt: skip
    if not (directory / "adapter").is_dir():
        raise RunError(f"{directory} has no adapter yet; finish it by lethe resume {directory.name}")
    if (directory / FOLDER / STORE).is_file():
        store = Store(directory / FOLDER)
        served = store.served()
        return ServedClassifier(*_headless(served.learner, served.values), StoreGates(store, served))
    found = ExportedClassifier.read(directory / "adapter", max_length=run.task.max_length)
    return ServedClassifier(*_headless(*found.over(load_base(run.model, causal=False))), None)


def _headless(learner: Learner, values: Tensor) -> tuple[Learner, Tensor]:
    """Take the head out of the vector: users' adapters share it, as PEFT's directories demand."""
    views, task = learner.layout.views(values), learner.task
    if not isinstance(task, Classification):
        raise RunError("the run is no classifier's; serve one with task.kind=classification")
    head = Head(views["head", "weight"], views["head", "bias"], False)
    own = Learner(
        learner.base, learner.adapted, replace(task, head=head), trains_frame=False, labels=learner.labels
    )  # fmt: skip
    shared = own.start()
    for key, view in own.layout.views(shared).items():
        view.copy_(views[key])
    return own, shared
