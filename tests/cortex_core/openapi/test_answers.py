"""Schemas of answers say what is written: by the collectors, the models list and the error envelopes."""

from __future__ import annotations

import json
from typing import Any, get_args

import jsonschema_rs
import pytest
from cortex_core.conversation import RawPrompt, Request
from cortex_core.dialects import anthropic_messages, openai_chat, openai_completions, openai_responses
from cortex_core.dialects.errors import anthropic_error_body, openai_error_body
from cortex_core.dialects.models import (
    ModelEntry,
    anthropic_model_body,
    anthropic_models_body,
    model_body,
    models_body,
)
from cortex_core.errors import ApiError, ErrorKind
from cortex_core.events import Event
from cortex_core.fleet import ContextLimit
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cortex_core.dialects.event_streams import collected, event_streams
from tests.cortex_core.openapi.harness import validator

IDENTITY: dict[str, Any] = {"response_id": "id_1", "created": 1_760_000_000, "model": "m"}
RESPONSES_BODY = b'{"model": "m", "input": "hi", "tools": [{"type": "custom", "name": "sh"}]}'
MODELS = (
    ModelEntry(id="org/name", created=1_760_000_000, limit=ContextLimit(32768, 24576, 8192), modalities=("text",)),
    ModelEntry(id="m", created=0),
)
COLLECTORS = {
    "ChatCompletion": (openai_chat, Request("m")),
    "TextCompletion": (openai_completions, Request("m", prompts=(RawPrompt("x"),))),
    "Response": (openai_responses, openai_responses.parse(RESPONSES_BODY)),
    "Message": (anthropic_messages, Request("m")),
}


@pytest.mark.parametrize("name", COLLECTORS)
@settings(max_examples=25)
@given(data=st.data())
def test_whatever_a_model_says_the_body_fits(name: str, data: st.DataObject) -> None:
    dialect, request = COLLECTORS[name]
    events: list[Event] = data.draw(event_streams(num_choices=1, tools=dialect is not openai_completions))
    validator(name).validate(collected(dialect.Collector(request, **IDENTITY), events))


@pytest.mark.parametrize("name", COLLECTORS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_body_that_lacks_anything_it_promises_does_not_fit(name: str, data: st.DataObject) -> None:
    dialect, request = COLLECTORS[name]
    events: list[Event] = data.draw(event_streams(num_choices=1, tools=False))
    body = collected(dialect.Collector(request, **IDENTITY), events)
    body.pop(data.draw(st.sampled_from(["id", "model", "usage"])))
    assert not validator(name).is_valid(body)


def test_counts_fit() -> None:
    validator("InputTokens").validate(json.loads(openai_responses.input_tokens_body(7)))
    validator("TokenCount").validate(json.loads(anthropic_messages.count_tokens_body(7)))
    assert not validator("TokenCount").is_valid({"input_tokens": -1})


def test_models_fit_in_both_forms() -> None:
    for entry in MODELS:
        validator("Model").validate(json.loads(model_body(entry)))
        validator("Model").validate(json.loads(anthropic_model_body(entry)))
    for body in (models_body(MODELS), models_body(()), anthropic_models_body(MODELS)):
        validator("ModelList").validate(json.loads(body))
    assert not validator("ModelList").is_valid({"data": [{"id": "m"}], "has_more": False})


@pytest.mark.parametrize("kind", get_args(ErrorKind))
def test_every_kind_of_error_fits_its_envelope(kind: ErrorKind) -> None:
    error = ApiError(kind, "no", code="insufficient_quota" if kind == "rate_limit" else None, extras={"max": 1})
    for request_id in (None, "req_1"):
        openai = json.loads(openai_error_body(error, request_id))
        validator("OpenAIError").validate(openai)
        anthropic = json.loads(anthropic_error_body(error, request_id))
        validator("AnthropicError").validate(anthropic)
        assert not validator("AnthropicError").is_valid(openai)
        del openai["error"]["code"]
        with pytest.raises(jsonschema_rs.ValidationError):
            validator("OpenAIError").validate(openai)
