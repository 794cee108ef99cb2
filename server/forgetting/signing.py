"""Signed records: Ed25519 over canonical JSON, with the public key beside the signature."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lora.errors import RunError
from lora.files import write_bytes
from server.forgetting.files import read_json, write_json

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
    try:
        key, record, signature = signed["public_key"], signed["record"], bytes.fromhex(signed["signature"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, canonical(record))
    except (KeyError, TypeError, ValueError, InvalidSignature) as error:
        raise RunError(
            f"{path}: the signature does not hold ({type(error).__name__}): the record was changed after it was "
            "signed; restore it from a backup"
        ) from error
    if key != public:
        raise RunError(f"{path}: signed by key {key[:12]}, and {public[:12]} is the store's; it is not of this store")
    return dict(record)


def canonical(record: Mapping[str, Any]) -> bytes:
    """Return the bytes that are signed: UTF-8 JSON with sorted keys and no blanks."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _public(key: Key) -> str:
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
