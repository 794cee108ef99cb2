"""A service with its HTTP client, for tests."""

from typing import Any

from fastapi.testclient import TestClient
from httpx import Response

from server.service.service import Service

NEXT = {"item": "item-001", "rating": 4.5, "time": 2_000_000_000}


class Site:
    """A service with its HTTP client, and a key of every kind."""

    def __init__(self, service: Service, client: TestClient) -> None:
        self.service, self.client = service, client
        issue = service.keys.issue
        self.keys = {"operator": issue("operator"), "auditor": issue("auditor"), "": ""}

    def key(self, who: str) -> str:
        if who not in self.keys:
            self.keys[who] = self.service.keys.issue("user", owner=who)
        return self.keys[who]

    def ask(self, method: str, path: str, *, who: str = "operator", **more: Any) -> Response:
        headers = {"Authorization": f"Bearer {self.key(who)}"} if who else {}
        return self.client.request(method, path, headers={**headers, **more.pop("headers", {})}, **more)

    def get(self, path: str, **more: Any) -> Any:
        return good(self.ask("GET", path, **more))

    def post(self, path: str, body: Any, **more: Any) -> Any:
        return good(self.ask("POST", path, json=body, **more))


def good(response: Response) -> Any:
    assert response.status_code in (200, 201), response.text
    return response.json()


def problem(response: Response, *statuses: int) -> str:
    assert response.status_code in statuses, response.text
    error = response.json()["error"]
    assert error.keys() == {"type", "message", "remedy"} and error["remedy"]
    return str(error["message"])
