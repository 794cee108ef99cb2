"""gRPC: every call answers what HTTP answers, and refuses what HTTP refuses, in the same words."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lora.errors import ConfigError
from server.service import personal_pb2, personal_pb2_grpc
from server.service.adapters import NewAdapter
from server.service.door import Door
from server.service.rpc import ERROR, SERVICE
from tests.server.service.conftest import Encoder, drawn
from tests.server.service.site import NEXT, Site

pb: Any = personal_pb2
ROOT = Path(__file__).parents[3]
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
}


class Caller:
    """A client of both doors."""

    def __init__(self, site: Site, door: Door) -> None:
        self.site, self.door = site, door
        self.channel = grpc.insecure_channel(f"127.0.0.1:{door.port}")
        self.stub: Any = personal_pb2_grpc.PersonalStub(self.channel)  # type: ignore[no-untyped-call]

    def key(self, who: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.site.key(who)}"),) if who else ()

    def raw(self, name: str, request: Any, *, who: str = "operator", timeout: float = 60) -> Any:
        return getattr(self.stub, name)(request, metadata=self.key(who), timeout=timeout)

    def __call__(self, name: str, request: Any, *, who: str = "operator") -> Any:
        return plain(self.raw(name, request, who=who))

    def refused(self, name: str, request: Any, *, who: str = "operator") -> tuple[grpc.StatusCode, Any]:
        with pytest.raises(grpc.RpcError) as caught:
            found = self.raw(name, request, who=who)
            if name.startswith("Stream"):
                list(found)
        return caught.value.code(), told(caught.value)


def told(error: Any) -> Any:
    (data,) = [value for key, value in error.trailing_metadata() if key == ERROR]
    found = json.loads(data)
    assert error.details() == found["error"]["message"]
    return found


def plain(message: Any) -> Any:
    """As JSON, with whole numbers as such."""
    return _whole(MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, str) and value.isdigit() else value


def without_none(value: Any) -> Any:
    """JSON of HTTP without what a message leaves out: fields that are null."""
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal, up to rounding: another batch may have answered."""
    if isinstance(theirs, dict):
        assert {key for key in ours if ours[key] not in ([], {}, None)} <= theirs.keys() <= ours.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-5)
    else:
        assert ours == theirs


@pytest.fixture
def both(site: Site) -> Iterator[Caller]:
    door = Door(site.service)
    caller = Caller(site, door)
    yield caller
    caller.channel.close()
    door.close(grace=1)


def test_users_get_the_same_answers_by_both_doors(both: Caller, text_encoder: Encoder) -> None:
    site, path = both.site, "/v1/users/user-003"
    layout = text_encoder.learner.layout
    site.service.adapters.write(NewAdapter("user-003", drawn(layout, 1)[0], layout, "tiny-bert", 2, "user-003"))
    asks: list[tuple[str, Any, Any]] = [
        ("Recommend", pb.RecommendRequest(user="user-003", count=4),
         site.get(f"{path}/recommendations", params={"count": 4})),
        ("Recommend", pb.RecommendRequest(user="user-003", personalized=False),
         site.get(f"{path}/recommendations", params={"personalized": False})),
        ("Recommend", pb.RecommendRequest(user="nobody", fallback="cold"),
         site.get("/v1/users/nobody/recommendations", params={"fallback": "cold"})),
        ("Predict", pb.PredictRequest(user="user-003", items=["item-003", "item-001"]),
         site.post(f"{path}/predictions", {"items": ["item-003", "item-001"]})),
        ("Predict", pb.PredictRequest(user="user-003", texts=["a b", ""]),
         site.post(f"{path}/predictions", {"texts": ["a b", ""]})),
        ("Predict", pb.PredictRequest(user="user-003", texts=["a"], kind="embed"),
         site.post(f"{path}/predictions", {"texts": ["a"], "kind": "embed"})),
        ("GetUser", pb.UserRequest(user="user-003", latest=3), site.get(path, params={"latest": 3})),
        ("ListAdapters", pb.ListAdaptersRequest(), site.get("/v1/adapters")),
    ]  # fmt: skip
    for name, request, theirs in asks:
        assert_same(both(name, request), without_none(theirs))
    ours, theirs = both("ListModels", pb.ListModelsRequest()), site.get("/v1/models")
    assert [model["id"] for model in ours["data"]] == [model["id"] for model in theirs["data"]]


