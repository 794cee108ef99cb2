"""Adapters: a row and its file always agree, and whoever shares the registry sees a change within a second."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import text

from lora.codec import Entry, Layout
from lora.errors import DataError, ModelError, RunError, Unavailable, Unknown, WrongUpdate
from server.service import adapters as module
from server.service.adapters import Adapters, NewAdapter, RegistrySource
from server.service.registry import Registry
from server.service.warm import WarmSlots
from server.service.watch import Watch
from tests.server.service.conftest import emptied
from tests.server.service.postgres import Postgres

LAYOUT = Layout((Entry("B", "x", (3, 2)),))
OTHER = Layout((Entry("B", "y", (3, 2)),))


def new(name: str, value: float = 1.0, *, layout: Layout = LAYOUT, owner: str | None = None) -> NewAdapter:
    return NewAdapter(name, torch.full((6,), value), layout, "tiny", 2, owner)


@pytest.fixture
def adapters(registry: Registry) -> Adapters:
    return Adapters(registry)


def files(adapters: Adapters) -> list[str]:
    return sorted(file.name for file in adapters.folder.rglob("*") if file.is_file())


def test_what_was_written_is_read_and_versions_grow_for_ever(adapters: Adapters) -> None:
    first = adapters.write(new("ada", 1), new("Zoë/..", 2, owner="zoë"))
    assert {(info.name, info.owner) for info in adapters.infos()} == {("Zoë/..", "zoë"), ("ada", None)}
    assert {info.name for info in adapters.infos(owner="zoë")} == {"Zoë/.."}
    second = adapters.write(new("ada", 3))
    slot, info = adapters.read("ada")
    assert slot.tolist() == [3] * 6 and info.version == second > first
    adapters.remove("ada")
    third = adapters.write(new("ada", 4))
    assert third > second and len(files(adapters)) == 2
    with pytest.raises(Unknown, match="nobody"):
        adapters.read("nobody")


def test_what_is_remembered_of_a_row_ends_with_a_change(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapters.known("ada") is None
    adapters.write(new("ada", 1, owner="ada"))
    first = adapters.known("ada")
    assert first is not None and adapters.known("ada") is first
    adapters.write(new("ada", 2, owner="ada"))
    second = adapters.known("ada")
    assert second is not None and second.version > first.version
    infos = adapters.infos

    def interrupted(**asked: Any) -> Any:
        found = infos(**asked)
        adapters.doubt()
        return found

    adapters.doubt()
    monkeypatch.setattr(adapters, "infos", interrupted)
    assert adapters.known("ada") == second
    monkeypatch.undo()
    adapters.remove("ada")
    assert adapters.known("ada") is None


def test_names_are_no_paths(adapters: Adapters) -> None:
    adapters.write(new("../../outside", 5))
    assert adapters.read("../../outside")[0].tolist() == [5] * 6
    assert not [*adapters.registry.folder.parent.glob("outside*")]


def test_a_wrong_slot_or_name_changes_nothing(adapters: Adapters) -> None:
    adapters.write(new("ada", 1, owner="ada"))
    before = files(adapters), adapters.registry.count()
    with pytest.raises(DataError, match="there already"):
        adapters.write(new("eve", 2), new("ada", 2, owner="eve"))
    with pytest.raises(DataError, match="there already"):
        adapters.write(new("ada", 2, owner="ada"), replace=False)
    with pytest.raises(WrongUpdate, match="not finite"):
        adapters.write(new("bob", float("nan")))
    with pytest.raises(WrongUpdate, match="shape"):
        adapters.write(NewAdapter("bob", torch.zeros(5), LAYOUT, "tiny", 2))
    with pytest.raises(Unknown):
        adapters.remove("ada", "nobody")
    assert (files(adapters), adapters.registry.count()) == before and adapters.read("ada")[0][0] == 1


def test_a_full_disk_changes_nothing(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.write(new("ada", 1))
    before = files(adapters)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        adapters.write(new("ada", 2))
    monkeypatch.undo()
    assert files(adapters) == before and adapters.read("ada")[0][0] == 1


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_file_is_set_aside_and_named(adapters: Adapters, damage: str) -> None:
    adapters.write(new("ada", 1), new("bob", 2))
    (file,) = [adapters.folder / row.file for row in adapters.rows(["ada"]).values()]
    if damage == "cut":
        os.truncate(file, 20)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"x" * file.stat().st_size)
    kept = RegistrySource(adapters, LAYOUT).kept(["ada", "bob"])
    assert kept.names == ("bob",) and isinstance(kept.faults["ada"], ModelError) and "'ada'" in str(kept.faults["ada"])
    assert adapters.info("ada").state == "quarantined" and RegistrySource(adapters, LAYOUT).versions(["ada"]) == {}
    assert (adapters.folder / "quarantine" / file.name).exists() == (damage != "gone")
    adapters.write(new("ada", 3))
    assert adapters.read("ada")[0][0] == 3 and len(files(adapters)) == 2


def test_recovery_removes_strays_and_finds_damage(adapters: Adapters) -> None:
    adapters.write(new("ada", 1), new("bob", 2))
    (adapters.folder / "stray.safetensors").write_bytes(b"x")
    (adapters.folder / ".half.safetensors").write_bytes(b"x")
    (file,) = [adapters.folder / row.file for row in adapters.rows(["bob"]).values()]
    file.write_bytes(b"x")
    assert adapters.recover() == (2, ["bob"])
    assert adapters.recover() == (0, []) and adapters.read("ada")[0][0] == 1


def test_an_adapter_of_another_layout_is_listed_and_never_answers(adapters: Adapters) -> None:
    adapters.write(new("ada", 1, layout=OTHER))
    kept = RegistrySource(adapters, LAYOUT).kept(["ada"])
    assert kept.names == () and "another base or rank" in str(kept.faults["ada"])
    assert len(adapters.infos()) == 1


WRITER = """
import os, signal, sys, time
from pathlib import Path
import torch
from lora.codec import Entry, Layout
from server.service.adapters import Adapters, NewAdapter
from server.service.registry import Registry

