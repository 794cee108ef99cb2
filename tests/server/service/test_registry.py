"""The registry: migrated once by whoever comes first, the same over SQLite and PostgreSQL."""

import threading
from pathlib import Path

import pytest
import torch
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from lora.codec import Entry, Layout
from lora.errors import ConfigError, RunError, Unavailable
from server.service.adapters import Adapters, NewAdapter
from server.service.registry import IDENTITY, Registry
from server.service.tables import Base

LAYOUT = Layout((Entry("B", "q", (3, 2)),))


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


def with_adapter(registry: Registry) -> Adapters:
    """Write an adapter to a registry."""
    adapters = Adapters(registry)
    adapters.write(NewAdapter("ana", torch.zeros(LAYOUT.size), LAYOUT, "tiny", 2))
    return adapters


@pytest.mark.parametrize("mounted", [True, False])
def test_another_folder_than_the_registrys_is_refused_and_no_adapter_is_lost(
    registry: Registry, tmp_path: Path, mounted: bool
) -> None:
    with_adapter(registry)
    url = str(registry.engine.url.render_as_string(hide_password=False))
    other = tmp_path / "other"
    if mounted:
        Registry(None, other).close()
    with pytest.raises(RunError, match=r"other has (no|another) registry\.id.*--data"):
        Registry(url, other)
    again = Registry(url, registry.folder)
    assert Adapters(again).recover() == (0, []) and Adapters(again).info("ana").state == "ready"
    again.close()


def test_a_new_registry_does_not_take_another_ones_files(tmp_path: Path) -> None:
    first = Registry(None, tmp_path / "one")
    with_adapter(first)
    first.close()
    with pytest.raises(RunError, match=r"has another registry\.id"):
        Registry(f"sqlite:///{tmp_path / 'new.sqlite'}", tmp_path / "one")
    assert [*(tmp_path / "one" / "adapters").glob("*.safetensors")]


@pytest.mark.parametrize("moved", [False, True])
def test_a_registry_of_the_first_version_takes_the_folder_that_has_its_files(
    registry: Registry, tmp_path: Path, moved: bool
) -> None:
    with_adapter(registry)
    with registry.engine.begin() as connection:
        connection.execute(text("ALTER TABLE changes DROP COLUMN folder"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    (registry.folder / IDENTITY).unlink()
    url = str(registry.engine.url.render_as_string(hide_password=False))
    if moved:
        with pytest.raises(RunError, match="has no"):
            Registry(url, tmp_path / "other")
        return
    again = Registry(url, registry.folder)
    assert len((registry.folder / IDENTITY).read_text().strip()) == 32 and Adapters(again).recover() == (0, [])
    again.close()
