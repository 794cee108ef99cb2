"""`lethe deploy` as far as it needs no other process: making, changing and checking a site."""

import re
import stat
import tarfile
from pathlib import Path

import pytest
from cryptography import x509

from lethe import credentials
from lethe.cli import main
from lethe.founding import handing_out
from lethe.operator import Operator
from lethe.site import open_site
from lora.errors import DeploymentError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def deploy(*words: str) -> int:
    return main(["deploy", *words])


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_init_makes_a_whole_site(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy("init", "--name", "clinic", "--host", "fl.example", "--nodes", "north,south") == 0
    site = open_site(Path("federation"))
    assert {*content(site.root)} == {
        "federation.toml",
        *("ca/ca.crt", "ca/ca.key", "home/config.toml"),
        *(
            f"superlink/{name}"
            for name in ("server.crt", "server.key", "superexec.secret", "proxy.conf", "database.secret")
        ),
        *(
            f"nodes/{node}/{file}"
            for node in ("north", "south")
            for file in ("auth", "auth.pub", "executor.secret", "node.toml")
        ),
    }
    assert site.federation.dialled == "fl.example:8443"
    said = capsys.readouterr().out
    assert "lethe deploy superlink" in said and "lethe deploy node south" in said


def test_what_is_secret_is_for_its_owner(here: Path) -> None:
    assert deploy("init") == 0
    public = {"ca.crt", "server.crt", "auth.pub"}
    for path in (here / "federation").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o644 if path.name in public else 0o600), path


def test_init_overwrites_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy("init") == 0
    before = content(here / "federation")
    assert deploy("init", "--nodes", "5") == 2
    assert "never overwritten" in capsys.readouterr().err
    (here / "federation" / "federation.toml").unlink()  # As if the first had been stopped half-way.
    assert deploy("init") == 2
    assert "ca/ca.key exists already" in re.sub(r"\s", " ", capsys.readouterr().err).replace("ca.key ", "ca.key ")
    del before["federation.toml"]
    assert content(here / "federation") == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "a,a"], "two nodes have the name a"),
        (["--nodes", "A b"], "is no name"),
        (["--host", "fl.example/x"], "neither a host name nor an address"),
        (["--port", "8443", "--proxy"], "both 8443"),
    ],
)
def test_a_wrong_wish_leaves_nothing_behind(
    words: list[str], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy("init", *words) == 2
    assert told in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "port"),
    [([], 8000), (["--proxy"], 8443), (["--host", "a.example"], 8443), (["--host", "a", "--no-proxy"], 8000)],
)
def test_whoever_comes_from_outside_comes_by_the_proxy(words: list[str], port: int) -> None:
    assert deploy("init", *words) == 0
    assert open_site(Path("federation")).federation.dialled.endswith(f":{port}")


def test_what_a_nodes_host_gets_is_enough_for_it_and_no_more(here: Path, tmp_path: Path) -> None:
    assert deploy("init") == 0
    site = open_site(Path("federation"))
    (command,) = [line.split() for line in handing_out(site, only="node-2") if " tar " in line]
    parts = command[command.index("-cf") + 2 :]
    with tarfile.open(tmp_path / "node-2.tar", "w") as archive:
        for part in parts:
            archive.add(site.root / part, arcname=part)
    with tarfile.open(tmp_path / "node-2.tar") as archive:
        archive.extractall(tmp_path / "host" / "federation", filter="data")
    from lethe.founding import check_secrets

    there = open_site(tmp_path / "host" / "federation")
    check_secrets(there, there.node_folder(there.node("node-2").name))
    secrets = {name for name, text in content(there.root).items() if b"PRIVATE" in text or name.endswith("secret")}
    assert secrets == {"nodes/node-2/auth", "nodes/node-2/executor.secret"}


