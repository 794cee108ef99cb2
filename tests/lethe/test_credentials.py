"""Certificates that TLS accepts for their hosts and for no others, keys that Flower takes, files for one owner."""

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

from lethe.credentials import (
    Pair,
    authority,
    days_left,
    exposed,
    hosts_of,
    make_folder,
    node_key,
    secret,
    server_certificate,
    write_new,
)
from lora.errors import ConfigError

HOSTS = ["superlink.example", "127.0.0.1", "::1"]


def shake_hands(tmp_path: Path, server: Pair, trusted: bytes, *, host: str) -> str:
    """Open a TLS connection over a socket pair; returns the protocol's version."""
    (tmp_path / "key").write_bytes(server.private)
    (tmp_path / "crt").write_bytes(server.public)
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    calling = ssl.create_default_context(cadata=trusted.decode())
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            accepting.wrap_socket(far, server_side=True).recv(1)
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with calling.wrap_socket(near, server_hostname=host) as link:
            return str(link.version())
    finally:
        near.close()
        thread.join(timeout=10)


@pytest.mark.parametrize("host", HOSTS)
def test_the_certificate_is_good_for_its_hosts(host: str, tmp_path: Path) -> None:
    signer = authority("clinic")
    assert shake_hands(tmp_path, server_certificate(signer, HOSTS), signer.public, host=host).startswith("TLS")


@pytest.mark.parametrize("host", ["another.example", "::2"])
def test_it_is_good_for_no_other(host: str, tmp_path: Path) -> None:
    signer = authority("clinic")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        shake_hands(tmp_path, server_certificate(signer, HOSTS), signer.public, host=host)


def test_it_is_good_under_no_other_authority(tmp_path: Path) -> None:
    server = server_certificate(authority("clinic"), HOSTS)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, server, authority("clinic").public, host=HOSTS[0])


def test_a_certificate_tells_hosts_and_days() -> None:
    server = server_certificate(authority("clinic"), HOSTS)
    assert hosts_of(server.public) == {*HOSTS}
    assert 800 < days_left(server.public) <= 825


def test_an_authority_whose_key_is_another_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ca/ca\.key does not belong to ca/ca\.crt"):
        server_certificate(Pair(authority("a").private, authority("a").public), HOSTS)
    with pytest.raises(ConfigError, match="cannot be read"):
        server_certificate(Pair(b"nonsense", authority("a").public), HOSTS)


def test_node_keys_are_of_the_kind_that_flower_takes() -> None:
    pair = node_key()
    private = serialization.load_ssh_private_key(pair.private, password=None)
    public = serialization.load_ssh_public_key(pair.public)
    assert isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(public, ec.EllipticCurvePublicKey)
    assert uses_nist_ec_curve(public) and private.public_key() == public
    assert node_key().private != pair.private


def test_secrets_are_long_and_differ() -> None:
    assert len(secret()) == 96 and secret() != secret()


def test_files_are_for_their_owner_and_never_overwritten(tmp_path: Path) -> None:
    write_new(tmp_path / "new" / "deep" / "key", b"1")
    write_new(tmp_path / "new" / "deep" / "crt", b"1", private=False)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").rglob("*")}
    assert modes == {"deep": 0o700, "key": 0o600, "crt": 0o644}
    with pytest.raises(ConfigError, match="never overwritten"):
        write_new(tmp_path / "new" / "deep" / "key", b"2")
    assert (tmp_path / "new" / "deep" / "key").read_bytes() == b"1"


def test_what_others_can_read_is_found(tmp_path: Path) -> None:
    make_folder(tmp_path / "site")
    write_new(tmp_path / "site" / "key", b"1")
    assert exposed([tmp_path / "site" / "key", tmp_path / "site" / "missing"]) == []
    (tmp_path / "site" / "key").chmod(0o640)
    assert exposed([tmp_path / "site" / "key"]) == [tmp_path / "site" / "key"]
