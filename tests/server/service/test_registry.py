"""The registry: migrated once by whoever comes first, the same over SQLite and PostgreSQL."""

import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from lora.errors import ConfigError, RunError, Unavailable
from server.service.registry import Registry
from server.service.tables import Base


def test_the_migrations_make_the_tables_that_the_code_reads(registry: Registry) -> None:
    with registry.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    assert registry.count() == 0


def test_it_is_migrated_once_however_many_open_it(registry_url: str | None, tmp_path: Path) -> None:
    found: list[object] = []

    def open_it() -> None:
        try:
            opened = Registry(registry_url, tmp_path / "one")
            found.append(opened.count())
            opened.close()
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [0, 0, 0, 0]


def test_tables_of_a_newer_version_are_left_alone(registry: Registry) -> None:
    with registry.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RunError, match="version 9999, newer"):
        Registry(str(registry.engine.url.render_as_string(hide_password=False)), registry.folder)


@pytest.mark.parametrize(
    "url", ["mysql://somebody@localhost/x", "nonsense", "postgresql+nodriver://u:secret@localhost/x"]
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="postgresql") as caught:
        Registry(url, tmp_path)
    assert "secret" not in str(caught.value)


def test_a_database_that_is_away_is_said_to_be(tmp_path: Path, free_port: int) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        Registry(f"postgresql+psycopg://lethe@127.0.0.1:{free_port}/x", tmp_path)


def test_what_fails_leaves_nothing(registry: Registry) -> None:
    with pytest.raises(ZeroDivisionError), registry.session() as session:
        registry.changed(session)
        raise ZeroDivisionError
    assert registry.count() == 0
