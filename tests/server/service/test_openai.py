"""OpenAI's own client against the service."""

import openai
import pytest

from tests.server.service.site import Site


@pytest.fixture
def client(site: Site, url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=site.key("user-001"), max_retries=0)


def test_its_client_lists_models_completes_and_streams(client: openai.OpenAI) -> None:
    assert {"user-001", "base"} <= {model.id for model in client.models.list()}
    whole = client.completions.create(model="user-001", prompt="14/20 The", max_tokens=12, temperature=0)
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage is not None
    pieces = [*client.completions.create(
        model="user-001", prompt="14/20 The", max_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )]  # fmt: skip
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].usage == whole.usage


def test_what_changes_nothing_may_be_sent_along(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="user-001", prompt="14/20 The", temperature=0)
    more = client.completions.create(
        model="user-001", prompt="14/20 The", temperature=0, best_of=1, echo=False, frequency_penalty=0, logit_bias={},
        logprobs=None, n=1, presence_penalty=0, suffix=None, top_p=1, user="somebody",
    )  # fmt: skip
    assert more.choices == plain.choices


@pytest.mark.parametrize(
    ("more", "says"),
    [({"echo": True}, "echo"), ({"logprobs": 3}, "logprobs"), ({"presence_penalty": 0.5}, "presence_penalty"),
     ({"best_of": 2}, "best_of"), ({"logit_bias": {"50256": -100}}, "logit_bias"), ({"suffix": "!"}, "suffix")],
)  # fmt: skip
def test_what_would_be_left_out_is_refused_by_name(client: openai.OpenAI, more: dict[str, object], says: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=says):
        client.completions.create(model="user-001", prompt="The", **more)  # type: ignore[call-overload]


def test_its_errors_are_its_own(client: openai.OpenAI, site: Site, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="has no adapter here"):
        client.completions.create(model="user-002", prompt="The")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="nonsense", max_retries=0).models.list()
