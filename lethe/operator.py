"""The operator's side of a deployment: Flower's own commands, asked for JSON, and which node is registered as what."""

import hashlib
import json
import re
import ssl
import subprocess
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethe.processes import Command, flwr, run
from lethe.site import CONNECTION, Node, Site, replace
from lora.errors import DeploymentError

_TIMEOUT = 120.0
_ANSWER = 5.0
_REGISTERED = re.compile(r"already (in use|registered|exists)|duplicate", re.IGNORECASE)


@dataclass(frozen=True)
class RunStatus:
    """What the SuperLink says of a run."""

    identity: str
    status: str
    """pending, starting, running, finished:completed, finished:failed or finished:stopped."""
    details: str
    elapsed: float
    """Seconds."""
    bytes_in: int
    bytes_out: int

    @property
    def finished(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether it has come to a good end."""
        return self.status == "finished:completed"


class Operator:
    """Asks a SuperLink's control interface, by the `flwr` commands that one would type oneself."""

    def __init__(self, site: Site, *, superlink: str | None = None) -> None:
        self.site = site
        site.write_connection(superlink=superlink)

    def runs(self) -> list[RunStatus]:
        """Return all runs, the newest first."""
        return [_status(each) for each in self._ask("ls", CONNECTION)["runs"]]

    def run(self, identity: str) -> RunStatus:
        """Return one run."""
        return _status(self._ask("ls", CONNECTION, "--run-id", identity)["runs"][0])

    def nodes(self) -> list[dict[str, Any]]:
        """Return what the SuperLink says of every node that was ever registered."""
        return list(self._ask("supernode", "list", CONNECTION)["nodes"])

    def stop(self, identity: str) -> None:
        """Stop a run."""
        self._ask("stop", identity, CONNECTION)

    def start(self, *, bundle: Path, settings: Path) -> str:
        """Submit an app with its run config; returns the run's number."""
        return str(_answer(run(self.site, bundle=bundle, settings=settings))["run-id"])

    def register(self, nodes: Iterable[Node]) -> list[str]:
        """Make nodes' public keys known to the SuperLink; returns the names of those that were not known yet."""
        alive = {str(each["node-id"]) for each in self.nodes() if each["status"] != "unregistered"}
        new = []
        for node in nodes:
            entry, key = self._known().get(node.name), self._fingerprint(node)
            if not (entry and entry["key"] == key and entry["id"] in alive) and self._register(node, key):
                new.append(node.name)
        return new

    def _register(self, node: Node, key: str) -> bool:
        """Register one node; False where the SuperLink knows its key already."""
        public = str(self.site.node_folder(node.name) / "auth.pub")
        try:
            answer = self._ask("supernode", "register", public, CONNECTION, "--name", node.name)
        except DeploymentError as error:
            if _REGISTERED.search(str(error)):
                return False
            raise
        self._remember({**self._known(), node.name: {"id": str(answer["node-id"]), "key": key}})
        return True

    def unregister(self, name: str) -> bool:
        """Let the SuperLink forget a node; False when it was never registered.

        Raises DeploymentError where the SuperLink has nodes that this site has no names for: it may be one of them.
        """
        known = self._known()
        alive = {str(each["node-id"]) for each in self.nodes() if each["status"] != "unregistered"}
        if name not in known or known[name]["id"] not in alive:
            if nameless := alive - {entry["id"] for entry in known.values()}:
                raise DeploymentError(
                    f"{name} may be any of the nodes {', '.join(sorted(nameless))}, which have no name here; "
                    f"`FLWR_HOME={self.site.home} flwr supernode unregister NUMBER {CONNECTION}` takes one out"
                )
            return False
        self._ask("supernode", "unregister", known[name]["id"], CONNECTION)
        self._remember({each: entry for each, entry in known.items() if each != name})
        return True

    def names(self) -> dict[str, str]:
        """Return nodes' names by the SuperLink's numbers for them."""
        return {entry["id"]: name for name, entry in self._known().items()}

    @property
    def _registry(self) -> Path:
        return self.site.home / "nodes.json"

    def _known(self) -> dict[str, dict[str, str]]:
        with suppress(OSError, ValueError):
            return dict(json.loads(self._registry.read_text()))
        return {}

    def _remember(self, known: Mapping[str, Mapping[str, str]]) -> None:
        replace(self._registry, json.dumps(known, indent=1) + "\n")

    def _fingerprint(self, node: Node) -> str:
        try:
            return hashlib.sha256((self.site.node_folder(node.name) / "auth.pub").read_bytes()).hexdigest()
        except OSError as error:
            raise DeploymentError(
                f"{error.filename}: cannot be read ({error.strerror}); restore the node's key"
            ) from None

    def _ask(self, *words: str) -> dict[str, Any]:
        return _answer(flwr(self.site, *words, "--format", "json"))


def healthy(address: str, ca: Path) -> bool:
    """Whether a SuperLink answers at an address under a certificate of this authority."""
    with suppress(OSError, ValueError):
        context = ssl.create_default_context(cafile=str(ca))
        with urllib.request.urlopen(f"https://{address}/health", context=context, timeout=_ANSWER) as answer:
            return bool(answer.status == 200)
    return False


def _answer(command: Command) -> dict[str, Any]:
    """Run a command of Flower's and return its JSON. Raises DeploymentError with what it said when it failed."""
    try:
        done = subprocess.run(
            command.argv,
            env=command.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeploymentError(f"`{command.shown()}` did not finish ({error}); is the SuperLink up?") from None
    _, brace, rest = done.stdout.partition("{")
    with suppress(ValueError):
        answer = dict(json.loads(brace + rest))
        if answer.get("success"):
            return answer
        raise DeploymentError(_reason(str(answer.get("error-message", "")) or done.stderr, command))
    raise DeploymentError(_reason(done.stderr or done.stdout, command))


def _reason(text: str, command: Command) -> str:
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split()) or "no reason given"
    return f"`{' '.join(command.argv[:3])}` failed: {words[-600:]}"


def _status(answer: Mapping[str, Any]) -> RunStatus:
    traffic = answer.get("network-traffic") or {}
    return RunStatus(
        identity=str(answer["run-id"]),
        status=str(answer["status"]),
        details="" if answer.get("status-details") in (None, "N/A") else str(answer["status-details"]),
        elapsed=float(answer.get("elapsed") or 0.0),
        bytes_in=int(traffic.get("inbound-bytes") or 0),
        bytes_out=int(traffic.get("outbound-bytes") or 0),
    )
