"""Questions of four intents, and a tiny classifier that knows them, for tests of forgetting."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora.config import AdapterConfig
from server.export import export
from tasks.config import ModelConfig, TaskConfig
from tasks.examples import Examples
from tasks.heads import pool
from tasks.learner import Learner, build_learner

LABELS = ("alarm", "music", "weather", "money")
WORDS = {
    0: ("wake me at", "set an alarm for", "ring the bell at"),
    1: ("play a song by", "turn up the music of", "I like the band"),
    2: ("will it rain in", "how warm is", "tell me the weather of"),
    3: ("send cash to", "what do I owe", "pay the bill of"),
}
PLACES = ("noon", "Paris", "my sister", "seven", "the garden", "Rome", "everyone", "tomorrow")
TINY = ModelConfig(name="tiny-bert", device="cpu")


def sentences(label: int) -> list[str]:
    return [f"{start} {place}" for start in WORDS[label] for place in PLACES]


def queries(*labels: int, places: Sequence[str] = PLACES) -> Examples:
    """All sentences of some intents, or those that end in some of the places."""
    pairs = [(f"{start} {place}", label) for label in labels for start in WORDS[label] for place in places]
    return Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))


def write_queries(path: Path, examples: Examples) -> Path:
    rows = zip(examples.texts, examples.labels or (), strict=True)
    path.write_text("".join(json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in rows))
    return path


def tiny_learner() -> Learner:
    task = TaskConfig(kind="classification", head_init="random", head="trained")
    return build_learner(TINY, task, AdapterConfig(rank=2), labels=LABELS, trains_frame=False)


def fit_head(learner: Learner, examples: Examples) -> Tensor:
    """Return a vector whose trained head tells the classes apart: least squares on pooled features."""
    values = learner.start()
    tokens = learner.task.tokenize(examples)
    x = torch.zeros(len(tokens), learner.base.width)
    for places, batch in learner.batches([(tokens, row) for row in range(len(tokens))]):
        with torch.no_grad():
            states = learner.adapted.base(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
        x[torch.from_numpy(places)] = pool(states, batch, "mean")
    targets = torch.nn.functional.one_hot(torch.tensor(examples.labels), 4).float() * 8 - 4
    ones = torch.ones(len(x), 1)
    solved = torch.linalg.lstsq(torch.cat([x, ones], 1), targets).solution
    views = learner.layout.views(values)
    views["head", "weight"].copy_(solved[:-1].T)
    views["head", "bias"].copy_(solved[-1])
    return values


def export_classifier(directory: Path) -> Path:
    """Write the adapter of a classifier that answers all questions rightly."""
    learner = tiny_learner()
    values = fit_head(learner, queries(0, 1, 2, 3))
    b = learner.layout.span("B")
    values[b] = 0.001 * torch.randn(b.stop - b.start, generator=torch.Generator().manual_seed(0))
    return export(learner, values, directory, labels=LABELS)
