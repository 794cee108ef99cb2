"""`lethe forget`: from a simulated run to a verified record, and what is said to what cannot be done."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lethe.cli import main
from tests.people import known_users
from tests.queries import LABELS, export_classifier, queries, write_queries

ROOT = Path(__file__).parents[2]
SMALL = ["federation.rounds=1", "training.steps=1", "training.batch=4", "data.max_train=400", "data.max_eval=40"]
QUICK = [
    "forgetting.rank=2",
    "forgetting.epochs=5",
    "forgetting.least_steps=0",
    "forgetting.batch=10",
    "forgetting.rate=0.01",
]


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    err: str

    @property
    def id(self) -> str:
        found = re.search(r"request (\w{12})", self.out)
        assert found is not None, self.out + self.err
        return found[1]


Run = Callable[..., Shown]


@pytest.fixture
def lethe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Shown:
        code = main(list(words))
        captured = capsys.readouterr()
        return Shown(code, captured.out, captured.err)

    return run


@pytest.fixture
def store(lethe: Run, tmp_path: Path) -> Path:
    export_classifier(tmp_path / "adapter")
    write_queries(tmp_path / "kept.jsonl", queries(0, 1, 2, 3))
    parts = ["--adapter", "adapter", "--model", "tiny-bert", "--evaluation", "kept.jsonl"]
    made = lethe("forget", "init", "store", *parts, *QUICK)
    assert made.code == 0 and "4 classes over tiny-bert" in made.out, made.err
    return tmp_path / "store"


def test_a_run_forgets_a_class_of_its_own_data(lethe: Run) -> None:
    assert (
        lethe("simulate", "quickstart", "name=first", "model.name=tiny-bert", "privacy.epsilon=null", *SMALL).code == 0
    )
    nothing = lethe("forget", "list", "--in", "first")
    assert nothing.code == 2 and "nothing was asked of it yet" in nothing.err
    added = lethe("forget", "add", "--in", "first", "--class", "set an alarm")
    assert added.code == 0 and "forget set an alarm" in added.out and "sign record" in added.err
    assert Path(added.out.split("record ")[1].strip()).is_file()
    again = lethe("forget", "add", "--in", "runs/first", "--class", "set an alarm")
    assert (
        again.code == 0 and again.id == added.id and "the same was asked for on" in again.out and "is done" in again.out
    )
    status = lethe("forget", "status", added.id[:6], "--in", "first")
    assert status.code == 0 and len(re.findall(r"^  x ", status.out, flags=re.M)) == 7
    verdict = lethe("forget", "verify", added.id, "--in", "first")
    assert verdict.code in (0, 2) and "holds   signed by the store's key" in verdict.out
    nearest = lethe("forget", "add", "--in", "first", "--class", "set alarm")
    assert nearest.code == 2 and "did you mean 'set an alarm'" in nearest.err


def test_examples_are_forgotten_and_the_gate_shows_in_answers(lethe: Run, store: Path, tmp_path: Path) -> None:
    write_queries(tmp_path / "gone.jsonl", queries(3))
    added = lethe("forget", "add", "--in", "store", "--class", "money", "--examples", "gone.jsonl")
    assert added.code == 0, added.err
    known = lethe("forget", "ask", "--in", "store", "send cash to Rome", "wake me at noon").out.splitlines()
    assert [line.split("\t")[1] for line in known] == ["send cash to Rome", "wake me at noon"]
    assert all(line.split("\t")[0] in LABELS and re.search(rf"{added.id} [01]\.\d\d$", line) for line in known)
    assert known[0].endswith("1.00") and not known[0].startswith("money")
    verdict = lethe("forget", "verify", added.id, "--in", "store", "--examples", "gone.jsonl")
    assert verdict.code == 0 and "BROKEN" not in verdict.out and "accuracy on the request's rows" in verdict.out
    listed = lethe("forget", "list", "--in", "store")
    assert listed.out.split()[:2] == [added.id, "done"]
    (store / "manifest.json").write_text(json.dumps(json.loads((store / "manifest.json").read_text()) | {"held": []}))
    broken = lethe("forget", "verify", added.id, "--in", "store")
    assert broken.code == 2 and "BROKEN  the store does not serve the request any more" in broken.out


def test_what_is_only_accepted_is_carried_out_later(lethe: Run, store: Path, tmp_path: Path) -> None:
    write_queries(tmp_path / "gone.jsonl", queries(3))
    added = lethe("forget", "add", "--in", "store", "--examples", "gone.jsonl", "--no-wait")
    assert added.code == 0 and "waiting" in lethe("forget", "list", "--in", "store").out
    worked = lethe("forget", "work", "--in", "store")
    assert worked.code == 0 and "1 request carried out" in worked.out
    assert "done" in lethe("forget", "status", added.id, "--in", "store").out


def test_a_client_forgets_by_order_and_answer(lethe: Run, store: Path, tmp_path: Path) -> None:
    write_queries(tmp_path / "mine.jsonl", queries(2))
    assert lethe("forget", "order", "--client", "clinic", "--in", "store", "--out", "order.lethe").code == 0
    answered = lethe("forget", "answer", "order.lethe", "--examples", "mine.jsonl", "--class", "weather", "--model",
                     "tiny-bert", "--out", "answer.lethe")  # fmt: skip
    assert answered.code == 0 and "24 rows, none of them in it" in answered.out, answered.err
    private = ("forget", "answer", "order.lethe", "--examples", "mine.jsonl", "--class", "weather", "--model",
               "tiny-bert", "--private", "8", "--out", "private.lethe")  # fmt: skip
    refused = lethe(*private)
    assert refused.code == 2 and "--ledger FILE" in refused.err and not Path("private.lethe").exists()
    paid = lethe(*private, "--ledger", "ledger.sqlite", "--delta", "1e-4")
    assert paid.code == 0 and "at delta 0.0001 per row, add/remove one" in paid.out, paid.err
    added = lethe("forget", "add", "--in", "store", "--client", "clinic", "--answer", "answer.lethe")
    assert added.code == 0 and "forget rows of client" in added.out and "clinic" not in added.out
    assert lethe("forget", "verify", added.id, "--in", "store", "--subject", "clinic").code == 0


def test_a_node_s_owner_offers_lists_and_withdraws(lethe: Run, tmp_path: Path) -> None:
    write_queries(tmp_path / "mine.jsonl", queries(2))
    (tmp_path / "node.toml").write_text('name = "clinic"\n[policy]\nmax_epsilon = 8\n')
    offer = ("forget", "offer", "first", "--examples", "mine.jsonl", "--class", "weather")
    refused = lethe(*offer)
    assert refused.code == 2 and "node 'clinic' sends nothing without privacy (its policy)" in refused.err
    made = lethe(*offer, "--private", "8")
    assert made.code == 0 and "24 rows for all of weather, epsilon 8 at delta 1e-05" in made.out, made.err
    assert "lethe deploy forget first" in made.out
    listed = lethe("forget", "offers").out
    name = listed.split()[0]
    assert listed.split()[1:3] == ["open", "first"]
    wrong = lethe("forget", "offers", "--withdraw", name[:-1] + "x")
    assert wrong.code == 2 and f"did you mean '{name}'" in wrong.err
    assert lethe("forget", "offers", "--withdraw", name).code == 0
    assert "nothing is offered here" in lethe("forget", "offers").out


def test_a_user_is_deleted(lethe: Run, tmp_path: Path) -> None:
    names = known_users(tmp_path / "people")
    unknown = lethe("forget", "add", "--in", "people", "--user", names[0] + "x")
    assert unknown.code == 2 and f"did you mean '{names[0]}'" in unknown.err
    added = lethe("forget", "add", "--in", "people", "--user", names[0])
    assert added.code == 0 and "after   0 events, 0 files" in added.out and names[0] not in added.out
    assert lethe("forget", "verify", added.id, "--in", "people", "--subject", names[0]).code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("add --in store", "give one"),
        ("add --in store --class alarm --user ada", "give one"),
        ("add --in store --client clinic", "go together"),
        ("add --in store --class alarm", "give them by --examples"),
        ("add --in store --class alarm --examples kept.jsonl", "which the request does not name"),
        ("add --in store --class alarm,music,weather,money --examples kept.jsonl", "all 4 classes would be forgotten"),
        ("add --in store --examples kept.jsonl --method gs-lora", "forgets whole classes"),
        ("add --in store --examples kept.jsonl --method ascent", "there is no such method"),
        ("add --in store --examples gone.jsonl", "gone.jsonl"),
        ("add --in store --user ada", "has no users"),
        ("add --in nowhere --class alarm", "no run 'nowhere'"),
        ("status abc --in store", "no request 'abc'"),
        ("init store --adapter adapter --model tiny-bert", "exists already"),
        ("init other --adapter adapter --run first", "give one"),
        ("init other", "give one"),
        ("init other --adapter adapter --model tiny-bert forgetting.rnk=4", "did you mean 'forgetting.rank'"),
        ("init other --adapter adapter --model tiny-bert forgetting.rank=0", "forgetting.rank=0"),
        ("init other --adapter adapter --model tiny-bert forgetting.rank=31", "give at most 30"),
        ("answer none.lethe --examples kept.jsonl --out x", "none.lethe: cannot be read"),
        ("answer kept.jsonl --examples kept.jsonl --out x", "not a forgetting order"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(lethe: Run, store: Path, words: str, says: str) -> None:
    shown = lethe("forget", *words.split())
    assert shown.code == 2 and says in shown.err and shown.err.startswith("error: "), shown.err
    assert not list((store / "requests").iterdir()) and not Path("other").exists()


def test_help_needs_neither_torch_nor_dbos() -> None:
    program = "import sys; from lethe.cli import main; main(['forget', '--help']); " \
              "sys.exit(len({'torch', 'dbos', 'cryptography'} & {*sys.modules}))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "verify" in done.stdout, done.stderr
