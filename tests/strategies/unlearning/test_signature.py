"""Whoever checks a record finds out whether it is the one that was signed, and by whom."""

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from lora.errors import RunError
from strategies.unlearning.signature import canonical, verified


def signed(record: dict[str, Any]) -> dict[str, Any]:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    return {"record": record, "public_key": public, "signature": key.sign(canonical(record)).hex()}


def test_a_record_comes_back_whatever_the_order_of_its_keys() -> None:
    made = signed({"b": [1, 2.5, None], "a": "ü"})
    other = json.loads(json.dumps(made | {"record": {"a": "ü", "b": [1, 2.5, None]}}))
    assert verified(other, public=made["public_key"], who="it") == {"a": "ü", "b": [1, 2.5, None]}


@pytest.mark.parametrize(
    "change", [{"record": {"a": 2}}, {"signature": "00"}, {"signature": "x"}, {"public_key": "00"}, {"record": None}]
)
def test_a_changed_record_is_refused(change: dict[str, Any]) -> None:
    made = signed({"a": 1})
    with pytest.raises(RunError, match="it: the signature does not hold"):
        verified(made | change, public=made["public_key"], who="it")


def test_nonsense_and_another_key_are_refused() -> None:
    made = signed({"a": 1})
    for nonsense in (None, [], "x", {}):
        with pytest.raises(RunError, match="the signature does not hold"):
            verified(nonsense, public=made["public_key"], who="it")
    with pytest.raises(RunError, match="signed by key"):
        verified(made, public="0" * 64, who="it")
