"""Messages need a sender, which Flower's runtime would set."""

import pytest

from strategies.flower import take_identity


@pytest.fixture(autouse=True)
def _identity() -> None:
    take_identity()
