"""Who may come in, and by which door: keys, certificates, the proxy's paths, secrets, and the names of runs."""

import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from lethe import load_run_file
from lethe.credentials import authority, node_key, write_new
from lethe.submission import bundle, run_config
from tests.deployment.conftest import Fleet, free_ports
from tests.deployment.reply_evidence import Submitted, WatchedFleet, assert_never_under_counted, charges, rounds

pytestmark = pytest.mark.deployment

NODES = ("node-1", "node-2", "node-3")
SMALL = ["model.name=tiny-bert", "data.max_train=120", "data.max_eval=20", "training.steps=2", "training.batch=8"]
THREE = ["federation.clients=3", "federation.min_clients=3", "federation.greeting_timeout=240"]
OPEN = [*SMALL, *THREE, "privacy.epsilon=null"]
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed (apt-get nginx-light)")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedFleet]:
    made = WatchedFleet(tmp_path_factory.mktemp("doors"))
    try:
        made.up()
        yield made
    finally:
        made.close()


# --- 7: who is a node ------------------------------------------------------------------------------------------------


class Stranger:
    """A SuperNode, by the first node's own command line but for some options."""

    def __init__(self, fleet: Fleet, name: str, *, drop: tuple[str, ...] = (), **options: str) -> None:
        words = fleet.argv("node-1")
        for option in drop:
            place = words.index(option)
            del words[place : place + 2]
        (port,) = free_ports(1)
        for option, value in {"port": str(port), **options}.items():
            flag = "--" + option.replace("_", "-")
            words[words.index(flag) + 1 :] = [value, *words[words.index(flag) + 2 :]]
        self.file = fleet.home / f"stranger-{name}.log"
        self.words, self.fleet = words, fleet

    def start(self, *more: str) -> "Stranger":
        environment = self.fleet.environment("node-1") | {"FLWR_HOME": f"{self.file}.home"}
        with self.file.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.words, *more],
                cwd=self.fleet.home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def told(self) -> str:
        return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", self.file.read_text()).split())

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None


@pytest.fixture(scope="module")
def strangers(fleet: WatchedFleet) -> dict[str, Stranger]:
    """Five that want in, all at once, while all three nodes are online; waits until all have given up."""
    folder = fleet.home / "strangers"
    folder.mkdir()
    write_new(folder / "key", node_key().private)
    write_new(folder / "ca.crt", authority("elsewhere").public, private=False)
    key = "--auth-supernode-private-key"
    made = {
        "no key": Stranger(fleet, "keyless", drop=(key,)).start(),
        "unregistered key": Stranger(fleet, "unregistered", auth_supernode_private_key=str(folder / "key")).start(),
        "another's key": Stranger(fleet, "twin").start(),
        "plaintext": Stranger(fleet, "plain", drop=(key, "--root-certificates")).start("--insecure"),
        "wrong authority": Stranger(fleet, "mistrustful", root_certificates=str(folder / "ca.crt")).start(),
    }
    fleet.until(lambda: all(each.ended for each in made.values()), seconds=240)
    return made


REFUSED = {
    "no key": r"\[code: 2001\]",
    "unregistered key": r"\[code: 2004\]",
    "another's key": r"\[code: 2004\]",
    "plaintext": r"disconnected|400",
    "wrong authority": "CERTIFICATE_VERIFY_FAILED",
}


@pytest.mark.parametrize("who", REFUSED)
def test_a_stranger_ends_and_is_told_why(strangers: Mapping[str, Stranger], who: str) -> None:
    stranger = strangers[who]
    assert stranger.process.returncode != 0
    assert "Failed to initialize the connection to the SuperLink" in stranger.told, stranger.told
    assert re.search(REFUSED[who], stranger.told), stranger.told


def test_the_fleet_goes_on_as_if_nobody_had_knocked(fleet: WatchedFleet, strangers: Mapping[str, Stranger]) -> None:
    assert fleet.online() == len(NODES) == len(fleet.operator.nodes())
    assert fleet.lethe("status").stdout.count(" online") == len(NODES)


