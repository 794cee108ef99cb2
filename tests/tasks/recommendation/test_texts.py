"""Text embeddings do not depend on what else is in the batch."""

import numpy as np
import pytest

from tasks.config import ModelConfig
from tasks.models import load_base
from tasks.recommendation.texts import embedded


def test_embeddings_are_unit_vectors_of_each_text_alone() -> None:
    base = load_base(ModelConfig(name="tiny-bert", device="cpu"), causal=False)
    texts = ("Heat (1995)", "a", "A much longer title about many things (2001)", "Up (2009). Genres: Comedy")
    together = embedded(texts, base, batch=3)
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    for place, text in enumerate(texts):
        assert embedded([text], base)[0] == pytest.approx(together[place], abs=1e-5)
