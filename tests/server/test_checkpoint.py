"""Checkpoints: the newest whole one is there after a kill, a full disk or a flipped bit at any instant."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import server.checkpoint
from lora.errors import CheckpointError
from server.checkpoint import ARRAYS, STATE, Checkpoint, Checkpoints, check_config

ROOT = Path(server.checkpoint.__file__).parents[1]


def made(number: int, *, size: int = 50) -> Checkpoint:
    """Return a checkpoint whose every value tells its round."""
    moments: Any = {"m": np.full(3, number, dtype=np.float64), "v": np.full(3, -number, dtype=np.float32)}
    tally: dict[str, object] = {"epsilons": {"0": number / 7}, "refused": []}
    return Checkpoint(
        number, torch.full((size,), float(number)), moments, {"seed": 3, "model": {"name": "x"}}, 17, tally
    )


def assert_whole(found: Checkpoint | None, number: int) -> None:
    assert found is not None
    wanted = made(number, size=found.vector.numel())
    assert (found.round, found.config, found.ledger, found.tally) == (number, wanted.config, 17, wanted.tally)
    assert torch.equal(found.vector, wanted.vector)
    assert found.strategy.keys() == wanted.strategy.keys()
    for key, array in wanted.strategy.items():
        assert found.strategy[key].dtype == array.dtype
        assert np.array_equal(found.strategy[key], array)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    checkpoint = made(3)
    checkpoint.vector[:4] = torch.tensor([-0.0, float("inf"), 1e-42, float("nan")])
    Checkpoints(tmp_path).save(checkpoint)
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    assert found.vector.numpy().tobytes() == checkpoint.vector.numpy().tobytes()


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").latest() is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for number in range(1, 6):
        checkpoints.save(made(number))
        assert_whole(checkpoints.latest(), number)
    assert names(tmp_path) == [f"round-{number:05d}" for number in range(6 - keep, 6)]


def test_rounds_are_ordered_by_number(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in (99_998, 99_999, 100_000, 100_001):
        checkpoints.save(made(number))
    assert_whole(checkpoints.latest(), 100_001)
    assert names(tmp_path) == ["round-100000", "round-100001"]


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "round-notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(made(1))
    checkpoints.save(made(2))
    assert_whole(checkpoints.latest(), 2)
    assert names(tmp_path) == ["notes.txt", "round-00002", "round-notes"]


# --- Damage ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data(), file=st.sampled_from([STATE, ARRAYS]))
def test_law_a_flipped_bit_anywhere_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, file: str
) -> None:
    directory = tmp_path_factory.mktemp("flip")
    checkpoints = Checkpoints(directory)
    checkpoints.save(made(1))
    path = checkpoints.save(made(2)) / file
    raw = bytearray(path.read_bytes())
    place, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[place] ^= 1 << bit
    path.write_bytes(raw)
    found = checkpoints.latest()
    assert found is not None
    # A flipped bit may leave the same JSON behind (white space for white space); then nothing was lost.
    assert_whole(found, found.round)
    if file == ARRAYS:
        assert found.round == 1


@pytest.mark.parametrize("file", [STATE, ARRAYS])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path: Path, file: str, share: float) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(made(1))
    path = checkpoints.save(made(2)) / file
    os.truncate(path, int(path.stat().st_size * share))
    assert_whole(checkpoints.latest(), 1)
    checkpoints.save(made(2))
    assert_whole(checkpoints.latest(), 2)


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"round": 2}'])
def test_a_state_that_is_something_else_gives_way(tmp_path: Path, text: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(made(1))
    (checkpoints.save(made(2)) / STATE).write_text(text)
    assert_whole(checkpoints.latest(), 1)


@pytest.mark.parametrize("gone", [STATE, ARRAYS])
def test_a_missing_file_gives_way(tmp_path: Path, gone: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(made(1))
    (checkpoints.save(made(2)) / gone).unlink()
    assert_whole(checkpoints.latest(), 1)


def test_all_damaged_is_an_error_that_names_them(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        (checkpoints.save(made(number)) / ARRAYS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"round-00002: damaged.*round-00001: damaged"):
        checkpoints.latest()


def test_a_damaged_later_round_does_not_push_out_whole_ones(tmp_path: Path) -> None:
    """The run goes on from round 2 and saves 3 while a damaged 4 lies about (`checkpoint_every` may change)."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(made(2))
    whole = tmp_path / "aside"
    shutil.copytree(tmp_path / "round-00002", whole)
    (checkpoints.save(made(4)) / ARRAYS).write_bytes(b"")
    whole.rename(tmp_path / "round-00002")
    assert_whole(checkpoints.latest(), 2)
    checkpoints.save(made(3))
    assert_whole(checkpoints.latest(), 3)
    assert names(tmp_path) == ["round-00003"]