def caller(fleet: Fleet, node: str | None) -> FleetHttpClient:
    """Speak to the SuperLink as a node's key would, without being its SuperNode; None: as nobody."""
    interceptors: list[object] = [RuntimeVersionHttpInterceptor(component_name="SuperNode")]
    if node is not None:
        key = load_ssh_private_key((fleet.root / "nodes" / node / "auth").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        interceptors.append(NodeAuthHttpInterceptor(key, key.public_key()))
    door = fleet.argv("node-1")
    address = door[door.index("--superlink") + 1]
    return FleetHttpClient.from_server_address(address, False, fleet.site.ca.read_bytes(), interceptors=interceptors)


def number_of(fleet: Fleet, node: str) -> int:
    return next(int(number) for number, name in fleet.operator.names().items() if name == node)


def test_a_node_s_own_key_opens_nothing_of_another_s(fleet: WatchedFleet) -> None:
    own, other = Node(node_id=number_of(fleet, "node-3")), Node(node_id=number_of(fleet, "node-1"))
    public = load_ssh_private_key((fleet.root / "nodes" / "node-1" / "auth").read_bytes(), None).public_key()
    with caller(fleet, "node-3") as client:
        assert client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=own, heartbeat_interval=30)).success
        asked = [
            (client.PullMessages, PullMessagesRequest(node=other)),
            (client.SendNodeHeartbeat, SendNodeHeartbeatRequest(node=other, heartbeat_interval=30)),
            (client.GetRun, GetRunRequest(node=other, run_id=1)),
            (client.ActivateNode, ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)),
        ]
        for call, request in asked:
            with pytest.raises(httpx.HTTPStatusError) as refused:
                call(request)
            assert refused.value.response.status_code == 401, call


def test_nobody_registers_by_the_fleet_s_door(fleet: WatchedFleet) -> None:
    with caller(fleet, None) as client, pytest.raises(httpx.HTTPStatusError) as refused:
        client.PullMessages(PullMessagesRequest(node=Node(node_id=number_of(fleet, "node-1"))))
    assert refused.value.response.status_code == 401
    key = load_ssh_private_key((fleet.root / "nodes" / "node-3" / "auth").read_bytes(), None)
    with caller(fleet, "node-3") as client, pytest.raises(httpx.HTTPStatusError) as refused:
        client.RegisterNode(RegisterNodeFleetRequest(public_key=public_key_to_bytes(key.public_key())))
    assert refused.value.response.status_code == 403 or "2001" in refused.value.response.text


# --- 8: the proxy and the ports --------------------------------------------------------------------------------------


def asked(fleet: Fleet, request: bytes, *, port: int | None = None) -> bytes:
    """Send bytes as they are over TLS, and return what comes back until the other side hangs up or is silent."""
    context = ssl.create_default_context(cafile=str(fleet.site.ca))
    plain = socket.create_connection(("127.0.0.1", port or fleet.gate), timeout=20)
    with context.wrap_socket(plain, server_hostname="localhost") as secure:
        answer = b""
        with suppress(TimeoutError, ssl.SSLError, ConnectionError):
            secure.sendall(request)
            while piece := secure.recv(65536):
                answer += piece
        return answer


def line(target: str, *, method: str = "POST", version: str = "HTTP/1.1", extra: str = "") -> bytes:
    head = f"{method} {target} {version}\r\nHost: superlink\r\nConnection: close\r\nContent-Length: 0\r\n{extra}\r\n"
    return head.encode("latin-1")


