"""An OpenAPI 3.1 document from a list of operations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from cortex_core.openapi.refusals import Refusal
from cortex_core.openapi.schema import Schema, ref

Speaks = Literal["openai", "anthropic", "both"]
"""The dialect of an operation's errors; both: Anthropic's for requests with an `anthropic-version` header."""

RETRYABLE = (408, 429, 502, 503, 529)
"""Statuses that may come with `Retry-After`."""

MEANINGS = {
    400: "The request is not understood, or asks for what cannot be done.",
    401: "No valid key, or not the secret of the fleet, where one is required.",
    403: "The key may not do this, or a web page of another origin asks.",
    404: "No such model, node or route.",
    408: "The body did not arrive in time.",
    409: "Something that is under way stands against it.",
    413: "The body, or the prompt, is too large.",
    415: "A `content-encoding` that is not supported.",
    421: "The name that was asked for is none of this server's.",
    422: "A model that cannot be loaded; `kind` and more fields say why.",
    429: "A limit of the key, or the queue is full.",
    500: "A fault of ours.",
    502: "A neuron did not answer.",
    503: "Not now: loading, draining, or no place in time.",
    504: "A neuron fell silent.",
    529: "Not now, in Anthropic's words.",
}

ERROR_SCHEMAS: dict[Speaks, Schema] = {
    "openai": ref("OpenAIError"),
    "anthropic": ref("AnthropicError"),
    "both": {"anyOf": [ref("OpenAIError"), ref("AnthropicError")]},
}

_ID: Schema = {"type": "string", "minLength": 1}
HEADERS: dict[str, Any] = {
    "x-request-id": {"required": True, "description": "Names the request, in logs too.", "schema": _ID},
    "request-id": {"required": True, "description": "The same.", "schema": _ID},
    "retry-after": {
        "description": "Seconds, where a retry makes sense.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
}


class Parameter(msgspec.Struct, frozen=True):
    """One parameter of an operation."""

    name: str
    schema: Schema
    about: str
    where: Literal["query", "path", "header"] = "query"


class Operation(msgspec.Struct, frozen=True):
    """A method on a path.

    body: name of the schema of its JSON body. answers: schemas of its 200 by content type. errors: statuses of
    its errors.
    """

    method: Literal["get", "head", "post", "delete"]
    path: str
    name: str
    about: str
    answers: dict[str, Schema]
    errors: tuple[int, ...] = ()
    tag: str = "inference"
    body: str | None = None
    parameters: tuple[Parameter, ...] = ()
    speaks: Speaks = "openai"
    refusals: tuple[Refusal, ...] = ()
    answer_statuses: tuple[int, ...] = (200,)
    needs_key: bool = True


def document(
    title: str,
    version: str,
    about: str,
    operations: Iterable[Operation],
    schemas: dict[str, Schema],
    *,
    everywhere: tuple[int, ...] = (),
) -> dict[str, Any]:
    """The document. everywhere: statuses with which any request may be refused, whatever it asks for.

    Raises `ValueError` where two operations share a place or a name.
    """
    paths: dict[str, dict[str, Any]] = {}
    names: set[str] = set()
    errors: dict[str, Any] = {}
    for described in operations:
        operation = msgspec.structs.replace(described, errors=(*described.errors, *everywhere))
        methods = paths.setdefault(operation.path, {})
        if operation.method in methods or operation.name in names:
            raise ValueError(f"described twice: {operation.method} {operation.path} ({operation.name})")
        names.add(operation.name)
        methods[operation.method] = _operation(operation)
        errors |= {
            _error_name(status, operation.speaks): _error(status, operation.speaks) for status in _statuses(operation)
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": about, "license": {"name": "GPL-3.0-or-later"}},
        "servers": [{"url": "/"}],
        "security": [],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": HEADERS,
            "responses": errors,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.about,
        "tags": [operation.tag],
        "responses": {
            **{
                str(status): {
                    "description": "The answer.",
                    "headers": _headers(),
                    **(
                        {"content": {kind: {"schema": schema} for kind, schema in operation.answers.items()}}
                        if operation.answers and operation.method != "head"
                        else {}
                    ),
                }
                for status in operation.answer_statuses
            },
            **{
                str(status): {"$ref": f"#/components/responses/{_error_name(status, operation.speaks)}"}
                for status in _statuses(operation)
            },
        },
    }
    if operation.needs_key:
        # Keys are looked at where the configuration requires them; without it any key will do, and none.
        described["security"] = [{}, {"bearer": []}, {"x-api-key": []}]
    in_path = [Parameter(name, _ID, "", "path") for name in re.findall(r"\{(\w+)\}", operation.path)]
    if in_path or operation.parameters:
        described["parameters"] = [_parameter(each) for each in (*in_path, *operation.parameters)]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": ref(operation.body)}},
        }
    if operation.refusals:
        described["x-refusals"] = [{"param": each.param, "why": each.why} for each in operation.refusals]
    return described


def _statuses(operation: Operation) -> list[int]:
    """Errors, with 529 beside 503 where the caller chooses the dialect."""
    chosen = set(operation.errors)
    return sorted(chosen | {529} if operation.speaks == "both" and 503 in chosen else chosen)


def _parameter(parameter: Parameter) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.where == "path",
        "schema": parameter.schema,
    }
    return {**described, "description": parameter.about} if parameter.about else described


def _error_name(status: int, speaks: Speaks) -> str:
    return f"{speaks}-{status}"


def _error(status: int, speaks: Speaks) -> dict[str, Any]:
    return {
        "description": MEANINGS[status],
        "headers": _headers(*(("retry-after",) if status in RETRYABLE else ())),
        "content": {"application/json": {"schema": ERROR_SCHEMAS[speaks]}},
    }


def _headers(*more: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("x-request-id", "request-id", *more)}