# --- Full disks and kills --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
def test_a_full_disk_is_an_error_and_the_earlier_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(made(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place = {"write": (Path, "open"), "fsync": (os, "fsync"), "rename": (Path, "rename"), "mkdir": (Path, "mkdir")}
    with monkeypatch.context() as broken:
        broken.setattr(*place[call], full)
        with pytest.raises(CheckpointError, match=r"round 2 cannot be written.*No space left.*make room"):
            checkpoints.save(made(2))
    assert_whole(checkpoints.latest(), 1)
    assert names(tmp_path) == ["round-00001"]
    checkpoints.save(made(2))
    assert_whole(checkpoints.latest(), 2)


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from lora.errors import CheckpointError
from server.checkpoint import Checkpoint, Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(Checkpoint(2, torch.full((50_000,), 2.0)))
except CheckpointError as error:
    print(error)
"""


def test_a_disk_that_fills_up_within_a_file_leaves_the_earlier_one(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(made(1))
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "round 2 cannot be written" in done.stdout
    assert names(tmp_path) == ["round-00001"]
    assert_whole(Checkpoints(tmp_path).latest(), 1)


SAVES = """
import sys
from pathlib import Path
import numpy as np, torch
from server.checkpoint import Checkpoint, Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
number = int(sys.argv[2])
while True:
    number += 1
    moments = {"m": np.full(3, number, dtype=np.float64), "v": np.full(3, -number, dtype=np.float32)}
    tally = {"epsilons": {"0": number / 7}, "refused": []}
    vector = torch.full((200_000,), float(number))
    checkpoints.save(Checkpoint(number, vector, moments, {"seed": 3, "model": {"name": "x"}}, 17, tally))
    print(number, flush=True)
"""


def test_law_a_kill_at_any_instant_leaves_the_newest_whole(tmp_path: Path) -> None:
    """With keep=1, so that saving and pruning leave nothing else to fall back on. One process forks the victims."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    source, saved = random.Random(seed), 0
    for _ in range(4):
        victim = subprocess.Popen(
            [sys.executable, "-c", SAVES, str(tmp_path), str(saved)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert victim.stdout is not None
        first = int(victim.stdout.readline())
        time.sleep(source.uniform(0, 0.05))
        victim.send_signal(signal.SIGKILL)
        reported = [first, *(int(line) for line in victim.stdout.read().split())]
        victim.wait()
        found = Checkpoints(tmp_path).latest()
        assert found is not None
        # The last save may have been whole and not yet reported.
        assert found.round in (reported[-1], reported[-1] + 1)
        assert_whole(found, found.round)
        saved = found.round


def test_law_a_kill_between_any_two_system_calls_leaves_the_newest_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop a save at each of its calls in turn, as a kill would: nothing after it is done, nothing is cleaned up."""

    class Killed(BaseException):
        pass

    class Countdown:
        left = 10**9

        @classmethod
        def wrap(cls, kind: object, name: str) -> None:
            real = getattr(kind, name)

            def counted(*args: object, **kwargs: object) -> object:
                if cls.left <= 0:
                    raise Killed
                cls.left -= 1
                return real(*args, **kwargs)

            monkeypatch.setattr(kind, name, counted)

    for kind, name in [
        (Path, "mkdir"),
        (Path, "open"),
        (Path, "rename"),
        (os, "fsync"),
        (os, "open"),
        (os, "rmdir"),
        (os, "unlink"),
    ]:
        Countdown.wrap(kind, name)
    Checkpoints(tmp_path, keep=1).save(made(1))
    latest, calls = 1, 0
    while True:
        Countdown.left = calls
        try:
            Checkpoints(tmp_path, keep=1).save(made(latest + 1))
        except Killed:
            Countdown.left = 10**9
            found = Checkpoints(tmp_path, keep=1).latest()
            assert found is not None
            assert found.round in (latest, latest + 1)
            assert_whole(found, found.round)
            latest, calls = found.round, calls + 1
        else:
            break
    assert calls > 8


# --- Another configuration -------------------------------------------------------------------------------------------


def test_another_config_is_an_error_that_names_every_key() -> None:
    then: dict[str, object] = {"seed": 1, "model": {"name": "a", "path": None}, "options": {}}
    now: dict[str, object] = {"seed": 2, "model": {"name": "b", "path": None}, "options": {"x": 1.0}}
    checkpoint = Checkpoint(4, torch.zeros(1), config=then)
    check_config(checkpoint, dict(then))
    with pytest.raises(CheckpointError) as caught:
        check_config(checkpoint, now)
    text = str(caught.value)
    assert all(
        piece in text for piece in ("round 4", "seed: 1 then, 2 now", "model.name: 'a' then, 'b' now", "options.x")
    )
    assert "model.path" not in text
