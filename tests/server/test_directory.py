"""The directory of a run on the server: its name, who holds it, and what is written beside the records."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import server.directory
from lora.errors import RunError
from server.directory import RUNS_VARIABLE, check_unfinished, held, run_directory, write_config

ROOT = Path(server.directory.__file__).parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from server.directory import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_writes_below_the_place_of_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RUNS_VARIABLE, raising=False)
    assert run_directory({"name": "pilot"}, 7) == Path("runs/pilot")
    assert run_directory({"name": "", "run-dir": ""}, 7) == Path("runs/flower-7")
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    assert run_directory({"name": "pilot"}, 7) == tmp_path / "pilot"
    assert run_directory({"name": "pilot", "run-dir": "/else/where"}, 7) == Path("/else/where")


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "-x", "a" * 101, "a b"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(RunError, match="a run is named by"):
        run_directory({"name": name}, 7)


def test_a_live_run_is_not_joined_by_a_second(tmp_path: Path) -> None:
    with held(tmp_path / "pilot"), pytest.raises(RunError, match="run 'pilot' is going on"), held(tmp_path / "pilot"):
        pass
    with held(tmp_path / "pilot"):
        assert (tmp_path / "pilot").is_dir()


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="going on"), held(tmp_path):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        with held(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be used"), held(tmp_path / "file" / "run"):
        pass


def test_a_finished_run_is_not_begun_again(tmp_path: Path) -> None:
    check_unfinished(tmp_path, rounds=3)
    (tmp_path / "summary.json").write_text('{"rounds": 2}')
    check_unfinished(tmp_path, rounds=3)
    with pytest.raises(RunError, match="has finished all 2 rounds"):
        check_unfinished(tmp_path, rounds=2)


def test_the_sections_are_written_once(tmp_path: Path) -> None:
    sections = {"model": {"name": "tiny-bert"}, "data": {"labels": ["één", "zwei"]}}
    write_config(tmp_path, sections)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == sections
    write_config(tmp_path, {})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == sections
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
