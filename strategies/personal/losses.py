"""Losses of labelled prompts, one number a row: what trains a user's slot."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import ModelError
from tasks.learner import Task
from tasks.tokens import Batch

RowLoss = Callable[[nn.Module, Batch], Tensor]
"""Runs the bound base model on a batch and returns the loss of every row, `[rows]`; no row may look at another."""


class AnswerToken:
    """Next-token loss of a decoder on one answer token after the prompt; only that position's logits are computed.

    With `choices` (token ids, such as those of No and Yes) a row's label is a place among them and the softmax is over
    them alone; without, the label is a token id and the softmax is over the vocabulary.
    """

    def __init__(self, choices: Sequence[int] | None = None) -> None:
        self.choices = None if choices is None else torch.tensor(list(choices))

    def __call__(self, base: nn.Module, batch: Batch) -> Tensor:
        """Return the loss `[rows]`; labels are `[rows]`. Raises ModelError for a model that predicts no tokens."""
        return F.cross_entropy(self.logits(base, batch), batch.labels, reduction="none")

    def logits(self, base: nn.Module, batch: Batch) -> Tensor:
        """Return the logits `[rows, choices or vocabulary]` of the token after every prompt, float32."""
        vocabulary, body = _parts(base)
        states = body(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        # Padding stands on the right, where causal attention never looks back at it. One row, one position: the
        # layer before a head that is adapted too must still see rows.
        last = states[torch.arange(len(batch), device=states.device), batch.last.to(states.device)].unsqueeze(1)
        if self.choices is None or type(vocabulary) is not nn.Linear:
            whole: Tensor = vocabulary(last).squeeze(1).float()
            return whole if self.choices is None else whole[:, self.choices.to(whole.device)]
        places = self.choices.to(last.device)
        bias = None if vocabulary.bias is None else vocabulary.bias[places]
        return F.linear(last.squeeze(1), vocabulary.weight[places], bias).float()


def _parts(base: Any) -> tuple[nn.Module, nn.Module]:
    """Return the layer that predicts tokens, and the model below it."""
    found = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"{type(base).__name__} predicts no tokens, so an answer token cannot be scored; load a causal language "
            "model, or score a head (task_loss)"
        )
    return found, base.base_model


def task_loss(task: Task) -> RowLoss:
    """Return a task's own loss: a frozen head's over pooled states, or next-token over an example's learned tokens.

    Raises ModelError for a task with a trained head: a slot holds factors only.
    """
    if task.entries():
        raise ModelError("the task trains a head, which a user's slot has no room for; set task.head=frozen or none")
    return lambda base, batch: task.answer(base, batch, {}, None).loss
