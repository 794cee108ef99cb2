"""Interactions out of files: what is read, and what is said of files that cannot be."""

from pathlib import Path

import numpy as np
import pytest

from lora.errors import DataError
from tasks.recommendation.config import RatingsConfig
from tasks.recommendation.files import load_interactions
from tasks.recommendation.interactions import Interactions
from tasks.recommendation.splits import global_time, per_user

DATA = Path(__file__).parents[3].parent / "shared" / "data" / "movielens_latest_small"

MOVIES = "movieId,title,genres\n10,Heat (1995),Action|Crime\n9,Up (2009),(no genres listed)\n"
RATINGS = "userId,movieId,rating,timestamp\n2,10,4.0,300\n1,9,3.5,200\n1,10,4.5,100\n"
TABLE = "user,item,rating,time,title\nada,x,4,2024-01-02T00:00:00,Heat\nbob,y,1,2024-01-01,Up\nada,y,5,1704067200,Up\n"


def folder(path: Path, *, ratings: str = RATINGS, movies: str = MOVIES) -> RatingsConfig:
    (path / "ratings.csv").write_text(ratings)
    (path / "movies.csv").write_text(movies)
    return RatingsConfig(path=str(path), core=1)


def table(path: Path, text: str = TABLE, **settings: object) -> RatingsConfig:
    (path / "events.csv").write_text(text)
    return RatingsConfig(path=str(path / "events.csv"), core=1, **settings)


def rows(log: Interactions) -> list[tuple[str, str, float, int]]:
    return [
        (log.user_names[user], log.catalogue.titles[item], rating, time)
        for user, item, rating, time in zip(log.users, log.items, log.ratings.tolist(), log.times.tolist(), strict=True)
    ]


def test_a_movielens_folder_is_read_and_sorted_by_user_and_time(tmp_path: Path) -> None:
    log = load_interactions(folder(tmp_path))
    assert rows(log) == [("1", "Heat (1995)", 4.5, 100), ("1", "Up (2009)", 3.5, 200), ("2", "Heat (1995)", 4.0, 300)]
    assert log.likes.tolist() == [True, False, True]
    assert log.catalogue.names == ("9", "10")
    assert log.catalogue.texts == ("Up (2009)", "Heat (1995). Genres: Action, Crime")
    assert log.catalogue.years.tolist() == [2009, 1995]


def test_one_table_with_names_of_its_own_and_dates(tmp_path: Path) -> None:
    renamed = TABLE.replace("user,item,rating,time,title", "who,what,stars,when,name")
    names = {"user": "who", "item": "what", "rating": "stars", "time": "when", "title": "name"}
    log = load_interactions(table(tmp_path, renamed, **names))
    day = 1704067200
    assert rows(log) == [("ada", "Up", 5, day), ("ada", "Heat", 4, day + 86400), ("bob", "Up", 1, day)]
    assert np.isnan(log.catalogue.years).all()


