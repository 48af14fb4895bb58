"""The operations of inference, which gateways and neurons have in common, and the schemas that they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from cortex_core.dialects.models import MAX_PAGE
from cortex_core.openapi import answers, chat_request, messages_request, refusals, responses_request
from cortex_core.openapi.document import Operation, Parameter, Speaks
from cortex_core.openapi.schema import Schema, any_of, choice, integer, ref

REQUESTS: dict[str, Schema] = {
    "ChatRequest": chat_request.CHAT_REQUEST,
    "CompletionRequest": chat_request.COMPLETION_REQUEST,
    "ResponsesRequest": responses_request.RESPONSES_REQUEST,
    "ResponsesTool": responses_request.TOOL,
    "MessagesRequest": messages_request.MESSAGES_REQUEST,
    "CountTokensRequest": messages_request.COUNT_TOKENS_REQUEST,
    "MessagesTool": messages_request.TOOL,
}

JSON = "application/json"
EVENTS = "text/event-stream"
STREAM: Schema = {"description": "Server-sent events, in the sequence and of the types that the dialect's SDKs expect."}

ANTHROPIC_VERSION = Parameter(
    "anthropic-version", {"type": "string"}, "Asks for Anthropic's shapes, of errors too.", "header"
)
_PAGE = (
    Parameter("limit", any_of(integer(1, MAX_PAGE), {"type": "string", "maxLength": 0}), "Models on a page, else all."),
    Parameter("after_id", {"type": "string"}, "The page after this model."),
    Parameter("before_id", {"type": "string"}, "The page before this model."),
)

BODY_ERRORS = (400, 401, 408, 413, 415)
"""What any route with a body may say to it, and to who sends it."""


def component_schemas(*structs: Any) -> dict[str, Schema]:
    """The schemas of inference and of answers, and those of `structs` (types of msgspec) under their own names."""
    _, own = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    return {**REQUESTS, **answers.SCHEMAS, **own}


def inference_operations(errors: Iterable[int]) -> Iterator[Operation]:
    """With and without `/v1`. errors: statuses that this server may answer beside those for bodies; 503 is 529 in the
    Anthropic dialect."""
    own = tuple(errors)
    for prefix, suffix in (("/v1", ""), ("", "_unprefixed")):
        for path, name, about, body, answer, speaks, reasons, streams in _SURFACES:
            kinds = {JSON: ref(answer), EVENTS: STREAM} if streams else {JSON: ref(answer)}
            statuses = tuple(529 if status == 503 and speaks == "anthropic" else status for status in own)
            yield Operation(
                method="post",
                path=prefix + path,
                name=name + suffix,
                about=about,
                body=body,
                answers=kinds,
                errors=(*BODY_ERRORS, *statuses),
                speaks=speaks,
                refusals=reasons,
            )


_SURFACES: tuple[tuple[str, str, str, str, str, Speaks, tuple[refusals.Refusal, ...], bool], ...] = (
    (
        *("/chat/completions", "createChatCompletion", "Chat, streamed or not.", "ChatRequest", "ChatCompletion"),
        *("openai", refusals.CHAT, True),
    ),
    (
        *("/completions", "createCompletion", "Raw prompts, without a chat template.", "CompletionRequest"),
        *("TextCompletion", "openai", refusals.COMPLETIONS, True),
    ),
    (
        *("/responses", "createResponse", "Chat as items, streamed or not; nothing is stored.", "ResponsesRequest"),
        *("Response", "openai", refusals.RESPONSES, True),
    ),
    (
        *("/responses/input_tokens", "countInputTokens", "What the request would be billed.", "ResponsesRequest"),
        *("InputTokens", "openai", refusals.RESPONSES, False),
    ),
    (
        *("/messages", "createMessage", "Chat in Anthropic's dialect, streamed or not.", "MessagesRequest", "Message"),
        *("anthropic", refusals.MESSAGES, True),
    ),
    (
        *("/messages/count_tokens", "countTokens", "What the request would be billed.", "CountTokensRequest"),
        *("TokenCount", "anthropic", refusals.MESSAGES, False),
    ),
)


def model_operations(paths: Iterable[str], *, errors: tuple[int, ...] = ()) -> Iterator[Operation]:
    """The models list, and each model, below each of `paths` (`/v1/models`). errors: statuses for the asking."""
    for path in paths:
        suffix = "" if path.startswith("/v1") else "_unprefixed"
        yield Operation(
            method="get",
            path=path,
            name=f"listModels{suffix}",
            about="The models that can be asked for.",
            tag="models",
            answers={JSON: ref("ModelList")},
            errors=(400, *errors),
            parameters=(ANTHROPIC_VERSION, *_PAGE),
            speaks="both",
        )
        yield model_operation(path, suffix, errors=errors)


def model_operation(path: str, suffix: str = "", *, errors: tuple[int, ...] = ()) -> Operation:
    return Operation(
        method="get",
        path=f"{path}/{{model}}",
        name=f"retrieveModel{suffix}",
        about="One model. Its id may hold slashes, raw or as `%2F`.",
        tag="models",
        answers={JSON: ref("Model")},
        errors=(404, *errors),
        parameters=(ANTHROPIC_VERSION,),
        speaks="both",
    )


def described_itself(about: str = "This document.") -> Operation:
    """`GET /openapi.json`."""
    return Operation(
        method="get",
        path="/openapi.json",
        name="describe",
        about=about,
        tag="service",
        answers={
            JSON: {"type": "object", "required": ["openapi", "paths"], "properties": {"openapi": choice("3.1.0")}}
        },
        needs_key=False,
    )
