"""Signed records: what a change of any part does, and that other Ed25519 code accepts them."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import RunError
from server.forgetting.signing import new_key, read_key, read_record, write_record
from strategies.unlearning.signature import canonical

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, str]:
    public = new_key(tmp_path / "key.pem")
    write_record(tmp_path / "r.json", {"asked": {"rows": 8}}, key=read_key(tmp_path / "key.pem", public=public))
    return tmp_path / "r.json", public


def test_a_record_can_be_checked_with_what_is_in_it(signed: tuple[Path, str]) -> None:
    path, public = signed
    tree = json.loads(path.read_text())
    assert tree["public_key"] == public and tree["algorithm"] == "Ed25519"
    text = json.dumps(tree["record"], sort_keys=True, separators=(",", ":")).encode()
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(tree["signature"]), text)


@pytest.mark.parametrize("change", [{"record": {"asked": {"rows": 9}}}, {"signature": "00" * 64}, {"signature": "x"}])
def test_a_changed_record_is_refused(signed: tuple[Path, str], change: dict[str, Any]) -> None:
    path, public = signed
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match="signature does not hold"):
        read_record(path, public=public)


def test_another_stores_record_and_key_are_refused(signed: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = signed
    other = new_key(tmp_path / "other.pem")
    with pytest.raises(RunError, match="not of this store"):
        read_record(path, public=other)
    with pytest.raises(RunError, match="is not the key"):
        read_key(tmp_path / "key.pem", public=other)
    with pytest.raises(RunError, match="no key can be read"):
        read_key(path, public=other)
    with pytest.raises(RunError, match="there is no record"):
        read_record(tmp_path / "none.json", public=other)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_reading_back_signs_the_same_bytes(record: dict[str, Any]) -> None:
    assert canonical(json.loads(json.dumps(record))) == canonical(record)
