"""Signed records: Ed25519 over canonical JSON, with the public key beside the signature."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lora.errors import RunError
from lora.files import write_bytes
from server.forgetting.files import read_json, write_json
from strategies.unlearning.signature import canonical, verified

Key = Ed25519PrivateKey


def new_key(path: Path) -> str:
    """Make a key that only its owner may read; returns the public one, 64 hex digits."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_bytes(path, pem, mode=0o600)
    return _public(key)


def read_key(path: Path, *, public: str) -> Key:
    """Read a key. Raises RunError where it is missing, damaged, or not the one that belongs to `public`."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: no key can be read ({error}); records cannot be signed without it") from error
    if not isinstance(key, Ed25519PrivateKey) or _public(key) != public:
        raise RunError(f"{path}: is not the key that the store was made with ({public[:12]}); restore it")
    return key


def write_record(path: Path, record: Mapping[str, Any], *, key: Key) -> None:
    """Sign a record and write it."""
    signature = key.sign(canonical(record)).hex()
    signed = {"record": record, "algorithm": "Ed25519", "public_key": _public(key), "signature": signature}
    write_json(path, signed)


def read_record(path: Path, *, public: str) -> dict[str, Any]:
    """Return a record whose signature holds. Raises RunError where it does not, or another key made it."""
    signed = read_json(path)
    if signed is None:
        raise RunError(f"{path}: there is no record; the request is not done")
    return verified(signed, public=public, who=str(path))


def _public(key: Key) -> str:
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
