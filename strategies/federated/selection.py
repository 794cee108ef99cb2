"""Who trains in a round."""

import random
from collections.abc import Sequence

from strategies.federated.config import FederationConfig


def select(clients: Sequence[str], config: FederationConfig, *, seed: int, number: int) -> list[str]:
    """Choose the clients of a round, the same on every engine and after every resume.

    The draw depends on the seed and the round alone. It gives no privacy: a server sees who uploads, so nothing is
    amplified by it and nothing of it is accounted.
    """
    known = sorted(clients, key=natural)
    source = random.Random(f"select/{seed}/{number}")
    if config.sampling == "all":
        return known
    if config.sampling == "poisson":
        return [client for client in known if source.random() < config.fraction]
    wanted = max(1, round(config.fraction * len(known)))
    return sorted(source.sample(known, wanted), key=natural)


def natural(name: str) -> tuple[int, int, str]:
    """Sort key: numbers by value, before names; no two names are equal, so that no order depends on who came first."""
    # Python refuses to read thousands of digits, and a name comes from outside.
    return (0, int(name), name) if name.isdecimal() and len(name) < 20 else (1, 0, name)
