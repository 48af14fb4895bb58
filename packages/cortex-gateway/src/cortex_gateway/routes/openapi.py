"""The gateway's own OpenAPI document, `GET /openapi.json`: its routes, and the types that their bodies are made of."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.metadata import version as version_of
from typing import Any, Literal

import msgspec
from cortex_core.openapi.document import Operation, Parameter, document
from cortex_core.openapi.inference import (
    ANTHROPIC_VERSION,
    EVENTS,
    JSON,
    STREAM,
    component_schemas,
    described_itself,
    inference_operations,
    model_operations,
)
from cortex_core.openapi.refusals import Refusal
from cortex_core.openapi.schema import NAME, TEXT, Properties, Schema, array, choice, fields, integer, ref

from cortex_gateway.routes.admin import ModelRequest
from cortex_gateway.routes.captures import CaptureSwitch
from cortex_gateway.routes.health import FleetHealth

ABOUT = (
    "The HTTP API of a cortex gateway: inference in four dialects over a fleet, and its administration. HEAD is "
    "answered wherever GET is, OPTIONS everywhere. Unknown paths are 404, wrong methods 405, in the envelope of the "
    "path's dialect. Metrics are on a listener of their own."
)

_SERVING = (403, 404, 429, 500, 502, 503, 504)
_ADMIN_ERRORS = (400, 401, 403, 408, 413, 415, 503)
_NODE = (Refusal("node", "The node must be one on which models are loaded and unloaded."),)


def operations() -> Iterator[Operation]:
    yield from inference_operations(_SERVING)
    yield from model_operations(("/v1/models", "/models"), errors=(401, 503))
    for method in ("get", "head"):
        for path in ("/", "/health"):
            name = "health" if path == "/health" else "root"
            yield _probe(method, path, name, ref("FleetHealth"), statuses=(200, 503))
        yield _probe(method, "/api/hello", "hello", {"type": "object"})
    yield described_itself()
    yield _order(
        "load",
        "Load a model; answers when it is there.",
        {"model": TEXT, "node": TEXT, "status": {"const": "loaded"}},
        (404, 409, 422, 429, 500, 502, 504),
        refusals=(*_NODE, Refusal("model", "The neuron must be able to load it; the message has its own words.")),
        streams=True,
    )
    nodes: Properties = {"model": TEXT, "nodes": array(TEXT, minItems=1)}
    errors = (404, 409, 502)
    yield _order("unload", "Unload a model.", {**nodes, "status": {"const": "unloaded"}}, errors)
    kept: Properties = {"kept_by": {"type": "object", "additionalProperties": choice("neuron", "gateway")}}
    yield _order("pin", "Let nothing displace a model.", {**nodes, **kept, "status": {"const": "pinned"}}, errors)
    yield _order("unpin", "Let it be displaced again.", {**nodes, **kept, "status": {"const": "unpinned"}}, errors)
    yield Operation(
        method="post",
        path="/admin/reload",
        name="reload",
        about="Read the configuration again; answers when it applies, 409 where it is refused.",
        tag="admin",
        answers={JSON: fields({"outcome": choice("applied", "unchanged"), "summary": TEXT})},
        errors=(*_ADMIN_ERRORS, 409),
        parameters=(ANTHROPIC_VERSION,),
        speaks="both",
    )
    yield Operation(
        method="get",
        path="/admin/fleet",
        name="fleet",
        about="The fleet as the gateway sees it.",
        tag="admin",
        answers={
            JSON: fields({"nodes": array(fields({"name": NAME, "health": NAME})), "in_flight": integer(0)}),
        },
        errors=(401, 403, 503),
        parameters=(
            ANTHROPIC_VERSION,
            Parameter("refresh", TEXT, "Look first, where it is neither empty, 0 nor false."),
        ),
        speaks="both",
    )
    yield from _captures()
    yield Operation(
        method="get",
        path="/admin/log",
        name="log",
        about="The last access lines, a JSON document each.",
        tag="admin",
        answers={"application/x-ndjson": TEXT},
        errors=(400, 401, 403, 503),
        parameters=(
            ANTHROPIC_VERSION,
            Parameter("last", integer(0), "How many."),
            Parameter("follow", TEXT, "1: go on with those to come."),
        ),
        speaks="both",
    )


def _captures() -> Iterator[Operation]:
    """The exchanges that are kept to be looked at."""
    bounds: Properties = {
        "exchanges": integer(0),
        "configured": integer(0),
        "exchange_bytes": integer(0),
        "total_bytes": integer(0),
        "bytes": integer(0),
    }
    summary = fields(
        {"id": NAME, "path": NAME, "status": integer(0), "outcome": NAME, "duration_ms": {"type": "number"}}
    )
    listed: Properties = {**bounds, "captures": array(summary)}
    places: tuple[tuple[Literal["get", "post", "delete"], str, str, Properties], ...] = (
        ("get", "listCaptures", "The exchanges that are kept, the newest last.", listed),
        ("post", "switchCaptures", "Keep more or fewer from now on.", bounds),
        ("delete", "clearCaptures", "Forget those that are kept.", {"cleared": integer(0)}),
    )
    for method, name, about, answer in places:
        yield Operation(
            method=method,
            path="/admin/captures",
            name=name,
            about=about,
            tag="admin",
            body="CaptureSwitch" if method == "post" else None,
            answers={JSON: fields(answer)},
            errors=_ADMIN_ERRORS if method == "post" else (401, 403, 503),
            parameters=(ANTHROPIC_VERSION,),
            speaks="both",
        )
    yield Operation(
        method="get",
        path="/admin/captures/{request_id}",
        name="showCapture",
        about="One exchange: the request, the attempts, the answer piece by piece.",
        tag="admin",
        answers={
            JSON: fields({"summary": summary, "request": True, "attempts": array(True), "answer": True}),
        },
        errors=(401, 403, 404, 503),
        parameters=(ANTHROPIC_VERSION,),
        speaks="both",
    )


def _probe(
    method: Literal["get", "head"], path: str, name: str, answer: Schema, *, statuses: tuple[int, ...] = (200,)
) -> Operation:
    return Operation(
        method=method,
        path=path,
        name=name if method == "get" else f"{name}_head",
        about="Whether the gateway is there, and how its fleet is; 503 while it drains.",
        tag="service",
        answers={JSON: answer},
        answer_statuses=statuses,
        needs_key=False,
    )


def _order(
    verb: str,
    about: str,
    answer: Properties,
    errors: tuple[int, ...],
    *,
    refusals: tuple[Refusal, ...] = _NODE,
    streams: bool = False,
) -> Operation:
    return Operation(
        method="post",
        path=f"/admin/models/{verb}",
        name=verb,
        about=about,
        tag="admin",
        body="ModelRequest",
        answers={JSON: fields(answer), **({EVENTS: STREAM} if streams else {})},
        errors=(*_ADMIN_ERRORS, *errors),
        speaks="both",
        refusals=refusals,
    )


def describe() -> dict[str, Any]:
    """The document."""
    schemas = component_schemas(FleetHealth, ModelRequest, CaptureSwitch)
    return document(
        "cortex", version_of("helexa-cortex-gateway"), ABOUT, operations(), schemas, everywhere=(401, 403, 421)
    )


@functools.cache
def description() -> bytes:
    """The document as it is served."""
    return msgspec.json.encode(describe())
