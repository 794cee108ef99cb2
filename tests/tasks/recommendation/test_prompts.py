"""Prompts tell titles and ratings in time order, and nothing by which somebody could be found."""

import re
from dataclasses import replace

import numpy as np

from tasks.recommendation.builtin import builtin_interactions
from tasks.recommendation.prompts import Phrasing, events, prompts

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


def test_a_compact_prompt_is_the_users_own_lines_with_the_last_answer_left_out() -> None:
    log = builtin_interactions(users=3, items=40, events=30)
    row = int(log.starts[1] + 25)
    end = int(log.befores[row])
    queries = log.queries(np.array([row]))
    (text,) = prompts(log, queries, queries.latest(2), phrasing=Phrasing(compact=True))
    *lines, question = text.split("\n")
    assert lines == events(log, np.arange(end - 2, end), phrasing=Phrasing(compact=True))
    liked = int(log.likes[end - 20 : end].sum())
    item = int(log.items[row])
    assert question == f"{liked} {log.catalogue.titles[item]} {log.catalogue.tags[item][0]}:"
    for line, past in zip(lines, range(end - 2, end), strict=True):
        assert line.endswith(f": {'Yes' if log.likes[past] else 'No'} {round(2 * log.ratings[past])}")
    early = log.queries(log.starts[1:2] + 1)
    known = int(early.end[0] - early.first[0])
    (told,) = prompts(log, early, early.latest(0), phrasing=Phrasing(compact=True), scores=np.zeros(1))
    assert told.startswith(f"{int(log.likes[early.first[0] : early.end[0]].sum())}/{known} 50% ")
