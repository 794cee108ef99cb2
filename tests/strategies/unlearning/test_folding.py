"""GS-LoRA folded into an exported adapter: the sum of two products is one product of stacked factors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.unlearning.class_request import ClassRequest
from strategies.unlearning.config import BudgetConfig
from strategies.unlearning.folding import forget_classes, plain, stacked
from strategies.unlearning.gs_lora import GsLora
from tasks.exported import ExportedClassifier
from tasks.models import load_base
from tests.queries import TINY, export_classifier, queries


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedClassifier:
    place = export_classifier(Path(tmp_path_factory.mktemp("folding")) / "adapter")
    return ExportedClassifier.read(place, max_length=64)


def test_stacked_factors_are_the_sum_of_both_products(exported: ExportedClassifier, noise: torch.Generator) -> None:
    name = next(iter(exported.a))
    own = exported.b[name] @ exported.a[name] * exported.scale
    a, b = (torch.randn(shape, generator=noise) for shape in ((3, own.shape[1]), (own.shape[0], 3)))
    other_a, other_b = (torch.randn(shape, generator=noise) for shape in ((3, 8), (5, 3)))
    more = {("A", name): a, ("B", name): b, ("A", "new.site"): other_a, ("B", "new.site"): other_b}
    both = stacked(exported, more, scale=0.7)
    assert both.rank == exported.rank + 3 and both.scale == pytest.approx(exported.scale)
    torch.testing.assert_close(both.scale * both.b[name] @ both.a[name], own + 0.7 * b @ a)
    torch.testing.assert_close(both.scale * both.b["new.site"] @ both.a["new.site"], 0.7 * other_b @ other_a)
    for site in set(exported.a) - {name}:
        product = both.scale * both.b[site] @ both.a[site]
        torch.testing.assert_close(product, exported.scale * exported.b[site] @ exported.a[site])


def test_the_adapter_in_the_weights_answers_as_the_adapter_beside_them(exported: ExportedClassifier) -> None:
    rows = queries(0, 1, 2, 3)
    learner, values = exported.over(load_base(TINY, causal=False))
    tokens = learner.task.tokenize(rows)
    guesses = torch.zeros(len(rows), dtype=torch.long)
    for places, batch in learner.batches([(tokens, row) for row in range(len(tokens))]):
        answers = learner.answers(values, batch)
        assert answers.guess is not None
        guesses[torch.from_numpy(places)] = answers.guess
    whole = plain(exported, load_base(TINY, causal=False))
    assert whole.logits(rows).argmax(1).tolist() == guesses.tolist()


def test_what_gs_lora_forgot_is_forgotten_by_the_one_adapter(exported: ExportedClassifier) -> None:
    asked = ClassRequest((0,), queries(0), queries(1, 2, 3))
    model = plain(exported, load_base(TINY, causal=False))
    made = forget_classes(exported, model, asked, epochs=12, least_steps=0, seed=0)
    after = plain(made, load_base(TINY, causal=False))
    before = plain(exported, load_base(TINY, causal=False))
    right = [(model.logits(queries(0)).argmax(1) == 0).double().mean() for model in (before, after)]
    assert right[0] > 0.9 and right[1] < right[0] - 0.3
    assert made.rank > exported.rank and torch.equal(made.weight, exported.weight)


@pytest.mark.parametrize(("epochs", "least", "passes"), [(1, 0, 1), (1, 24, 5), (6, 24, 6)])
def test_a_small_sample_is_gone_through_until_it_fills_the_steps(
    exported: ExportedClassifier, monkeypatch: pytest.MonkeyPatch, epochs: int, least: int, passes: int
) -> None:
    seen: list[BudgetConfig] = []
    propose = GsLora.propose

    def listen(self: GsLora, model: Any, request: Any, budget: BudgetConfig, *, seed: int) -> Any:
        seen.append(budget)
        return propose(self, model, request, budget.model_copy(update={"epochs": 1}), seed=seed)

    monkeypatch.setattr(GsLora, "propose", listen)
    # 72 rows of what stays are 5 steps of 16.
    asked = ClassRequest((0,), queries(0), queries(1, 2, 3))
    model = plain(exported, load_base(TINY, causal=False))
    forget_classes(exported, model, asked, epochs=epochs, least_steps=least, seed=0)
    assert [(budget.epochs, budget.batch) for budget in seen] == [(passes, 16)]
