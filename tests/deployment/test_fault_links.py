"""A node's link that is cut in mid-round: for 90 s, really, and for good.

Where root may make them, every node is a host of its own: a network namespace with its SuperNode and its executor, and
a cable (a veth pair) to a bridge on which the proxy listens. Cut means that the bridge's end of it is down: packets
vanish, and no side is told. Elsewhere every node dials a relay on the loopback of this very process; cut, it keeps
connections open and hands nothing on, new ones included.
"""

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import pytest

from tests.deployment.conftest import NGINX, NODES, Fleet, free_ports
from tests.deployment.evidence import (
    GONE,
    charges,
    events,
    followed,
    frozen_training,
    leaks,
    records,
    refused,
    standing,
    thaw,
    uncharged,
)

pytestmark = pytest.mark.deployment

CUT_S = 90.0


class Cables(Protocol):
    """The links of all nodes of a fleet."""

    def hosts(self) -> tuple[str, ...]: ...
    def dialled(self, node: str, *, port: int) -> str: ...
    def command(self, node: str) -> list[str]: ...
    def cut(self, node: str) -> None: ...
    def mend(self, node: str) -> None: ...
    def close(self) -> None: ...


# --- Hosts as network namespaces -------------------------------------------------------------------------------------


class Namespaces:
    """A bridge on this machine, and every node a namespace with a cable to it."""

    def __init__(self) -> None:
        number = os.getpid() % 200 + 20
        self.tag = f"lethe{number}"
        self.address = f"10.{number}.77.1"
        try:
            self._make(number)
        except BaseException:
            self.close()
            raise

    def _make(self, number: int) -> None:
        ip("link", "add", self.tag, "type", "bridge")
        ip("addr", "add", f"{self.address}/24", "dev", self.tag)
        ip("link", "set", self.tag, "up")
        for place, node in enumerate(NODES, start=2):
            space, cable = self._space(node), self._cable(node)
            ip("netns", "add", space)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", cable, "master", self.tag, "up")
            ip("-n", space, "addr", "add", f"10.{number}.77.{place}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def hosts(self) -> tuple[str, ...]:
        return (self.address,)

    def dialled(self, node: str, *, port: int) -> str:
        return f"{self.address}:{port}"

    def command(self, node: str) -> list[str]:
        return ["ip", "netns", "exec", self._space(node)]

    def cut(self, node: str) -> None:
        ip("link", "set", self._cable(node), "down")

    def mend(self, node: str) -> None:
        ip("link", "set", self._cable(node), "up")

    def close(self) -> None:
        for node in NODES:
            for words in (("link", "del", self._cable(node)), ("netns", "del", self._space(node))):
                with suppress(subprocess.CalledProcessError):
                    ip(*words)
        with suppress(subprocess.CalledProcessError):
            ip("link", "del", self.tag)

    def _space(self, node: str) -> str:
        return f"{self.tag}-{node}"

    def _cable(self, node: str) -> str:
        return f"{self.tag}-{NODES.index(node)}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


# --- Relays on the loopback ------------------------------------------------------------------------------------------


class Relays:
    """A relay for every node between it and the port that it dials."""

    def __init__(self) -> None:
        self._ports = dict(zip(NODES, free_ports(len(NODES)), strict=True))
        self._open = {node: threading.Event() for node in NODES}
        self._listening: dict[str, socket.socket] = {}
        for node in NODES:
            self.mend(node)

    def hosts(self) -> tuple[str, ...]:
        return ()

    def dialled(self, node: str, *, port: int) -> str:
        if node not in self._listening:
            self._listening[node] = socket.create_server(("127.0.0.1", self._ports[node]))
            threading.Thread(target=self._accept, args=(node, port), daemon=True).start()
        return f"127.0.0.1:{self._ports[node]}"

    def command(self, node: str) -> list[str]:
        return []

    def cut(self, node: str) -> None:
        self._open[node].clear()

    def mend(self, node: str) -> None:
        self._open[node].set()

    def close(self) -> None:
        for listening in self._listening.values():
            listening.close()

    def _accept(self, node: str, port: int) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening[node].accept()
                threading.Thread(target=self._connect, args=(node, near, port), daemon=True).start()

    def _connect(self, node: str, near: socket.socket, port: int) -> None:
        self._open[node].wait()
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=self._pump, args=(node, far, near), daemon=True)
            back.start()
            self._pump(node, near, far)
            back.join()

    def _pump(self, node: str, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                self._open[node].wait()
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


# --- The fleet -------------------------------------------------------------------------------------------------------


class Spread(Fleet):
    """A fleet whose nodes are linked by cables that can be cut."""

    def __init__(self, home: Path, cables: Cables) -> None:
        self.cables = cables
        super().__init__(home, hosts=cables.hosts())

    def mapped(self, text: str, *, service: str) -> str:
        found = super().mapped(text, service=service)
        port = self.gate if NGINX else self.link
        if service in NODES:
            return found.replace(f"127.0.0.1:{port}", self.cables.dialled(service, port=port))
        if service == "proxy":
            return found.replace(f"listen 127.0.0.1:{self.gate}", f"listen 0.0.0.0:{self.gate}")
        return found

    def argv(self, service: str) -> list[str]:
        node = service.replace("executor-", "node-")
        return [*(self.cables.command(node) if node in NODES else []), *super().argv(service)]


def cables() -> Cables:
    if NGINX:
        with suppress(OSError, subprocess.CalledProcessError):
            return Namespaces()
    return Relays()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spread]:
    with ExitStack() as stack:
        links = cables()
        stack.callback(links.close)
        made = Spread(tmp_path_factory.mktemp("links"), links)
        stack.enter_context(standing(made))
        yield made


