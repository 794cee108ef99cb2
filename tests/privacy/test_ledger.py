"""The ledger's guarantee: kills, full disks, rivals and damage can only over-count."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import BudgetExceeded, PrivacyError
from privacy.accounting import Event, calibrate, epsilon
from privacy.ledger import Charge, Ledger

ROOT = Path(__file__).parents[2]
# An event whose cost has a closed form: the ledger's own speed is what a kill meets.
QUICK = Event(rate=1.0, noise_multiplier=0.05, steps=1)
PRELUDE = """
import os, random, resource, signal, sqlite3, sys, time
from pathlib import Path
from lora.errors import BudgetExceeded, PrivacyError
from privacy.accounting import Event, calibrate
from privacy.ledger import Ledger
folder = Path(sys.argv[1])
ledger = Ledger(folder / "ledger.db")
quick = Event(rate=1.0, noise_multiplier=0.05, steps=1)
def charge(client, event=quick, budget=None):
    return ledger.charge(client, event, purpose="test", budget=budget, delta=1e-5)
"""
KILLS = """
random.seed(int(sys.argv[2]))
for trial in range(40):
    drawn = folder / f"drawn-{trial}"
    child = os.fork()
    if child == 0:
        while True:
            charge(f"client-{trial}")
            with drawn.open("ab", buffering=0) as marks:
                marks.write(b".")
    # Every second trial may kill before the first charge; the others kill a worker that is at it.
    while trial % 2 and not drawn.exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    count = drawn.stat().st_size if drawn.exists() else 0
    print(count, len(Ledger(folder / "ledger.db").rows(f"client-{trial}")))
"""
RIVALS = """
noise = calibrate(epsilon=2.0, delta=1e-5, rate=1.0, steps=20)
for worker in range(3):
    if os.fork() == 0:
        try:
            while True:
                charge("shared", Event(1.0, noise, 1), budget=2.0)
        except BudgetExceeded:
            os._exit(0)
        os._exit(1)
print(*[os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)])
"""
FULL = """
charge("first")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = (folder / "ledger.db").stat().st_size + 8192
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
charged = 1
try:
    while True:
        charge("first")
        charged += 1
except PrivacyError as error:
    print(charged, len(ledger.rows()), error)
"""
READ_ONLY = """
charge("first")
(folder / "ledger.db").chmod(0o444)
folder.chmod(0o555)
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    charge("first")
except PrivacyError as error:
    print(len(ledger.rows()), error)
