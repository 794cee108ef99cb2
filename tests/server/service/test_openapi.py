"""The documented API is the real one: generated requests, right and wrong, get documented answers."""

import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from server.service.http import create_app
from server.service.registry import Registry
from server.service.service import Service, Writer
from strategies.personal.personalized import Personalized
from tests.server.service.conftest import Encoder
from tests.server.service.site import Site

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis import GenerationMode, checks
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi import checks as openapi


@schemathesis.serializer("application/zip")
def _zipped(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


CHECKS: list[Any] = [
    checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.negative_data_rejection,
]
OPERATIONS = [
    *("GET /v1/users/{user}", "DELETE /v1/users/{user}", "POST /v1/users/{user}/events"),
    *("GET /v1/users/{user}/recommendations", "POST /v1/users/{user}/predictions"),
    *("POST /v1/forget-requests", "GET /v1/forget-requests", "GET /v1/forget-requests/{request}"),
    *("GET /v1/adapters", "PUT /v1/adapters/{name}", "GET /v1/adapters/{name}", "DELETE /v1/adapters/{name}"),
    *("POST /v1/keys", "GET /v1/keys", "DELETE /v1/keys/{key}", "GET /v1/models", "POST /v1/completions"),
    *("GET /healthz", "GET /readyz", "GET /metrics"),
]


@pytest.fixture(scope="session")
def documented(personal: Personalized, text_encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    registry = Registry(None, tmp_path_factory.mktemp("documented"))
    service = Service(registry, learner=text_encoder.learner, writer=Writer(personal.base, personal.adapted))
    document = create_app(service).openapi()
    service.close()
    # Every request comes with a key (`sent`); what happens without one is in test_http_hostile.py.
    for operations in document["paths"].values():
        for each in operations.values():
            each.pop("security", None)
    found = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in found.get_all_operations()]
    return {f"{each.method.upper()} {each.path}": each for each in operations}


def test_every_operation_is_documented_and_asked(documented: Any) -> None:
    assert {*documented} == {*OPERATIONS}
    assert all(each.definition.raw["description"] and each.definition.raw["tags"] for each in documented.values())


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_answers_as_documented(site: Site, documented: Any, name: str) -> None:
    operation = documented[name]
    modes = [operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
    negative = operation.path_parameters or operation.query or operation.body

    @settings(
        max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=st.one_of(modes if negative else modes[:1]))
    def ask(case: Any) -> None:
        response = sent(site, case)
        # A body that is too large is refused before it is read; the check does not know that as a rejection.
        case.validate_response(response, checks=CHECKS if response.status_code != 413 else CHECKS[:-1])

    ask()


def sent(site: Site, case: Any) -> Any:
    given = case.as_transport_kwargs(base_url="http://127.0.0.1")
    headers = {**dict(given.get("headers") or {}), "Authorization": f"Bearer {site.key('operator')}"}
    body = given.get("data")
    more = {"content": body} if isinstance(body, str | bytes) else {"data": body}
    # Whatever is no Latin text cannot be sent as a header by any client.
    headers = {key: value for key, value in headers.items() if str(value).isascii() and str(value).isprintable()}
    return site.client.request(
        given["method"], given["url"], headers=headers, params=given.get("params"), json=given.get("json"),
        **(more if body is not None else {}),
    )  # fmt: skip


def test_what_an_answer_breaks_is_found(site: Site, documented: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: an answer of another shape is noticed."""
    case = documented["GET /healthz"].Case()
    response = sent(site, case)
    assert response.status_code == 200
    monkeypatch.setattr(response, "_content", b'{"state": 1}')
    with pytest.raises(FailureGroup):
        case.validate_response(response, checks=CHECKS)
