"""Prompts tell titles and ratings in time order, and nothing by which somebody could be found."""

import re
from dataclasses import replace

import numpy as np

from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.prompts import Phrasing, prompts

LOG = builtin_interactions(users=8, items=60, events=20, seed=0)


def test_a_prompt_in_full() -> None:
    query = LOG.queries(np.array([LOG.starts[1] + 12]))
    text = prompts(LOG, query, query.latest(2), scores=np.array([0.0]))[0]
    rows = query.latest(2)[0]
    known = LOG.likes[query.first[0] : query.end[0]]
    titles, item = LOG.catalogue.titles, query.items[0]
    assert text.splitlines() == [
        "Ratings of a viewer, oldest first (out of 5):",
        *(f"{titles[LOG.items[row]]}: {LOG.ratings[row]:g}" for row in rows),
        f"Of the last {len(known)} films the viewer liked {known.sum()}.",
        "A recommender gives 50 percent.",
        f"Will the viewer like the film {titles[item]} ({LOG.catalogue.tags[item][0]})? Answer Yes or No.",
        "Answer:",
    ]


def test_no_id_is_in_a_prompt() -> None:
    queries = LOG.queries(np.arange(len(LOG)))
    for text in prompts(LOG, queries, queries.latest(10)):
        assert not re.search(r"user-|item-", text)


def test_the_target_and_the_future_do_not_change_a_prompt() -> None:
    row = int(LOG.starts[2]) + 9
    query = LOG.queries(np.array([row]))
    future = np.arange(int(query.end[0]), int(LOG.starts[3]))
    ratings = LOG.ratings.copy()
    ratings[future] = 5.5 - ratings[future]
    changed = replace(LOG, ratings=ratings)
    assert prompts(changed, query, query.latest(5)) == prompts(LOG, query, query.latest(5))


def test_a_new_viewer_is_asked_about_without_a_history() -> None:
    query = LOG.query("user-000", [4], time=0)
    lines = prompts(LOG, query, query.latest(5), phrasing=Phrasing(noun="book", tags=False))[0].splitlines()
    title = LOG.catalogue.titles[4]
    expected = f"Will the viewer like the book {title}? Answer Yes or No."
    assert lines == ["A viewer without earlier ratings.", expected, "Answer:"]