BAD = {
    "no column": (TABLE.replace("rating", "ratings", 1), "no column 'rating'; did you mean 'ratings'"),
    "no number": (TABLE.replace(",4,", ",good,"), "events.csv, line 2: rating 'good' is not a number"),
    "too high": (TABLE.replace(",1,", ",6,"), "events.csv, line 3: rating 6 is outside 0.5 to 5"),
    "not a rating": (TABLE.replace(",1,", ",nan,"), "events.csv, line 3: rating nan is outside"),
    "no time": (TABLE.replace("2024-01-01,", "yesterday,"), "line 3: time 'yesterday' is neither seconds"),
    "two units": (
        TABLE.replace("2024-01-01,", "1704067200999,"),
        r"line 4: .* like seconds, .*line 3\) like milli",
    ),
    "endless time": (TABLE.replace("2024-01-01,", "inf,"), "line 3: time 'inf' is neither"),
    "no user": (TABLE.replace("bob", " "), "events.csv, line 3: 'user' is empty"),
    "no title": (TABLE.replace("Heat", ""), "events.csv, line 2: 'title' is empty"),
    "twice": (TABLE + "ada,x,2,2024-01-02,Heat\n", r"line 5: user 'ada' rated item 'x' .* \(events.csv, line 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_named_by_file_and_line(tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    with pytest.raises(DataError, match=message):
        load_interactions(table(tmp_path, text))


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_may_be_separated_otherwise(tmp_path: Path, separator: str) -> None:
    assert rows(load_interactions(table(tmp_path, TABLE.replace(",", separator)))) == rows(
        load_interactions(table(tmp_path))
    )


@pytest.mark.parametrize("rest", ["", "123", "123456", "123456789"])
def test_times_as_numbers_are_of_any_common_unit(tmp_path: Path, rest: str) -> None:
    text = TABLE.replace("2024-01-02T00:00:00", f"1704153600{rest}").replace("2024-01-01", f"1704067200{rest}")
    log = load_interactions(table(tmp_path, text.replace("1704067200,Up\n", f"1704067200{rest},Up\n")))
    assert rows(log) == rows(load_interactions(table(tmp_path)))


def test_a_title_is_one_line(tmp_path: Path) -> None:
    log = load_interactions(table(tmp_path, TABLE.replace("Heat", '"Heat,\n the  film"')))
    assert log.catalogue.titles == ("Heat, the film", "Up")


def test_half_of_movielens_is_told_to_be_half(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(DataError, match=r"ratings.csv: looks like a part of MovieLens; give its folder"):
        load_interactions(RatingsConfig(path=str(tmp_path / "ratings.csv")))


def test_of_duplicates_the_first_counts_where_that_is_asked_for(tmp_path: Path) -> None:
    log = load_interactions(table(tmp_path, TABLE + "ada,x,2,2024-01-02,Heat\n", duplicates="first"))
    assert len(log) == 3 and log.ratings.tolist() == [5, 4, 1]


def test_the_same_item_at_another_time_is_a_new_event(tmp_path: Path) -> None:
    assert len(load_interactions(table(tmp_path, TABLE + "ada,x,2,2024-01-03,Heat\n"))) == 4


def test_a_film_without_a_title_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ratings.csv, line 5: item '11' has no title"):
        load_interactions(folder(tmp_path, ratings=RATINGS + "2,11,3.0,400\n"))


def test_a_folder_without_movies_says_what_it_has(tmp_path: Path) -> None:
    config = folder(tmp_path)
    (tmp_path / "movies.csv").unlink()
    with pytest.raises(DataError, match=r"has no movies.csv or movies.csv.gz \(it has ratings.csv\)"):
        load_interactions(config)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "ratings").mkdir()
    with pytest.raises(DataError, match=r"did you mean 'ratings'"):
        load_interactions(RatingsConfig(path=str(tmp_path / "rating")))


@pytest.mark.parametrize("scale", [{"lowest": 4.0}, {"highest": 3.0}])
def test_a_scale_without_likes_is_refused(scale: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="lowest < like_from <= highest"):
        RatingsConfig(**scale)


def test_without_a_path_there_is_a_generator() -> None:
    log = load_interactions(RatingsConfig(), seed=2)
    assert min(np.bincount(log.users)) >= 5 and min(np.bincount(log.items)) >= 5


@pytest.mark.data
@pytest.mark.skipif(not DATA.exists(), reason="no shared data")
def test_movielens_gives_the_protocol_of_the_reference_scores() -> None:
    log = load_interactions(RatingsConfig(path=str(DATA)))
    assert (len(log), len(log.user_names), len(log.catalogue)) == (90_274, 610, 3_650)
    assert log.likes.mean() == pytest.approx(0.4959, abs=5e-5)
    by_user, by_time = per_user(log), global_time(log)
    assert len(by_user.test) == 18_038
    assert log.likes[by_user.test].mean() == pytest.approx(0.477, abs=5e-4)
    assert (len(by_time.train), len(by_time.validation), len(by_time.test)) == (72_219, 9_028, 9_027)
    assert np.isin(log.users[by_time.test], log.users[by_time.train]).mean() == pytest.approx(0.0753, abs=1e-3)
