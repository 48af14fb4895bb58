"""The neuron's own OpenAPI document, `GET /openapi.json`: its routes, and the types that their bodies are made of."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import msgspec
from cortex_core.dialects.limits import MAX_TOKEN_ID
from cortex_core.fleet import (
    BuildInfo,
    DiscoveryResponse,
    HealthResponse,
    ModelInfo,
    ModelSpec,
    PinRequest,
    UnloadRequest,
)
from cortex_core.openapi.document import Operation, document
from cortex_core.openapi.inference import (
    ANTHROPIC_VERSION,
    BODY_ERRORS,
    EVENTS,
    JSON,
    STREAM,
    component_schemas,
    described_itself,
    inference_operations,
    model_operation,
    model_operations,
)
from cortex_core.openapi.refusals import CHAT, Refusal
from cortex_core.openapi.schema import (
    BOOLEAN,
    MODEL,
    NAME,
    TEXT,
    Schema,
    any_of,
    array,
    choice,
    fields,
    integer,
    optional,
    ref,
)

ABOUT = (
    "The HTTP API of a neuron: inference in four dialects, and what gateways ask of it. HEAD is answered wherever GET "
    "is. Unknown paths are 404, wrong methods 405, in the envelope of the path's dialect. Keys are told apart for fair "
    "shares and verified by nobody: a neuron trusts its network, or those who know the secret of its fleet."
)

_TOKEN_IDS = array(integer(0, MAX_TOKEN_ID))
_SCHEMAS: dict[str, Schema] = {
    "TokenizeRequest": any_of(
        fields(
            {"model": MODEL, "prompt": TEXT},
            {
                "messages": {"type": "null"},
                "add_special_tokens": optional(BOOLEAN),
                "return_token_strs": optional(BOOLEAN),
            },
        ),
        {"allOf": [ref("ChatRequest"), fields({}, {"return_token_strs": optional(BOOLEAN)})]},
    ),
    "Tokens": fields(
        {"count": integer(0), "max_model_len": integer(0), "tokens": _TOKEN_IDS}, {"token_strs": array(TEXT)}
    ),
    "DetokenizeRequest": fields({"model": MODEL, "tokens": _TOKEN_IDS}),
}
_TOKENIZE = (*CHAT, Refusal("prompt", "The prompt must hold a token."))
_DETOKENIZE = (Refusal(r"tokens.*", "Token ids must be in the model's vocabulary."),)
_LOAD = (
    Refusal("harness", "There is one harness."),
    Refusal("model_id", "An id has the form `[scheme:]org/name` or `file:PATH`, with a scheme that is configured."),
)
_UNLOAD = (Refusal("model_id", "An id has the form `[scheme:]org/name` or `file:PATH`."),)

_SERVING = (404, 429, 500, 503)


def operations() -> Iterator[Operation]:
    yield from inference_operations(_SERVING)
    yield from model_operations(("/v1/models",))
    yield model_operation("/models", "_unprefixed")
    for prefix, suffix in (("/v1", ""), ("", "_unprefixed")):
        yield Operation(
            method="post",
            path=f"{prefix}/tokenize",
            name=f"tokenize{suffix}",
            about="The tokens of a text or of a chat, by the renderer of inference.",
            body="TokenizeRequest",
            answers={JSON: ref("Tokens")},
            errors=(*BODY_ERRORS, 404, 500, 503),
            refusals=_TOKENIZE,
            speaks="both",
        )
        yield Operation(
            method="post",
            path=f"{prefix}/detokenize",
            name=f"detokenize{suffix}",
            about="The text of tokens.",
            body="DetokenizeRequest",
            answers={JSON: fields({"prompt": TEXT})},
            errors=(*BODY_ERRORS, 404, 500, 503),
            refusals=_DETOKENIZE,
            speaks="both",
        )
    yield _look("/", "root", "Who this is.", fields({"name": {"const": "neuron"}, "version": NAME, "status": TEXT}))
    yield _look("/discovery", "discovery", "The host, as found at start.", ref("DiscoveryResponse"))
    yield _look("/health", "health", "Devices, load and states now.", ref("HealthResponse"))
    yield _look("/version", "version", "The build.", ref("BuildInfo"))
    yield _look("/metrics", "metrics", "Prometheus metrics.", TEXT, kind="text/plain")
    yield _look("/models", "models", "The models here, in any state.", array(ref("ModelInfo")))
    yield described_itself()
    yield _order(
        "load",
        "Load a model; answers when it is there.",
        "ModelSpec",
        "loaded",
        (403, 409, 422, 500),
        _LOAD,
        streams=True,
    )
    yield _order(
        "unload", "Unload a model; answers when it has gone.", "UnloadRequest", "unloaded", (404, 409), _UNLOAD
    )
    yield Operation(
        method="post",
        path="/models/pin",
        name="pin",
        about="Whether gateways may displace a model.",
        tag="control",
        body="PinRequest",
        answers={JSON: fields({"model_id": TEXT, "pinned": BOOLEAN})},
        errors=(*BODY_ERRORS, 404),
        speaks="both",
        needs_key=False,
    )
    yield _of_a_model("progress", "Follows a model that comes or goes.", STREAM, kind=EVENTS)
    yield _of_a_model("endpoint", "Where it is served.", fields({"url": NAME}))
    yield _of_a_model("capabilities", "What it can do.", fields({"capabilities": array(choice("text", "vision"))}))


def _look(path: str, name: str, about: str, answer: Schema, *, kind: str = JSON) -> Operation:
    return Operation("get", path, name, about, {kind: answer}, tag="control", needs_key=False)


def _order(
    verb: str,
    about: str,
    body: str,
    status: str,
    errors: tuple[int, ...],
    refusals: tuple[Refusal, ...],
    *,
    streams: bool = False,
) -> Operation:
    return Operation(
        method="post",
        path=f"/models/{verb}",
        name=verb,
        about=about,
        tag="control",
        body=body,
        answers={JSON: fields({"status": {"const": status}}), **({EVENTS: STREAM} if streams else {})},
        errors=(*BODY_ERRORS, *errors, 503),
        speaks="both",
        refusals=refusals,
        needs_key=False,
    )


def _of_a_model(what: str, about: str, answer: Schema, *, kind: str = JSON) -> Operation:
    return Operation(
        method="get",
        path=f"/models/{{model}}/{what}",
        name=what,
        about=about,
        tag="control",
        answers={kind: answer},
        errors=(404,),
        speaks="both",
        parameters=(ANTHROPIC_VERSION,),
        needs_key=False,
    )


def describe(version: str) -> dict[str, Any]:
    """The document."""
    structs = (BuildInfo, DiscoveryResponse, HealthResponse, ModelInfo, ModelSpec, PinRequest, UnloadRequest)
    schemas = {**component_schemas(*structs), **_SCHEMAS}
    return document("neuron", version, ABOUT, operations(), schemas, everywhere=(401, 403, 421))


@functools.cache
def description(version: str) -> bytes:
    """The document as it is served."""
    return msgspec.json.encode(describe(version))