CONTROL = "/v1/control/list-runs"
SMUGGLED = f"POST {CONTROL} HTTP/1.1\r\nHost: superlink\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
TRICKS = {
    "control": line(CONTROL),
    "start a run": line("/v1/control/start-run"),
    "register a node": line("/v1/control/register-node"),
    "runtime": line("/v1/runtime/acquire-task"),
    "runtime answers": line("/v1/runtime/responses"),
    "docs": line("/docs", method="GET"),
    "openapi": line("/openapi.json", method="GET"),
    "redoc": line("/redoc", method="GET"),
    "health": line("/health", method="GET"),
    "root": line("/", method="GET"),
    "two slashes": line(f"/{CONTROL}"),
    "slashes within": line("/v1//control/list-runs"),
    "dots": line("/v1/fleet/../control/list-runs"),
    "dots at the end": line("/v1/control/list-runs/../../fleet/pull-messages"),
    "a dot": line("/v1/./control/list-runs"),
    "escaped dots": line("/v1/fleet/%2e%2e/control/list-runs"),
    "half escaped dots": line("/v1/fleet/.%2E/control/list-runs"),
    "escaped slash": line("/v1/fleet/..%2fcontrol%2flist-runs"),
    "escaped twice": line("/v1/fleet/%252e%252e/control/list-runs"),
    "escaped letter": line("/v1/%63ontrol/list-runs"),
    "escaped letter of the fleet": line("/v1/%66leet/../control/list-runs"),
    "backslashes": line("/v1/fleet\\..\\control\\list-runs"),
    "semicolon": line("/v1/fleet;/../control/list-runs"),
    "semicolon dots": line("/v1/fleet/..;/control/list-runs"),
    "null": line("/v1/fleet/%00/../../control/list-runs"),
    "a newline": line("/v1/fleet/pull-messages%0d%0a/../../control/list-runs"),
    "case": line("/V1/Control/List-Runs"),
    "case of the fleet": line("/v1/FLEET/../control/list-runs"),
    "query": line(f"/v1/fleet/pull-messages?{CONTROL}"),
    "fragment": line(f"/v1/fleet/pull-messages#/../../..{CONTROL}"),
    "absolute": line(f"https://superlink:8000{CONTROL}"),
    "absolute elsewhere": line(f"http://127.0.0.1:8000{CONTROL}"),
    "old HTTP": line(CONTROL, version="HTTP/1.0"),
    "older HTTP": f"GET {CONTROL}\r\n".encode(),
    "newer HTTP": line(CONTROL, version="HTTP/2.0"),
    "tunnel": line("superlink:8000", method="CONNECT"),
    "tunnel by path": line(CONTROL, method="CONNECT"),
    "another method": line("/v1/fleet/pull-messages", method="GET"),
    "options": line("/v1/fleet/pull-messages", method="OPTIONS"),
    "odd method": line(CONTROL, method="FLEET"),
    "trace": line("/v1/fleet/pull-messages", method="TRACE"),
    "large header": line("/v1/fleet/pull-messages", extra=f"X-Large: {'x' * 100_000}\r\n"),
    "many headers": line("/v1/fleet/pull-messages", extra="".join(f"X-{n}: {'y' * 900}\r\n" for n in range(200))),
    "long target": line(f"/v1/fleet/{'a' * 100_000}"),
    "another path by header": line(CONTROL, extra="X-Original-URL: /v1/fleet/pull-messages\r\n"),
    "two lengths": line("/v1/fleet/pull-messages", extra=f"Content-Length: {len(SMUGGLED)}\r\n") + SMUGGLED.encode(),
    "length and chunks": line("/v1/fleet/pull-messages", extra="Transfer-Encoding: chunked\r\n") + SMUGGLED.encode(),
    "odd chunks": line("/v1/fleet/pull-messages", extra="Transfer-Encoding: xchunked\r\n") + SMUGGLED.encode(),
}


@needs_nginx
@pytest.mark.parametrize("trick", TRICKS)
def test_the_proxy_lets_nothing_through_but_the_fleet_s_paths(fleet: WatchedFleet, trick: str) -> None:
    answer = asked(fleet, TRICKS[trick])
    assert re.match(rb"(HTTP/1\.1 (403|400|405|414|501|505) |<html>\r\n<head><title>40[03] )", answer), answer[:300]
    assert answer.count(b"HTTP/1.1 ") <= 1


PASSING = {
    "another path by header": f"X-Original-URL: {CONTROL}\r\nX-Rewrite-URL: {CONTROL}\r\nX-Forwarded-Prefix: /v1\r\n",
    "upgrade": "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "websocket": "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "another host": "X-Forwarded-Host: control\r\nForwarded: host=control\r\n",
}


@needs_nginx
@pytest.mark.parametrize("trick", PASSING)
def test_headers_on_a_fleet_path_lead_to_the_fleet_which_wants_a_key(fleet: WatchedFleet, trick: str) -> None:
    answer = asked(fleet, line("/v1/fleet/pull-messages", extra=PASSING[trick]))
    assert re.match(rb"HTTP/1\.1 4(01|15|00|22) ", answer) and b"<html>" not in answer, answer[:300]


@needs_nginx
def test_a_second_request_on_one_connection_is_looked_at_as_well(fleet: WatchedFleet) -> None:
    first = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: superlink\r\nContent-Length: 0\r\n\r\n"
    answer = asked(fleet, first + SMUGGLED.encode())
    codes = re.findall(rb"HTTP/1\.1 (\d+) ", answer)
    assert len(codes) == 2 and codes[0][:1] == b"4" and codes[1] == b"403", answer[:600]


