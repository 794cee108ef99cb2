"""What proves who is who in a deployment: a certificate authority, server certificates, node keys, shared secrets."""

import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lora.errors import ConfigError

AUTHORITY_DAYS, SERVER_DAYS = 3650, 825
SECRET_BYTES = 48
# Clocks of two hosts differ; a certificate that begins now would not be valid yet on the slower one.
_SKEW = timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """A private key and what is public of it, both as the bytes of their files."""

    private: bytes
    public: bytes


def authority(name: str) -> Pair:
    """Make a certificate authority for one federation: key and self-signed certificate (PEM), for ten years."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority"[:64])])
    usage = _usage(signs_certificates=True)
    draft = (
        _draft(subject, subject, key.public_key(), days=AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Pair(_pem(key), draft.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def server_certificate(signer: Pair, hosts: Sequence[str]) -> Pair:
    """Make a server's key and its certificate for the given host names and addresses, signed by an authority.

    Raises ConfigError for an authority that cannot be read.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    issuer, issuer_key = _signer(signer)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    draft = (
        _draft(subject, issuer.subject, key.public_key(), days=SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    return Pair(_pem(key), draft.sign(issuer_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def hosts_of(certificate: bytes) -> set[str]:
    """Return the host names and addresses that a certificate (PEM) is for."""
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {str(each.value) for each in names.value}


def days_left(certificate: bytes) -> int:
    """Return the whole days until a certificate (PEM) expires; negative when it has."""
    return (x509.load_pem_x509_certificate(certificate).not_valid_after_utc - datetime.now(UTC)).days


def node_key() -> Pair:
    """Make a node's key pair in OpenSSH's format, on the curve that Flower asks for (P-384)."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return Pair(private, public + b"\n")


def secret() -> bytes:
    """Draw a shared secret: 48 random bytes in hexadecimal, so that no byte of it can be mistaken for a line's end."""
    return secrets.token_hex(SECRET_BYTES).encode()


def write_new(path: Path, content: bytes, *, private: bool = True) -> None:
    """Write a file that must not be there yet, 0600 from its first byte on (0644 for what is public).

    Raises ConfigError when it exists, or its place cannot be written.
    """
    try:
        make_folder(path.parent)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    except FileExistsError:
        raise ConfigError(f"{path} exists already and is never overwritten; move it away first") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name a writable place") from None
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for its owner only (0700)."""
    for each in reversed([path, *path.parents]):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)


def exposed(paths: Iterable[Path]) -> list[Path]:
    """Return those of the files that others than their owner may read or write."""
    return [path for path in paths if path.is_file() and path.stat().st_mode & 0o077]


def _draft(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _signer(pair: Pair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        key = serialization.load_pem_private_key(pair.private, password=None)
        certificate = x509.load_pem_x509_certificate(pair.public)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the certificate authority cannot be read ({error}); restore ca/ from its backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError("ca/ca.key does not belong to ca/ca.crt; restore both from one backup")
    return certificate, key
