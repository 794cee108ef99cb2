"""The documentation of the HTTP interface as a page of our own: what FastAPI shows needs scripts of another host."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from server.console.pages import html

documentation = APIRouter(include_in_schema=False)
_METHODS = ("get", "post", "put", "patch", "delete")


@dataclass(frozen=True)
class Field:
    """A parameter, or a field of a body."""

    name: str
    place: str
    kind: str
    needed: bool
    words: str


@dataclass(frozen=True)
class Operation:
    """One request that can be made."""

    method: str
    path: str
    tag: str
    words: str
    fields: tuple[Field, ...]
    answers: tuple[tuple[str, str], ...]


@documentation.get("/docs")
def get_documentation(request: Request) -> HTMLResponse:
    """Show every operation of the interface."""
    found = [*operations(request.app.openapi())]
    tags = {tag: [each for each in found if each.tag == tag] for tag in dict.fromkeys(each.tag for each in found)}
    return html(request, "documentation.html", tags=tags)


def operations(document: Mapping[str, Any]) -> Iterator[Operation]:
    """Yield the operations of an OpenAPI document in its order."""
    schemas = document.get("components", {}).get("schemas", {})
    for path, methods in document["paths"].items():
        for method in (each for each in _METHODS if each in methods):
            own = methods[method]
            fields = (*_parameters(own), *_body(own, schemas))
            answers = tuple((status, each.get("description", "")) for status, each in own["responses"].items())
            yield Operation(method.upper(), path, own["tags"][0], own.get("description", ""), fields, answers)


def _parameters(own: Mapping[str, Any]) -> Iterator[Field]:
    for each in own.get("parameters", ()):
        words = each.get("description") or ""
        yield Field(each["name"], each["in"], _kind(each["schema"]), each.get("required", False), words)


def _body(own: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[Field]:
    for media, each in own.get("requestBody", {}).get("content", {}).items():
        named = each["schema"].get("$ref", "").rpartition("/")[2]
        schema = schemas.get(named, {})
        for name, field in schema.get("properties", {}).items():
            yield Field(name, "body", _kind(field), name in schema.get("required", ()), field.get("description", ""))
        if not named:
            yield Field(media, "body", _kind(each["schema"]), True, "")


def _kind(schema: Mapping[str, Any]) -> str:
    """Say in a few words what a value may be."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if either := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_kind(each) for each in either))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = str(schema.get("type", "any"))
    return f"list of {_kind(schema.get('items', {}))}" if kind == "array" else kind