@needs_nginx
def test_the_paths_that_are_hidden_are_there_and_a_node_comes_through(fleet: WatchedFleet) -> None:
    """What the proxy refuses would work at the SuperLink's own port; it is the proxy that refuses it."""
    body = ListRunsRequest().SerializeToString()
    head = (
        f"POST {CONTROL} HTTP/1.1\r\nHost: superlink\r\nConnection: close\r\nContent-Type: application/x-protobuf\r\n"
    )
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    assert b" 403 " in asked(fleet, request).split(b"\r\n")[0]
    assert b" 403 " not in asked(fleet, request, port=fleet.link).split(b"\r\n")[0]
    with caller(fleet, "node-3") as client:
        mine = SendNodeHeartbeatRequest(node=Node(node_id=number_of(fleet, "node-3")), heartbeat_interval=30)
        assert client.SendNodeHeartbeat(mine).success


@needs_nginx
def test_plaintext_at_the_proxy_is_refused(fleet: WatchedFleet) -> None:
    with socket.create_connection(("127.0.0.1", fleet.gate), timeout=20) as plain:
        plain.sendall(line("/v1/fleet/pull-messages"))
        assert plain.recv(4096).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("service", ["superlink", "node-1"])
def test_a_port_gives_no_work_to_who_lacks_the_secret(fleet: WatchedFleet, service: str) -> None:
    authority = fleet.site.ca.read_bytes() if service == "superlink" else None
    address = f"127.0.0.1:{fleet.port(service)}"
    version = [RuntimeVersionHttpInterceptor(component_name="lethe-executor")]
    client = RuntimeHttpClient.from_server_address(address, authority is None, authority, version)
    for call, request in (
        (client.AcquireTask, AcquireTaskRequest(supported_task_types=["flwr-clientapp", "flwr-serverapp"])),
        (client.PullTaskInput, PullTaskInputRequest()),
    ):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            call(request)
        assert refused.value.response.status_code == 401, (call, refused.value.response.text)
    client.close()


@pytest.mark.parametrize("secret", [[], ["--secret", "nodes/node-2/executor.secret"]], ids=["none", "another's"])
def test_an_executor_without_its_node_s_secret_ends_and_says_so(fleet: WatchedFleet, secret: list[str]) -> None:
    words = ["python", "-m", "client.executor", "--runtime", f"127.0.0.1:{fleet.port('node-1')}"]
    words += ["--config", str(fleet.root / "nodes" / "node-1" / "node.toml")]
    words += [word if word.startswith("--") else str(fleet.root / word) for word in secret]
    done = fleet.run(words)
    assert done.returncode == 2
    assert "does not accept the executor's secret; give both the same file" in done.stderr


def test_an_executor_listens_nowhere(fleet: WatchedFleet) -> None:
    for number in (1, 2, 3):
        process = psutil.Process(fleet.processes[f"executor-{number}"].pid)
        assert [each for each in process.net_connections(kind="inet") if each.status == psutil.CONN_LISTEN] == []


# --- 9: names of runs ------------------------------------------------------------------------------------------------


def submit_past_the_journal(fleet: WatchedFleet, name: str, *words: str) -> str:
    """Submit as another operator would, who has not seen what was submitted from here; returns the run's number."""
    with bundle() as app:
        settings = app.parent / "job.toml"
        settings.write_text(run_config(load_run_file("quickstart", list(words)), name))
        return fleet.operator.start(bundle=app, settings=settings)


def end_of(fleet: WatchedFleet, identity: str) -> str:
    fleet.until(lambda: fleet.operator.run(identity).finished, seconds=200)
    found = fleet.operator.run(identity)
    return f"{found.status}: {found.details}"


