"""Schemas of requests beside the parsers: both judge the same bodies, which differ from good ones at random."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jsonschema_rs
from cortex_core.conversation import Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions, openai_responses
from cortex_core.errors import ApiError
from cortex_core.openapi import refusals
from cortex_core.openapi.inference import REQUESTS, component_schemas

from tests.cortex_core.dialects import openapi_bodies

Parse = Callable[[bytes], Request]

SURFACES: dict[str, tuple[Parse, str, tuple[refusals.Refusal, ...], list[dict[str, Any]]]] = {
    "chat": (openai_chat.parse, "ChatRequest", refusals.CHAT, openapi_bodies.CHAT),
    "completions": (openai_completions.parse, "CompletionRequest", refusals.COMPLETIONS, openapi_bodies.COMPLETIONS),
    "responses": (openai_responses.parse, "ResponsesRequest", refusals.RESPONSES, openapi_bodies.RESPONSES),
    "messages": (anthropic_messages.parse, "MessagesRequest", refusals.MESSAGES, openapi_bodies.MESSAGES),
    "count_tokens": (
        anthropic_messages.parse_count_tokens,
        "CountTokensRequest",
        refusals.MESSAGES,
        openapi_bodies.MESSAGES,
    ),
}
NUM_MUTANTS = 150_000 if os.environ.get("CORTEX_FULL") == "1" else 2_500

WORDS = ["", "x", "user", "assistant", "system", "tool", "text", "function", "custom", "image_url", "f", "auto", "n1"]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 1.5, 2.0, -2.5, 1024, 2**31, 2**64, 10**30, [], {}, [[]], [{}], [7], ["x"]),
    *({"type": "x"}, {"type": "text", "text": "x"}, {"name": "f"}, {"type": "function"}, "http://x", "json_schema"),
    *WORDS,
]


def validator(name: str) -> jsonschema_rs.Draft202012Validator:
    document = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": component_schemas()}}
    return jsonschema_rs.Draft202012Validator(document)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from places(inner)


def mutant(bodies: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """One of the bodies with up to three things replaced, removed, added, or brought from elsewhere."""
    body = copy.deepcopy(rng.choice(bodies))
    donors = [container[key] for donor in bodies for container, key in places(donor)]
    keys = [key for donor in bodies for _, key in places(donor) if isinstance(key, str)]
    for _ in range(rng.randint(1, 3)):
        found = list(places(body))
        if not found:
            break
        container, key = rng.choice(found)
        deed = rng.random()
        if deed < 0.4:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif deed < 0.6:
            container[key] = copy.deepcopy(rng.choice(donors))
        elif deed < 0.8:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice(keys)] = copy.deepcopy(rng.choice([*VALUES, *donors]))
        else:
            container.insert(key, copy.deepcopy(rng.choice([*VALUES, *donors])))
    return body


def check_that_schema_and_parser_judge_alike(surface: str) -> None:
    parse, name, reasons, bodies = SURFACES[surface]
    schema = validator(name)
    rng = random.Random(surface)
    judged = {True: 0, False: 0}
    for body in [*bodies, *(mutant(bodies, rng) for _ in range(NUM_MUTANTS))]:
        text = json.dumps(body)
        fits = schema.is_valid(body)
        judged[fits] += 1
        try:
            parse(text.encode())
        except ApiError as error:
            assert not fits or refusals.explained(error, reasons), f"fits, and yet: {error!r}\n{text}"
        else:
            assert fits, f"is taken, and yet: {next(schema.iter_errors(body))}\n{text}"
    assert min(judged.values()) > NUM_MUTANTS / 10


def check_that_good_bodies_are_good(surface: str) -> None:
    """What is varied fits the schema, and the parser takes it."""
    parse, name, _, bodies = SURFACES[surface]
    for body in bodies:
        validator(name).validate(body)
        parse(json.dumps(body).encode())


def check_that_the_schema_has_the_fields_of(name: str, dialect: ModuleType) -> None:
    listed = {field for lists in ("MAPPED", "REFUSED", "ECHOED", "IGNORED") for field in getattr(dialect, lists, ())}
    assert set(REQUESTS[name]["properties"]) == listed