def test_events_by_one_door_are_known_at_the_other(both: Caller) -> None:
    request = pb.EventsRequest(user="new", events=[pb.Event(**NEXT)], idempotency_key="k")  # type: ignore[arg-type]
    first, again = both("PostEvents", request), both("PostEvents", request)
    assert first["new"] and again == first | {"repeated": True}
    send = {"headers": {"Idempotency-Key": "k"}}
    assert both.site.post("/v1/users/new/events", {"events": [NEXT]}, **send) == again
    assert both.site.get("/v1/users/new")["events"] == 1


def test_forgetting_by_grpc_is_seen_by_http(both: Caller) -> None:
    done = both("Forget", pb.ForgetUserRequest(user="user-004"), who="user-004")
    assert done["state"] == "done" and done["evidence"]["slot"] is True
    assert_same(both.site.get(f"/v1/forget-requests/{done['id']}"), done)
    assert both("GetForgetRequest", pb.ForgetRequestRequest(id=done["id"]), who="auditor") == done
    assert both("ListForgetRequests", pb.ListForgetRequestsRequest())["forget_requests"] == [done]
    assert both.refused("GetUser", pb.UserRequest(user="user-004"))[0] is grpc.StatusCode.NOT_FOUND


def test_adapters_leave_and_come(both: Caller) -> None:
    archive = both.raw("ExportAdapter", pb.AdapterRequest(name="user-003"), who="user-003").archive
    assert archive == both.site.ask("GET", "/v1/adapters/user-003").content
    brought = both("ImportAdapter", pb.ImportRequest(name="copy", archive=archive, owner="zoë", model="base"))
    assert brought["owner"] == "zoë"
    ask = {"prompt": ["14/20 The", "x"], "max_tokens": 6}
    ours = both("Complete", pb.CompletionRequest(model="copy", **ask), who="zoë")  # type: ignore[arg-type]
    theirs = both.site.post("/v1/completions", ask | {"model": "copy"}, who="zoë")
    assert_same(ours["choices"], [without_none(each) for each in theirs["choices"]])
    assert_same(ours["whose"], without_none(theirs["whose"]))
    assert ours["usage"] == theirs["usage"]
    both("DeleteAdapter", pb.AdapterRequest(name="copy"))
    assert both.refused("Complete", pb.CompletionRequest(model="copy", prompt=["a"]))[0] is CODES[404]


def test_a_stream_adds_up_to_the_whole(both: Caller) -> None:
    request = pb.CompletionRequest(model="user-001", prompt=["14/20 The"], max_tokens=12)
    whole = both.raw("Complete", request)
    pieces = [*both.raw("StreamCompletion", request)]
    assert len(pieces) >= 2 and "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage and [*pieces[-1].whose] == [*whole.whose]
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not pieces[0].HasField("usage")
    refused, _ = both.refused("StreamCompletion", pb.CompletionRequest(model="nobody", prompt=["a"]))
    assert refused is grpc.StatusCode.NOT_FOUND


def test_a_stream_that_is_left_is_not_written_on(both: Caller) -> None:
    stream = both.raw("StreamCompletion", pb.CompletionRequest(model="user-001", prompt=["a"], max_tokens=400))
    next(iter(stream))
    stream.cancel()
    engine, over = both.site.service.engines["writing"], threading.Event()
    for _ in range(500):
        if not engine._open:
            return
        over.wait(0.02)
    pytest.fail("the text is still being written")