def test_two_runs_at_once_and_one_of_them_submitted_twice(fleet: WatchedFleet) -> None:
    words = [*OPEN, "federation.rounds=400"]
    first = Submitted(fleet, "first", *words)
    private = Submitted(fleet, "other", *SMALL, *THREE, "federation.rounds=3", "privacy.delta=1e-3")
    begun = first.round_of(lambda each: each["accepted"] == ["0", "1", "2"], seconds=240)["round"]
    twice = fleet.submit("quickstart", "name=first", *words)
    assert twice.returncode == 2
    assert re.search(
        r"run first is running; `lethe deploy logs first` follows it, or choose another name", twice.stderr
    )
    elsewhere = end_of(fleet, submit_past_the_journal(fleet, "first", *words))
    assert elsewhere.startswith("finished:failed: ") and "run 'first' is going on in another process" in elsewhere
    assert private.finish() == 0, private.told + fleet.logs()
    assert_never_under_counted(fleet, "other", NODES)
    assert [charges(fleet, node, "other") for node in NODES] == [3, 3, 3]
    last = first.round_of(lambda each: each["round"] > begun + 1, after=begun)
    assert last["accepted"] == ["0", "1", "2"] and last["refused"] == []
    numbers = [each["round"] for each in rounds(fleet, "first")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert fleet.lethe("stop", "first").returncode == 0
    assert first.finish() == 2 and "run first ended as finished:stopped" in first.told


def test_a_finished_name_is_refused_by_the_command_and_by_the_server(fleet: WatchedFleet) -> None:
    words = [*SMALL, *THREE, "federation.rounds=3", "privacy.delta=1e-3"]
    before = (fleet.home / "runs" / "other" / "metrics.jsonl").read_bytes()
    done = fleet.submit("quickstart", "name=other", *words)
    assert done.returncode == 2 and "run other has finished; choose another name" in done.stderr
    end = end_of(fleet, submit_past_the_journal(fleet, "other", *words))
    assert end.startswith("finished:failed: ") and "run 'other' has finished all 3 rounds; take another name" in end
    assert (fleet.home / "runs" / "other" / "metrics.jsonl").read_bytes() == before
    assert [charges(fleet, node, "other") for node in NODES] == [3, 3, 3]


# --- A SuperLink that stumbles ---------------------------------------------------------------------------------------


def test_a_supernode_that_was_answered_500_ends_and_may_be_started_again(fleet: WatchedFleet) -> None:
    """Flower's own would live on without working; whoever watches it would see nothing to start again."""
    Path(f"{fleet.tap}.fail").touch()
    fleet.until(lambda: any(fleet.processes[node].poll() is not None for node in NODES), seconds=60)
    (ended,) = [node for node in NODES if fleet.processes[node].poll() is not None]
    assert fleet.processes[ended].returncode == 1
    assert "which must start again" in (fleet.home / f"{ended}.log").read_text()
    fleet.start(ended)
    fleet.until(lambda: fleet.online() == len(NODES), seconds=120)


# --- 7, again: a key that was stolen ---------------------------------------------------------------------------------


def test_a_stolen_key_is_worth_its_node_until_it_is_rotated(fleet: WatchedFleet) -> None:
    """A key is a node's whole identity: while its owner is away, who holds it is the node. Rotation ends that."""
    stolen = fleet.home / "strangers" / "stolen"
    shutil.copy(fleet.root / "nodes" / "node-1" / "auth", stolen)
    fleet.kill("node-1", signal.SIGTERM)
    fleet.until(lambda: fleet.online() == 2, seconds=90)
    thief = Stranger(fleet, "thief", auth_supernode_private_key=str(stolen)).start()
    fleet.until(lambda: fleet.online() == 3, seconds=90)
    owner = Stranger(fleet, "owner").start()
    fleet.until(lambda: owner.ended, seconds=90)
    assert re.search(REFUSED["another's key"], owner.told), owner.told
    done = fleet.lethe("rotate", "node-1")
    assert done.returncode == 0, done.stderr
    fleet.until(lambda: thief.ended, seconds=120)
    fleet.kill("executor-1", signal.SIGTERM)
    for service in ("node-1", "executor-1"):
        fleet.start(service)
    fleet.until(lambda: fleet.online() == 3, seconds=120)
    again = Stranger(fleet, "thief-again", auth_supernode_private_key=str(stolen)).start()
    fleet.until(lambda: again.ended, seconds=90)
    assert again.process.returncode != 0 and re.search(REFUSED["unregistered key"], again.told), again.told
    run = Submitted(fleet, "mended", *OPEN, "federation.rounds=1")
    assert run.finish() == 0, run.told + fleet.logs()
    assert rounds(fleet, "mended")[0]["accepted"] == ["0", "1", "2"]


def test_the_settings_that_a_thief_would_need_are_readable_by_their_owner_alone(fleet: WatchedFleet) -> None:
    secrets = [*fleet.root.rglob("auth"), *fleet.root.rglob("*.secret"), *fleet.root.rglob("*.key")]
    assert len(secrets) >= 8
    assert {path.stat().st_mode & 0o777 for path in map(Path, secrets)} == {0o600}
