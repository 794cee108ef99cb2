"""Keys open what they should and nothing else, and only their digests are kept."""

import pytest
from sqlalchemy import text

from lora.errors import Busy, ConfigError, DataError, Denied, Unknown
from server.service.identity import Caller, Keys, NoKey, RateLimits, check_name
from server.service.registry import Registry


def test_a_key_is_known_by_its_digest_alone(registry: Registry) -> None:
    keys = Keys(registry)
    key = keys.issue("user", owner="zoë", label="phone")
    caller = keys.caller(key)
    assert (caller.role, caller.owner) == ("user", "zoë") and len(key) > 40
    with registry.session() as session:
        stored = str(session.execute(text("SELECT * FROM api_keys")).all())
    assert key not in stored and key[10:30] not in stored
    for wrong in (key[:-1], key + "x", "", "lethe_", "ключ", "\ud800"):
        with pytest.raises(NoKey):
            keys.caller(wrong)
    assert [(info.owner, info.label, info.revoked) for info in keys.infos()] == [("zoë", "phone", None)]


def test_a_revoked_key_is_refused_within_a_second_elsewhere_and_at_once_here(registry: Registry) -> None:
    now = [0.0]
    here, elsewhere = Keys(registry), Keys(registry, clock=lambda: now[0])
    key = here.issue("operator")
    caller = here.caller(key)
    assert elsewhere.caller(key) == caller
    here.revoke(caller.key)
    with pytest.raises(NoKey):
        here.caller(key)
    assert elsewhere.caller(key) == caller
    now[0] = 1.0
    with pytest.raises(NoKey):
        elsewhere.caller(key)
    with pytest.raises(Unknown):
        here.revoke("nothing")


def test_roles_and_owners_belong_together(registry: Registry) -> None:
    keys = Keys(registry)
    with pytest.raises(ConfigError, match="names that owner"):
        keys.issue("user")
    with pytest.raises(ConfigError, match="names that owner"):
        keys.issue("auditor", owner="ada")
    with pytest.raises(ConfigError, match="role 'root'"):
        keys.issue("root")  # type: ignore[arg-type]


def test_a_user_reads_own_data_only() -> None:
    own, operator, auditor = Caller("1", "user", "ada"), Caller("2", "operator", None), Caller("3", "auditor", None)
    own.may_read("ada")
    operator.may_read("ada")
    for caller, user in ((own, "eve"), (own, "Ada"), (auditor, "ada")):
        with pytest.raises(Denied):
            caller.may_read(user)
    auditor.must_be("operator", "auditor")
    with pytest.raises(Denied, match="role user"):
        own.must_be("operator")


@pytest.mark.parametrize(
    "name", ["", "  ", "x" * 129, "a\x00b", "a\nb", "../x", "a/b", "..", "a\\b", "\ud800", "a\u202eb"]
)
def test_names_that_cannot_be_shown_or_look_like_paths_are_refused(name: str) -> None:
    with pytest.raises(DataError):
        check_name(name, what="user")


@pytest.mark.parametrize("name", ["ada", "zoë", "用户", "👩‍🔬"[:1], "a.b-c_d@e", "x" * 128, "O'Brien; DROP TABLE"])
def test_names_of_any_script_are_taken(name: str) -> None:
    check_name(name, what="user")


def test_a_key_that_asks_too_often_waits_and_others_do_not() -> None:
    now = [0.0]
    limits = RateLimits(rate=2, burst=3, clock=lambda: now[0])
    for _ in range(3):
        limits.take("a")
    with pytest.raises(Busy) as caught:
        limits.take("a")
    assert caught.value.retry_after == pytest.approx(0.5)
    limits.take("b")
    now[0] = 0.5
    limits.take("a")
    with pytest.raises(Busy):
        limits.take("a")
    with pytest.raises(ConfigError):
        RateLimits(rate=0)