REFUSED: list[tuple[str, Any, str, Callable[[Site], Any]]] = [
    ("GetUser", pb.UserRequest(user="user-001"), "", lambda s: s.ask("GET", "/v1/users/user-001", who="")),
    ("GetUser", pb.UserRequest(user="user-001"), "user-002",
     lambda s: s.ask("GET", "/v1/users/user-001", who="user-002")),
    ("Recommend", pb.RecommendRequest(user="nobody"), "operator",
     lambda s: s.ask("GET", "/v1/users/nobody/recommendations")),
    ("PostEvents", pb.EventsRequest(user="user-001", events=[pb.Event(item="item-00x", rating=3.0, time=2**31)]),
     "operator",
     lambda s: s.ask("POST", "/v1/users/user-001/events",
                     json={"events": [{"item": "item-00x", "rating": 3.0, "time": 2**31}]})),
    ("PostEvents", pb.EventsRequest(user="user-001", events=[pb.Event(item="item-001", rating=3.0, time=1)]),
     "operator",
     lambda s: s.ask("POST", "/v1/users/user-001/events",
                     json={"events": [{"item": "item-001", "rating": 3.0, "time": 1}]})),
    ("Predict", pb.PredictRequest(user="user-001"), "operator",
     lambda s: s.ask("POST", "/v1/users/user-001/predictions", json={})),
    ("ImportAdapter", pb.ImportRequest(name="x", archive=b"no archive", model="base"), "operator",
     lambda s: s.ask("PUT", "/v1/adapters/x", content=b"no archive", params={"model": "base"})),
    ("ImportAdapter", pb.ImportRequest(name="x", archive=b"no archive"), "auditor",
     lambda s: s.ask("PUT", "/v1/adapters/x", content=b"no archive", who="auditor")),
    ("Complete", pb.CompletionRequest(model="user-001", prompt=["a"], max_tokens=4000), "operator",
     lambda s: s.ask("POST", "/v1/completions", json={"model": "user-001", "prompt": ["a"], "max_tokens": 4000})),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_http_refuses_is_refused_in_the_same_words(both: Caller, number: int) -> None:
    name, request, who, ask = REFUSED[number]
    response = ask(both.site)
    code, body = both.refused(name, request, who=who)
    assert body == response.json() and code is CODES[response.status_code]


def test_requests_are_checked_to_the_last_field(both: Caller) -> None:
    event = pb.Event(item="item-001", time=2**31)
    wrong: dict[str, Any] = {
        "rating": ("PostEvents", pb.EventsRequest(user="user-001", events=[event])),
        "count": ("Recommend", pb.RecommendRequest(user="user-001", count=1000)),
        "fallback": ("Recommend", pb.RecommendRequest(user="user-001", fallback="x")),
        "user": ("Recommend", pb.RecommendRequest()),
        "texts": ("Predict", pb.PredictRequest(user="user-001", texts=["a"] * 100)),
    }
    for field, (name, request) in wrong.items():
        code, body = both.refused(name, request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT and field in body["error"]["message"], body
    large = pb.PredictRequest(user="user-001", items=["x" * 500] * 3000)
    assert both.refused("Predict", large)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_deadline_frees_the_engine(both: Caller) -> None:
    request = pb.CompletionRequest(model="user-001", prompt=["14/20"], max_tokens=480)
    with pytest.raises(grpc.RpcError) as caught:
        both.raw("Complete", request, timeout=0.05)
    assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
    engine, over = both.site.service.engines["writing"], threading.Event()
    for _ in range(500):
        if not engine._open:
            return
        over.wait(0.02)
    pytest.fail("the text is still being written")


def test_a_full_queue_says_when_to_come_back(both: Caller) -> None:
    both.site.service.engines["recommending"].close()
    with pytest.raises(grpc.RpcError) as caught:
        both.raw("Recommend", pb.RecommendRequest(user="user-001"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert int(dict(caught.value.trailing_metadata())["retry-after"]) >= 1


def test_health_reflection_and_figures(both: Caller) -> None:
    both("Recommend", pb.RecommendRequest(user="user-001"))
    health = health_pb2_grpc.HealthStub(both.channel)
    asked = health_pb2.HealthCheckRequest(service=SERVICE)
    assert health.Check(asked).status == health_pb2.HealthCheckResponse.SERVING
    listed = reflection_pb2_grpc.ServerReflectionStub(both.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    assert SERVICE in [each.name for each in next(iter(listed)).list_services_response.service]
    assert f'method="gRPC",route="/{SERVICE}/Recommend",status="200"' in both.site.client.get("/metrics").text
    both.site.service.engines["recommending"].close()
    watched = health.Watch(asked)
    assert any(each.status == health_pb2.HealthCheckResponse.NOT_SERVING for each in watched)


def test_a_port_that_is_taken_is_named(both: Caller) -> None:
    with pytest.raises(ConfigError, match=rf"--grpc-port {both.door.port}"):
        Door(both.site.service, port=both.door.port)


def test_the_python_is_what_the_protocol_makes(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    theirs = Path(protoc.__file__).parent / "_proto"
    made = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"-I{ROOT}", f"-I{theirs}", *made, "server/service/personal.proto"]) == 0
    files = sorted((tmp_path / "server/service").iterdir())
    assert len(files) == 3
    for file in files:
        assert (ROOT / "server/service" / file.name).read_text() == file.read_text(), "run `make protos`"
