"""Children that run together: order, restarts with back-off, and a clean end, with real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from lethe import supervisor
from lethe.processes import Command
from lethe.supervisor import Child, only_one, supervise
from lora.errors import DeploymentError


def python(name: str, code: str) -> Command:
    return Command(name, (sys.executable, "-c", textwrap.dedent(code)))


def stopping_when(done: Callable[[], bool], *, seconds: float = 20) -> Callable[[], bool]:
    """Ask a supervisor to stop as soon as something is so: what Ctrl-C would do."""
    end = time.monotonic() + seconds

    def ready() -> bool:
        if done() or time.monotonic() > end:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    return ready


def alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def gone(processes: Iterable[int], *, seconds: float = 10) -> bool:
    """Wait until all of them are gone; the system takes its time to bury the killed."""
    left, end = list(processes), time.monotonic() + seconds
    while any(map(alive, left)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, left))


def test_a_child_waits_until_the_one_before_it_is_ready(tmp_path: Path) -> None:
    begun, marks = tmp_path / "begun", tmp_path / "second"
    first = python("first", f"import time; time.sleep(0.5); open({str(begun)!r}, 'w'); time.sleep(60)")
    second = python("second", f"import os; open({str(marks)!r}, 'w').write(str(os.path.exists({str(begun)!r})))")
    last = Child(python("last", "import time; time.sleep(60)"), stopping_when(marks.exists))
    supervise([Child(first, begun.exists), Child(second), last], say=lambda line: None)
    assert marks.read_text() == "True"


def test_a_child_that_dies_is_started_again_later_and_later(tmp_path: Path) -> None:
    starts, told = tmp_path / "starts", list[str]()
    dying = Child(python("dying", f"import sys; open({str(starts)!r}, 'a').write('x'); sys.exit(7)"), wait=0.1)
    watching = python("watching", "import time; time.sleep(60)")
    enough = stopping_when(lambda: starts.exists() and len(starts.read_text()) >= 3)
    supervise([dying, Child(watching, enough)], say=told.append)
    ends = [line for line in told if line.startswith("dying: ended")]
    assert [line.removeprefix("dying: ended with exit code 7; ") for line in ends][:2] == ["starts again in 0 s"] * 2
    assert len(starts.read_text()) >= 3 and 0.4 <= dying.wait <= 1.6


def test_all_children_and_theirs_end_with_the_supervisor(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
        import os, subprocess, sys, time
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"
        own = subprocess.Popen([sys.executable, "-c", deaf])
        open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{own.pid}}\\n")
        time.sleep(99)
    """
    written = stopping_when(lambda: pids.exists() and pids.read_text().endswith("\n"))
    supervise([Child(python("parent", code), written)], say=lambda line: None)
    assert gone(map(int, pids.read_text().split()))


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    supervise([Child(python("x", "import time; time.sleep(9)"), stopping_when(lambda: True))], say=lambda line: None)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_child_dies_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""
        import sys
        from lethe.processes import Command
        from lethe.supervisor import Child, supervise
        child = "import os, time; open({str(pid)!r}, 'w').write(str(os.getpid()) + ' '); time.sleep(99)"
        supervise([Child(Command("child", (sys.executable, "-c", child)))], say=print)
    """
    root = Path(supervisor.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=root) as process:
        end = time.monotonic() + 30
        while not (pid.exists() and pid.read_text().endswith(" ")) and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    assert gone([int(pid.read_text())])


def test_a_program_that_is_not_installed_is_named_with_the_remedy() -> None:
    with pytest.raises(DeploymentError, match=r"no-such-program cannot be started \(No such file"):
        supervise([Child(Command("x", ("no-such-program",)))], say=lambda line: None)


def test_only_one_supervisor_has_a_folder(tmp_path: Path) -> None:
    again = only_one(tmp_path / "state", what="node north")
    held = rf"node north runs already \(process {os.getpid()}\)"
    with only_one(tmp_path / "state", what="node north"), pytest.raises(DeploymentError, match=held), again:
        pass
    with only_one(tmp_path / "state", what="node north"):
        pass
