"""Signatures of records, for whoever checks one: Ed25519 over canonical JSON."""

import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lora.errors import RunError


def canonical(record: Mapping[str, Any]) -> bytes:
    """Return the bytes that are signed: UTF-8 JSON with sorted keys and no blanks."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def verified(signed: Any, *, public: str, who: str) -> dict[str, Any]:
    """Return the record of a signed one, `public` being the key, 64 hex digits; `who` begins what is said otherwise.

    Raises RunError where the signature does not hold, or another key made it.
    """
    try:
        key, record, signature = signed["public_key"], signed["record"], bytes.fromhex(signed["signature"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, canonical(record))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, InvalidSignature) as error:
        raise RunError(
            f"{who}: the signature does not hold ({type(error).__name__}): the record was changed after it was "
            "signed; restore it from a backup"
        ) from error
    if key != public:
        raise RunError(f"{who}: signed by key {key[:12]}, and {public[:12]} is the store's; it is not of this store")
    return dict(record)
