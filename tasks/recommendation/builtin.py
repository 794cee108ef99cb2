"""A small world of interactions that needs no download, with structure to learn.

Users have tastes over a few genres, a level of their own that drifts, and items have a quality; a like follows from
level + quality + taste. Titles name their genre in words, so texts tell something that ids do not.
"""

import numpy as np

from tasks.recommendation.interactions import Floats, Interactions, Ints, Items

GENRES = {
    "Western": ("Dust", "Saddle", "Canyon", "Outlaw", "Ranch"),
    "Space": ("Orbit", "Comet", "Nebula", "Starship", "Moonbase"),
    "Romance": ("Letters", "Wedding", "Summer", "Kiss", "Garden"),
    "Crime": ("Alibi", "Heist", "Witness", "Verdict", "Ransom"),
    "Horror": ("Crypt", "Shriek", "Cellar", "Curse", "Fog"),
    "Comedy": ("Mishap", "Roommate", "Prank", "Cousin", "Holiday"),
}
_OPENINGS = ("The", "Return of the", "Beyond the", "A Night of", "Last", "Silent", "Golden", "Lost", "Second", "Seven")
_DAY = 86_400
_START = 1_000_000_000


def builtin_interactions(
    *, users: int = 120, items: int = 150, events: int = 60, seed: int = 0, taste: float = 1.6
) -> Interactions:
    """Make `users * events` or fewer interactions (items are not repeated), half stars from 0.5 to 5.

    `taste` scales how much genres matter beside a user's level and an item's quality.
    """
    rng = np.random.default_rng(seed)
    genre = rng.integers(len(GENRES), size=items)
    quality = rng.normal(0, 0.8, items)
    popularity = np.exp(rng.normal(0, 0.7, items))
    tastes = rng.normal(0, taste, (users, len(GENRES)))
    columns = [_life(user, tastes[user], genre, quality, popularity, min(events, items), rng) for user in range(users)]
    who, what, stars, when = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    names = tuple(f"user-{user:03d}" for user in range(users))
    return Interactions.arranged(who, what, stars, when, names, _catalogue(genre, rng))


def _life(  # noqa: PLR0917 (one user's part of the world)
    user: int, taste: Floats, genre: Ints, quality: Floats, popularity: Floats, events: int, rng: np.random.Generator
) -> tuple[Ints, Ints, Floats, Ints]:
    chosen = rng.choice(len(genre), size=events, replace=False, p=popularity / popularity.sum())
    # A walk, not a constant: what a user liked lately says more than what they ever liked.
    level = rng.normal(0, 0.6) + np.cumsum(rng.normal(0, 0.12, events))
    wish = level + quality[chosen] + taste[genre[chosen]] + rng.logistic(0, 0.7, events)
    stars = np.clip(np.rint(2 * (3.75 + 0.6 * wish)) / 2, 0.5, 5.0)
    # Some events share their time, as in real logs, where a page of items is rated at once.
    gaps = rng.integers(0, 4, events) * rng.integers(60, _DAY, events)
    times = _START + rng.integers(0, 300 * _DAY) + np.cumsum(gaps)
    return np.full(events, user, dtype=np.int64), chosen.astype(np.int64), stars, times.astype(np.int64)


def _catalogue(genre: Ints, rng: np.random.Generator) -> Items:
    kinds = list(GENRES)
    years = rng.integers(1960, 2020, len(genre))
    titles = []
    for index, kind in enumerate(genre):
        words = GENRES[kinds[kind]]
        opening = _OPENINGS[index % len(_OPENINGS)]
        titles.append(f"{opening} {words[index // len(_OPENINGS) % len(words)]} ({years[index]})")
    names = tuple(f"item-{index:03d}" for index in range(len(genre)))
    return Items(names, tuple(titles), tuple((kinds[kind],) for kind in genre))