"""


def run(script: str, folder: Path, *arguments: str) -> str:
    """Run a script in a process of its own, and return what it printed."""
    command = [sys.executable, "-c", PRELUDE + script, str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=120).stdout


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def charge(ledger: Ledger, client: str = "ann", event: Event = QUICK, budget: float | None = None) -> float:
    return ledger.charge(client, event, purpose="test", budget=budget, delta=1e-5)


def test_calibrated_noise_passes_to_the_last_planned_step_and_not_beyond(ledger: Ledger) -> None:
    noise = calibrate(epsilon=3.0, delta=1e-5, rate=0.05, steps=60)
    spent = [charge(ledger, event=Event(0.05, noise, 5), budget=3.0) for _ in range(12)]
    assert spent == sorted(spent) and 2.99 < spent[-1] <= 3.0
    with pytest.raises(BudgetExceeded, match=r"'ann' has spent epsilon 2\.99\d of its budget 3 at delta 1e-05") as said:
        charge(ledger, event=Event(0.05, noise, 5), budget=3.0)
    assert "raise privacy.epsilon" in str(said.value) and "5 more steps (test) would make it 3." in str(said.value)
    assert ledger.position() == len(ledger.rows()) == 12
    assert ledger.epsilon("ann", delta=1e-5) == spent[-1]


@given(
    st.lists(
        st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from([0.9, 2.0]), st.integers(1, 30)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=15)
def test_reloading_composes_all_committed_events_and_never_passes_the_budget(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[str, float, int]]
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    committed: dict[str, list[Event]] = {"ann": [], "bob": []}
    for client, noise, steps in requests:
        event = Event(0.05, noise, steps)
        wanted = epsilon([*committed[client], event], delta=1e-5)
        if wanted <= 2.0:
            assert charge(Ledger(path), client, event, budget=2.0) == wanted
            committed[client].append(event)
        else:
            with pytest.raises(BudgetExceeded):
                charge(Ledger(path), client, event, budget=2.0)
    reloaded = Ledger(path)
    for client, history in committed.items():
        assert reloaded.events(client) == history
        assert reloaded.epsilon(client, delta=1e-5) == epsilon(history, delta=1e-5) <= 2.0
    assert reloaded.clients() == sorted(client for client, history in committed.items() if history)


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_at_any_instant_never_undercounts(tmp_path: Path, seed: int) -> None:
    counts = [tuple(map(int, line.split())) for line in run(KILLS, tmp_path, str(seed)).splitlines()]
    assert len(counts) == 40 and sum(drawn > 0 for drawn, _ in counts) >= 20
    assert all(drawn <= rows <= drawn + 1 for drawn, rows in counts)


def test_rivals_cannot_spend_the_same_remainder(tmp_path: Path) -> None:
    assert run(RIVALS, tmp_path).split() == ["0", "0", "0"]
    ledger = Ledger(tmp_path / "ledger.db")
    assert len(ledger.rows("shared")) == 20
    assert ledger.epsilon("shared", delta=1e-5) <= 2.0


def test_a_full_disk_charges_nothing(tmp_path: Path) -> None:
    charged, rows, error = run(FULL, tmp_path).split(maxsplit=2)
    assert charged == rows and int(rows) > 1
    assert "cannot charge" in error and "nothing was charged or drawn" in error and "disk has room" in error
    before = int(rows)
    charge(Ledger(tmp_path / "ledger.db"))
    assert len(Ledger(tmp_path / "ledger.db").rows()) == before + 1


def test_a_read_only_ledger_can_be_read_and_not_charged(tmp_path: Path) -> None:
    # The test's own folder, its worker's, pytest's of this run, and pytest's of this user.
    for parent in [tmp_path, *tmp_path.parents][:4]:
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(0o755)
    rows, error = run(READ_ONLY, tmp_path).split(maxsplit=1)
    tmp_path.chmod(0o755)
    assert rows == "1" and "cannot charge" in error and "readonly" in error


def test_several_clients_are_charged_or_refused_each_on_its_own(ledger: Ledger) -> None:
    event = Event(0.1, 2.0, 10)
    cost = epsilon([event], delta=1e-5)
    base = Charge("ann", event, purpose="round 1", budget=cost, delta=1e-5, simulated=True)
    receipt = ledger.charge_many([base, replace(base, client="bob", budget=cost / 2), replace(base, client="eve")])
    assert receipt.charged == {"ann": cost, "eve": cost}
    assert list(receipt.refused) == ["bob"] and "'bob'" in str(receipt.refused["bob"])
    assert [row.client for row in ledger.rows()] == ["ann", "eve"]
    again = ledger.charge_many([base])
    assert not again.charged and list(again.refused) == ["ann"]
    assert ledger.charge_many([]).charged == {}


def test_one_client_twice_in_a_batch_pays_twice(ledger: Ledger) -> None:
    event = Event(0.1, 2.0, 10)
    twice = epsilon([event, event], delta=1e-5)
    charge_ = Charge("ann", event, purpose="x", budget=None, delta=1e-5)
    assert ledger.charge_many([charge_, charge_]).charged == {"ann": twice}
    assert len(ledger.rows("ann")) == 2


def test_events_that_belong_together_are_charged_all_or_none(ledger: Ledger) -> None:
    one, other = Event(1.0, 1.0, 1), Event(1.0, 2.0, 3)
    whole = epsilon([one, other], delta=1e-5)
    charges = [Charge("a", event, "test", whole - 0.01, 1e-5) for event in (one, other)]
    # The first alone would be within the budget.
    with pytest.raises(BudgetExceeded, match="Nothing was charged"):
        ledger.charge_together(charges)
    assert ledger.position() == 0
    assert ledger.charge_together([replace(each, budget=whole) for each in charges]) == pytest.approx(whole)
    assert [row.steps for row in ledger.rows("a")] == [1, 3]


def test_a_fault_in_the_middle_of_a_batch_leaves_no_row(ledger: Ledger) -> None:
    charge(ledger, "bob")
    good = Charge("ann", QUICK, purpose="x", budget=None, delta=1e-5)
    with pytest.raises(PrivacyError, match=r"'bob' has charges per example .*per client.*ledger of its own"):
        ledger.charge_many([good, replace(good, client="bob", unit="client")])
    assert ledger.clients() == ["bob"]


def test_rows_say_everything_that_goes_with_an_epsilon(ledger: Ledger) -> None:
    ledger.charge("ann", QUICK, purpose="demo, round 3", budget=None, delta=1e-5, simulated=True)
    (row,) = ledger.rows()
    assert row.event == QUICK and row.position == 1 == ledger.position()
    said = (row.client, row.mechanism, row.purpose, row.unit, row.adjacency, row.sampling, row.simulated)
    assert said == ("ann", "gaussian", "demo, round 3", "example", "add/remove one", "poisson", True)
    assert row.time.endswith("+00:00")


def test_an_unknown_client_has_spent_nothing(ledger: Ledger) -> None:
    assert ledger.events("nobody") == [] and ledger.epsilon("nobody", delta=1e-5) == 0.0
    assert ledger.position() == 0 and ledger.clients() == []


@pytest.mark.parametrize("statement", ["DELETE FROM charges", "UPDATE charges SET steps = 0"])
def test_charges_are_neither_deleted_nor_rewritten(ledger: Ledger, statement: str) -> None:
    charge(ledger)
    with pytest.raises(sqlite3.IntegrityError, match="never re"):
        sqlite3.connect(ledger.path).execute(statement)


def test_a_ledger_that_vanished_is_not_started_anew(ledger: Ledger) -> None:
    charge(ledger)
    ledger.path.unlink()
    with pytest.raises(PrivacyError, match="unable to open"):
        charge(ledger)
    assert not ledger.path.exists()


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE charges (client TEXT)")


def newer(path: Path) -> None:
    Ledger(path)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")


def text(path: Path) -> None:
    path.write_text("client,epsilon\nann,3\n" * 100)


def damaged(path: Path) -> None:
    for _ in range(80):
        charge(Ledger(path))
    content = bytearray(path.read_bytes())
    content[4096:12288] = os.urandom(8192)
    path.write_bytes(content)


def emptied(path: Path) -> None:
    charge(Ledger(path))
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (emptied, "is empty, and a ledger never is"),
        (foreign, "no privacy ledger"),
        (newer, "schema version 99"),
        (text, "not a database"),
        (damaged, "damaged|malform"),
    ],
)
def test_a_file_that_is_no_sound_ledger_is_refused(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "spoiled.db"
    spoil(path)
    with pytest.raises(PrivacyError, match=said):
        Ledger(path)


def test_a_ledger_that_cannot_be_founded_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(PrivacyError, match="No space left"):
        Ledger(tmp_path / "ledger.db")
    assert list(tmp_path.iterdir()) == []


def test_founding_leaves_a_ledger_that_came_first_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "ledger.db", os.link

    def beaten(aside: str, place: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        charge(Ledger(path))
        link(aside, place)

    monkeypatch.setattr(os, "link", beaten)
    assert len(Ledger(path).rows()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["ledger.db"]


def test_a_directory_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="cannot open the privacy ledger"):
        Ledger(tmp_path)


def test_a_path_with_odd_characters_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "new folder?mode=ro#%41" / "ledger.db"
    charge(Ledger(path))
    assert path.exists() and len(Ledger(path).rows()) == 1
