"""The page of the interface: every operation is there, and nothing of another host."""

import re
from html import unescape

from server.console.documentation import operations
from tests.server.service.site import Site


def test_every_operation_is_on_the_page(site: Site) -> None:
    page = site.client.get("/docs")
    assert page.status_code == 200 and not re.search(r"(src|href)=\"(?!/|#)", page.text)
    document = site.client.get("/openapi.json").json()
    found = [*operations(document)]
    assert len(found) == sum(len(each) for each in document["paths"].values()) >= 20
    text = unescape(page.text)
    for each in found:
        assert f'<code class="method">{each.method}</code> <code>{each.path}</code>' in text and each.words in text
        for field in each.fields:
            assert f"<code>{field.name}</code>" in text
    assert not [each.path for each in found if each.path.startswith("/console")]


def test_fields_say_what_they_take(site: Site) -> None:
    found = {f"{each.method} {each.path}": each for each in operations(site.client.get("/openapi.json").json())}
    fields = {each.name: each for each in found["GET /v1/users/{user}/recommendations"].fields}
    assert fields["fallback"].kind == "none, cold" and not fields["fallback"].needed and fields["user"].needed
    body = {each.name: each for each in found["POST /v1/users/{user}/predictions"].fields}
    assert body["texts"].kind == "list of string or null" and body["texts"].place == "body"
    assert [each.name for each in found["PUT /v1/adapters/{name}"].fields][-1] == "application/zip"
