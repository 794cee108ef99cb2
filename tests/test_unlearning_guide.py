"""The guide to forgetting: its record is signed as it says, and its tables leave nothing out."""

import json
import re
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from server.forgetting.steps import _ACTIONS
from strategies.unlearning.config import ForgettingConfig
from strategies.unlearning.signature import canonical

TEXT = (Path(__file__).parents[1] / "docs" / "unlearning.md").read_text(encoding="utf-8")


def test_the_record_that_is_shown_is_signed() -> None:
    (block,) = re.findall(r"^```json\n(.*?)^```$", TEXT, flags=re.M | re.S)
    shown = json.loads(block)
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(shown["public_key"]))
    key.verify(bytes.fromhex(shown["signature"]), canonical(shown["record"]))


def test_every_setting_and_every_step_is_told() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", TEXT.split("## Steps")[0].split("| key |")[1], flags=re.M)
    told = [name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(ForgettingConfig.model_fields)
    steps = TEXT.split("## Steps")[1].split("## The record")[0]
    assert [name for name in _ACTIONS if name not in re.sub(r"\s+", " ", steps)] == []