def nodes_of(fleet: Fleet) -> Mapping[str, str]:
    """Return what `lethe deploy status` says of every node."""
    return dict(re.findall(r"^node (\S+) +(\w+)$", fleet.lethe("status").stdout, flags=re.MULTILINE))


def test_a_link_cut_for_90_s_costs_a_round_s_update_and_one_cut_for_good_the_node(fleet: Spread) -> None:
    words = ["federation.min_clients=2", "federation.rounds=500", "federation.timeout=240"]
    with followed(fleet, "cut", *words) as run:
        run.rounds(lambda: any(len(each["accepted"]) == 3 for each in records(fleet, "cut")), seconds=200)
        first = frozen_training(fleet, ["2"])
        fleet.cables.cut("node-3")
        began = time.monotonic()
        thaw(fleet, "2")
        run.rounds(lambda: records(fleet, "cut")[-1]["round"] > first, seconds=150)
        assert refused(fleet, "cut", first)["2"] == ("error", f"node 'node-3': {GONE}")
        run.hears(rf"round +{first}/500  2 of 3 clients")
        run.hears(r"refused: 2 \(error\)")
        assert nodes_of(fleet) == {"node-1": "online", "node-2": "online", "node-3": "offline"}
        run.rounds(lambda: time.monotonic() - began >= CUT_S, seconds=2 * CUT_S)
        fleet.cables.mend("node-3")
        cut = records(fleet, "cut")[-1]["round"]
        assert all("2" not in each["accepted"] for each in records(fleet, "cut") if first <= each["round"])
        run.rounds(lambda: records(fleet, "cut")[-1]["accepted"] == ["0", "1", "2"], seconds=200)
        assert records(fleet, "cut")[-1]["round"] > cut

        last = frozen_training(fleet, ["1", "2"])
        for client in ("1", "2"):
            fleet.cables.cut(f"node-{int(client) + 1}")
            thaw(fleet, client)
        assert run.ended(seconds=200) == 2
    stated = f"round {last}: 1 usable replies, federation.min_clients=2 are needed; 1: error (node 'node-2': {GONE}"
    assert f"run cut ended as finished:failed: ServerApp failed with exception: {stated}" in run.told
    assert nodes_of(fleet) == {"node-1": "online", "node-2": "offline", "node-3": "offline"}
    for client, number in (("2", first), ("1", last), ("2", last)):
        assert number in [each for each, _ in charges(fleet, client, "cut")]
        assert number in [each.get("round") for each in events(fleet, client, "answered")]
    assert uncharged(fleet, "cut") == [] and leaks(fleet) == []


def test_nodes_whose_links_are_mended_take_part_in_the_next_run(fleet: Spread) -> None:
    for node in NODES:
        fleet.cables.mend(node)
    with followed(fleet, "mended", "federation.min_clients=3", "federation.rounds=2") as run:
        assert run.ended() == 0, run.told + fleet.logs()
    assert [each["accepted"] for each in records(fleet, "mended")] == [["0", "1", "2"]] * 2
    assert uncharged(fleet, "mended") == [] and leaks(fleet) == []
