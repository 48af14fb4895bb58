"""Both servers do what their OpenAPI documents say, whatever is sent: schemathesis draws requests that fit the
document and requests that do not, and each answer is held against it.

The long form: `CORTEX_ROUNDS=500 uv run pytest tests/fuzz/test_documented.py`.
"""

from __future__ import annotations

import os
import re
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from cortex_core.openapi.refusals import SHAPE_CODES
from cortex_gateway.routes.openapi import describe as describe_gateway
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from neuron.daemon.api.openapi import describe as describe_neuron
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.fleet_process import MODEL
from tests.fuzz.servers import Servers

load_all_checks()

ROUNDS = int(os.environ.get("CORTEX_ROUNDS", "6"))
MAX_ANSWER_S = 60
"""Longer is a hang. A load waits 2 s here, and the model answers in less."""
MAX_TOKENS = 4

DOCUMENTS: dict[str, dict[str, Any]] = {"gateway": describe_gateway(), "neuron": describe_neuron("0")}
SCHEMAS = {name: schemathesis.openapi.from_dict(document) for name, document in DOCUMENTS.items()}
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def operations() -> list[Any]:
    """Every operation, but not those that only repeat one without `/v1`: the route tests compare the tables."""
    found = []
    for server, schema in SCHEMAS.items():
        for result in schema.get_all_operations():
            operation = result.ok()
            name = operation.definition.raw["operationId"]
            if not name.endswith("_unprefixed"):
                found.append(pytest.param(server, operation, id=f"{server}-{name}"))
    return found


def is_inference(body: Any) -> bool:
    return isinstance(body, dict) and ("messages" in body or "input" in body or "prompt" in body or "tokens" in body)


def exceeds(value: Any, limit: int) -> bool:
    """Whole numbers may be written as 65536.0, too."""
    is_whole = type(value) is int or (type(value) is float and value.is_integer())
    return is_whole and value > limit


def made_cheap(body: Any) -> Any:
    """The same request for the model that is here, and with short answers: only valid values are exchanged."""
    if not is_inference(body):
        return body
    if isinstance(body.get("model"), str) and 0 < len(body["model"]) <= 512:
        body = {**body, "model": MODEL}
    for name in LIMITS:
        if exceeds(body.get(name), MAX_TOKENS):
            body = {**body, name: MAX_TOKENS}
    name = "max_output_tokens" if "input" in body else "max_tokens"
    if all(body.get(limit) is None for limit in LIMITS) and (body.get("messages") or "input" in body):
        body = {**body, name: MAX_TOKENS}
    for name in ("n", "best_of"):
        if exceeds(body.get(name), 2):
            body = {**body, name: 2}
    return body


def streamed(operation: Any, body: Any, is_streamed: bool) -> Any:
    """Drawn booleans are rarely true, and half of the answers are to be streams."""
    answers = operation.definition.raw["responses"]["200"]["content"]
    return {**body, "stream": True} if is_streamed and "text/event-stream" in answers and is_inference(body) else body


def fits(server: str, operation: Any, body: Any) -> bool:
    """Whether the document allows the body. Not what schemathesis meant to draw: it is the document that counts."""
    declared = operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]
    document = {**declared, "components": DOCUMENTS[server]["components"]}
    return jsonschema_rs.Draft202012Validator(document).is_valid(body)


def check_refusal(operation: Any, status: int, error: dict[str, Any], body: Any) -> None:
    """A body that fits is refused for a documented reason only."""
    if status != 400:
        return
    assert error.get("code") not in SHAPE_CODES, f"fits the document, and yet: {error}\n{body}"
    reasons = operation.definition.raw.get("x-refusals", ())
    param = error.get("param") or error["message"].partition(":")[0]
    assert any(re.fullmatch(reason["param"], param) for reason in reasons), f"no documented reason: {error}\n{body}"


@pytest.mark.timeout(0 if "CORTEX_ROUNDS" in os.environ else 300)
@pytest.mark.parametrize(("server", "operation"), operations())
def test_every_answer_is_as_documented(servers: Servers, server: str, operation: Any) -> None:
    url = servers.urls[server]
    modes = [GenerationMode.POSITIVE]
    if "requestBody" in operation.definition.raw or operation.definition.raw.get("parameters"):
        modes.append(GenerationMode.NEGATIVE)

    @settings(
        max_examples=ROUNDS * len(modes),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]), is_streamed=st.booleans())
    def fuzz(case: Any, is_streamed: bool) -> None:
        if isinstance(case.query, dict) and case.query.get("follow") == "1":
            return  # it goes on for ever, as documented
        has_body = "requestBody" in operation.definition.raw
        if has_body:
            case.body = streamed(operation, made_cheap(case.body), is_streamed)
        try:
            response = case.call(base_url=url, timeout=MAX_ANSWER_S)
        except requests.exceptions.InvalidHeader:
            return  # the client refuses to send it
        status = response.status_code
        assert status != 500 and status not in (502, 504), f"{status}: {response.text[:500]}"
        if status in (503, 529):
            assert "retry-after" in response.headers, f"{status}: {response.text[:500]}"
        checks = CHECKS
        if has_body:
            checks = [check for check in CHECKS if check is not negative_data_rejection]
            is_json = isinstance(case.body, dict | list | str | int | float | bool | None)
            if is_json and fits(server, operation, case.body):
                if status >= 400:
                    check_refusal(operation, status, response.json()["error"], case.body)
            else:
                assert 400 <= status < 500 or status in (503, 529), f"forbidden, and yet {status}: {case.body!r}"
        try:
            case.validate_response(response, checks=checks)
        except FailureGroup as group:
            raise AssertionError("\n".join(str(each) for each in group.exceptions) + f"\n{case.body!r}") from None

    fuzz()