def write(out):
    adapters = Adapters(Registry(sys.argv[1], Path(sys.argv[2])))
    layout, turn = Layout((Entry("B", "x", (3, 2)),)), 0
    while True:
        turn += 1
        adapters.write(NewAdapter(f"user-{turn % 5}", torch.full((6,), float(turn)), layout, "tiny", 2))
        os.write(out, b"%d\\n" % turn)

for line in sys.stdin:
    read, out = os.pipe()
    writer = os.fork()
    if not writer:
        write(out)
    os.close(out)
    with os.fdopen(read) as told:
        lines = [told.readline() for _ in range(7)]
        time.sleep(float(line))
        os.kill(writer, signal.SIGKILL)
        lines += told.readlines()
    os.waitpid(writer, 0)
    print(lines[-1], end="", flush=True)
"""


def test_after_a_kill_at_any_instant_rows_and_files_agree(registry: Registry, adapters: Adapters) -> None:
    url = registry.engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", WRITER, url, str(registry.folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], **pipes) as killer:
        assert killer.stdin is not None and killer.stdout is not None
        for pause in (0.0, 0.003, 0.007, 0.011, 0.016, 0.02):
            print(pause, file=killer.stdin, flush=True)
            acknowledged = int(killer.stdout.readline())
            adapters.recover()
            found = {info.name: float(adapters.read(info.name)[0][0]) for info in adapters.infos()}
            assert len(files(adapters)) == len(found) == 5
            # The last one that was acknowledged is there, or the one after it.
            assert max(found.values()) in (acknowledged, acknowledged + 1)
            assert all(len({*adapters.read(name)[0].tolist()}) == 1 for name in found)
            adapters.remove(*found)
        killer.stdin.close()


def eventually(true: Callable[[], bool], *, within: float) -> float:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < within
        time.sleep(0.01)
    return time.monotonic() - began


def test_another_process_sees_an_update_within_a_second(registry: Registry, adapters: Adapters) -> None:
    url = registry.engine.url.render_as_string(hide_password=False)
    other = Registry(url, registry.folder)
    warm = WarmSlots(RegistrySource(Adapters(other), LAYOUT), rows=4)
    heard = threading.Event()

    def changed() -> None:
        warm.doubt()
        heard.set()

    watch, out = Watch(other, changed), torch.zeros(1, 6)
    try:
        assert heard.wait(10)
        adapters.write(new("ada", 1))
        warm.gather(["ada"], out)
        for value in (2.0, 3.0):
            adapters.write(new("ada", value))
            eventually(lambda want=value: warm.gather(["ada"], out) and float(out[0, 0]) == want, within=1.0)
        adapters.remove("ada")
        eventually(lambda: isinstance(warm.gather(["ada"], out)[0], Unknown), within=1.0)
    finally:
        watch.close()
        other.close()


def test_a_database_that_goes_away_comes_back(postgres: Postgres, tmp_path: Path) -> None:
    registry = Registry(emptied(postgres), tmp_path)
    adapters = Adapters(registry)
    adapters.write(new("ada", 1))
    changes: list[float] = []
    watch = Watch(registry, lambda: changes.append(time.monotonic()))
    eventually(lambda: watch.reached and bool(changes), within=10)
    postgres.stop()
    try:
        with pytest.raises(Unavailable):
            adapters.write(new("ada", 2))
        eventually(lambda: not watch.reached, within=10)
    finally:
        postgres.start()
    eventually(lambda: watch.reached, within=10)
    adapters.recover()
    assert adapters.read("ada")[0][0] == 1 and len(changes) >= 2
    assert adapters.write(new("ada", 3))
    watch.close()
    adapters.remove("ada")
    registry.close()


def test_what_is_deleted_is_overwritten(registry_url: str | None, tmp_path: Path) -> None:
    if registry_url is not None:
        pytest.skip("PostgreSQL's files are its own")
    registry = Registry(None, tmp_path)
    adapters = Adapters(registry)
    adapters.write(*[new(f"secretive-{number}", owner="owner-unique") for number in range(60)])
    adapters.remove(*[f"secretive-{number}" for number in range(0, 60, 2)])
    adapters.remove(*[f"secretive-{number}" for number in range(1, 60, 2)])
    registry.scrub()
    data = b"".join(file.read_bytes() for file in tmp_path.rglob("registry.sqlite*"))
    assert b"owner-unique" not in data and b"secretive" not in data


def test_the_lock_lets_writers_wait_for_recovery(registry: Registry, adapters: Adapters) -> None:
    done: list[int] = []
    writer = threading.Thread(target=lambda: done.append(adapters.write(new("ada"))))
    with registry.hold(alone=True):
        writer.start()
        writer.join(0.1)
        assert writer.is_alive() and done == []
    writer.join(10)
    assert len(done) == 1
    with registry.session() as session:
        assert session.execute(text("SELECT count(*) FROM adapters")).scalar() == 1