@pytest.mark.parametrize("who", [["superlink", "--no-proxy"], ["node", "node-1"]])
def test_secrets_that_others_can_read_stop_the_start(
    who: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy("init") == 0
    name = "superlink/superexec.secret" if who[0] == "superlink" else "nodes/node-1/auth"
    (here / "federation" / name).chmod(0o640)
    assert deploy(*who) == 2
    assert f"{name} can be read by others; chmod 600" in capsys.readouterr().err


def test_a_missing_secret_stops_the_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy("init") == 0
    (here / "federation" / "nodes" / "node-1" / "executor.secret").unlink()
    assert deploy("node", "node-1") == 2
    assert "executor.secret is missing" in capsys.readouterr().err


def test_a_certificate_for_other_hosts_stops_the_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy("init") == 0
    file = here / "federation" / "federation.toml"
    file.write_text(file.read_text().replace("localhost", "fl.example"))
    assert deploy("superlink") == 2
    assert "server.crt is not for fl.example; `lethe deploy rotate superlink`" in capsys.readouterr().err
    assert deploy("rotate", "superlink") == 0
    names = credentials.hosts_of((here / "federation" / "superlink" / "server.crt").read_bytes())
    assert "fl.example" in names


def test_an_old_certificate_stops_the_start(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(credentials, "SERVER_DAYS", 10)
        assert deploy("init") == 0
    assert deploy("superlink") == 2
    assert "expires in 9 days" in capsys.readouterr().err


def test_rotation_keeps_the_authority_and_the_old_aside(here: Path) -> None:
    assert deploy("init") == 0
    before = content(here / "federation")
    assert deploy("rotate", "superlink") == 0
    after = content(here / "federation")
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"superlink/server.crt", "superlink/server.key", "superlink/superexec.secret"}
    kept = {Path(name).name: text for name, text in after.items() if "/before-" in name}
    assert kept == {Path(name).name: before[name] for name in changed}
    x509.load_pem_x509_certificate(after["superlink/server.crt"]).verify_directly_issued_by(
        x509.load_pem_x509_certificate(after["ca/ca.crt"])
    )


def test_another_node_gets_a_partition_port_and_keys_of_its_own(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(operator: Operator, nodes: object) -> list[str]:
        raise DeploymentError("Connection refused")

    monkeypatch.setattr(Operator, "register", down)
    assert deploy("init", "--nodes", "a,b") == 0
    assert deploy("add-node", "c") == 0
    told = capsys.readouterr()
    assert "c is not registered yet (Connection refused)" in " ".join(told.err.split())
    assert "lethe deploy node c" in told.out and "lethe deploy node a" not in told.out.split("\n", 8)[-1]
    added = open_site(Path("federation")).node("c")
    assert (added.partition, added.port) == (2, 9096)
    assert deploy("add-node", "c") == 2
    assert deploy("add-node", "C!") == 2
    assert [node.name for node in open_site(Path("federation")).federation.nodes] == ["a", "b", "c"]


def test_a_removed_node_is_unregistered_and_its_place_is_free_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    monkeypatch.setattr(Operator, "unregister", lambda operator, name: gone.append(name))
    monkeypatch.setattr(Operator, "register", lambda operator, nodes: [])
    assert deploy("init", "--nodes", "a,b,c") == 0
    assert deploy("remove-node", "b") == 0
    assert gone == ["b"]
    (kept,) = (here / "federation" / "nodes").glob(".b.removed-*")
    assert (kept / "auth").is_file() and not (here / "federation" / "nodes" / "b").exists()
    assert deploy("add-node", "d") == 0
    assert open_site(Path("federation")).node("d").partition == 1
    assert deploy("remove-node", "x") == 2


def test_a_nodes_new_key_is_registered_in_place_of_the_old(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Operator, "unregister", lambda operator, name: said.append(f"-{name}"))
    monkeypatch.setattr(Operator, "register", lambda operator, nodes: said.extend(f"+{node.name}" for node in nodes))
    assert deploy("init") == 0
    folder = here / "federation" / "nodes" / "node-2"
    before = (folder / "auth.pub").read_bytes()
    assert deploy("rotate", "node-2") == 0
    assert said == ["-node-2", "+node-2"] and (folder / "auth.pub").read_bytes() != before
    (kept,) = folder.glob("before-*")
    assert (kept / "auth.pub").read_bytes() == before


def test_a_superlink_that_is_not_there_is_one_clear_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy("init", "--port", "1") == 0
    assert deploy("status") == 2
    told = capsys.readouterr().err
    assert "error: `flwr supernode list` failed" in told and "Traceback" not in told


def test_no_site_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["superlink"], ["node", "a"], ["submit", "quickstart"], ["status"], ["stop", "x"], ["logs", "x"]):
        assert deploy(*words) == 2
        assert "`lethe deploy init` makes one" in capsys.readouterr().err


def test_a_wrong_run_file_is_told_before_anything_is_asked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy("init", "--port", "1") == 0
    assert deploy("submit", "quickstart", "federation.ruonds=3") == 2
    assert "did you mean" in capsys.readouterr().err
