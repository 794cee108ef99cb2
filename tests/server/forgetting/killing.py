"""Kill a process that works on a store, at every place where a file appears or goes; run as a program.

    python -m tests.server.forgetting.killing TEMPLATE SCRATCH steps|writes

Every case is a fork of this process: a copy of TEMPLATE is worked on until the kill, then again until the end, and
what is left is compared with a copy that nobody disturbed. Prints one JSON object a case.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dbos  # noqa: F401 - loaded before the forks
import torch

from server.forgetting.requests import ForgetRequests
from server.forgetting.steps import Stage
from server.forgetting.store import Store

STORE = "store"


def carry_out(place: Path) -> None:
    ForgetRequests(Store(place / STORE)).carry_out()


def outcome(place: Path) -> dict[str, Any]:
    """Return everything that has to be the same whether or not there was a kill."""
    store = Store(place / STORE)
    known = [store.directory / "manifest.json"]
    known += [path for name in ("slots", "detectors") for path in sorted((store.directory / name).iterdir())]
    files = {path.name: path.read_bytes().hex() for path in known}
    requests = ForgetRequests(store)
    records = []
    for each in store.requests():
        record = dict(requests.status(each.id).record or {})
        if record.get("done", {}).get("trained"):
            record["done"]["trained"].pop("cpu_s", None)
        records.append({key: record.get(key) for key in ("asked", "done", "measured", "number")})
    left = [str(path.relative_to(place)) for path in place.rglob("*") if path.name in ("work", "reserved.json")]
    left += [str(path.relative_to(place)) for path in place.rglob("*.part")]
    left += [path.name for path in (store.directory / "reserved").iterdir()]
    adapters = sorted(path.name for path in (store.directory / "adapters").iterdir())
    return {"files": files, "records": records, "left": left, "adapters": adapters}


def forked(work: Callable[[], None]) -> int:
    """Return the wait status of a fork that works."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1]


class Bomb:
    """Counts events, and kills its process at one of them."""

    def __init__(self, fuse: int) -> None:
        self.fuse = fuse

    def tick(self) -> None:
        self.fuse -= 1
        if self.fuse < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_steps(self) -> None:
        """Kill when a step is through and before dbos knows."""
        run = Stage.run

        def stage_run(stage: Stage, step: str, request: Any) -> None:
            run(stage, step, request)
            self.tick()

        Stage.run = stage_run  # type: ignore[method-assign]

    def around_writes(self) -> None:
        """Kill before and after a file or directory of the store gets its name, or loses it."""
        for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
            setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Path, *arguments: Any, **options: Any) -> Any:
            mine = STORE in Path(path).parts and (Path(path).exists() or action is shutil.rmtree)
            if mine:
                self.tick()
            done = action(path, *arguments, **options)
            if mine:
                self.tick()
            return done

        return watched


def main(template: Path, scratch: Path, kind: str) -> None:
    torch.set_num_threads(1)
    shutil.copytree(template, scratch / "undisturbed")
    if forked(lambda: carry_out(scratch / "undisturbed")) != 0:
        raise SystemExit("the undisturbed store failed")
    expected = outcome(scratch / "undisturbed")
    for fuse in range(500):
        place = scratch / f"{fuse}"
        shutil.copytree(template, place)

        def work(fuse: int = fuse, place: Path = place) -> None:
            bomb = Bomb(fuse)
            bomb.after_steps() if kind == "steps" else bomb.around_writes()
            carry_out(place)

        status = forked(work)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        resumed = forked(lambda place=place: carry_out(place)) if killed else status  # type: ignore[misc]
        found = outcome(place) if resumed == 0 else {}
        differs = sorted(key for key in expected if found.get(key) != expected[key])
        print(json.dumps({"fuse": fuse, "killed": killed, "resumed": resumed, "differs": differs}), flush=True)
        shutil.rmtree(place)
        if not killed:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
