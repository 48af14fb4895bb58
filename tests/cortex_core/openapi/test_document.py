"""A list of operations becomes an OpenAPI document."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cortex_core.openapi.document import Operation, Parameter, document
from cortex_core.openapi.refusals import Refusal

PLAIN = Operation(method="get", path="/things", name="list", about="All things.", answers={"application/json": {}})


def described(operation: Operation, **more: Any) -> dict[str, Any]:
    return document("t", "1", "a", [operation], {}, **more)


def responses(operation: Operation, **more: Any) -> set[str]:
    found: dict[str, Any] = described(operation, **more)["paths"][operation.path][operation.method]["responses"]
    return set(found)


@pytest.mark.parametrize("twice", [{"name": "other"}, {"method": "post"}, {"path": "/others"}])
def test_what_is_described_twice_is_refused(twice: dict[str, Any]) -> None:
    """A method on a path, or a name: each stands for one operation."""
    with pytest.raises(ValueError, match="described twice"):
        document("t", "1", "a", [PLAIN, msgspec.structs.replace(PLAIN, **twice)], {})


def test_methods_of_one_path_stand_together() -> None:
    post = msgspec.structs.replace(PLAIN, method="post", name="make")
    assert set(document("t", "1", "a", [PLAIN, post], {})["paths"]["/things"]) == {"get", "post"}


def test_errors_are_those_of_the_operation_and_of_every_request() -> None:
    operation = msgspec.structs.replace(PLAIN, errors=(404,))
    assert responses(operation) == {"200", "404"}
    assert responses(operation, everywhere=(421,)) == {"200", "404", "421"}


def test_where_the_caller_chooses_the_dialect_overloaded_is_either_status() -> None:
    both = msgspec.structs.replace(PLAIN, errors=(503,), speaks="both")
    assert responses(both) == {"200", "503", "529"}
    assert responses(msgspec.structs.replace(both, errors=(404,))) == {"200", "404"}
    assert set(described(both)["components"]["responses"]) == {"both-503", "both-529"}


def test_retry_after_stands_at_what_may_be_retried() -> None:
    errors = described(msgspec.structs.replace(PLAIN, errors=(404, 429, 503)))["components"]["responses"]
    told = {name for name, error in errors.items() if "retry-after" in error["headers"]}
    assert told == {"openai-429", "openai-503"}


def test_parts_of_the_path_are_parameters_that_are_required() -> None:
    shown = Parameter("limit", {"type": "integer"}, "How many.")
    operation = msgspec.structs.replace(PLAIN, path="/things/{thing}/parts/{part}", parameters=(shown,))
    parameters = described(operation)["paths"][operation.path]["get"]["parameters"]
    assert [(each["name"], each["in"], each["required"]) for each in parameters] == [
        ("thing", "path", True),
        ("part", "path", True),
        ("limit", "query", False),
    ]


def test_a_head_has_no_content_and_a_body_is_required() -> None:
    head = described(msgspec.structs.replace(PLAIN, method="head"))["paths"]["/things"]["head"]
    assert "content" not in head["responses"]["200"]
    post = described(msgspec.structs.replace(PLAIN, method="post", body="Thing"))["paths"]["/things"]["post"]
    assert post["requestBody"]["required"]
    assert post["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Thing"}


def test_keys_and_refusals_are_said_where_they_apply() -> None:
    free = msgspec.structs.replace(PLAIN, needs_key=False)
    assert "security" in described(PLAIN)["paths"]["/things"]["get"]
    assert "security" not in described(free)["paths"]["/things"]["get"]
    refusing = msgspec.structs.replace(PLAIN, refusals=(Refusal("n", "One is enough."),))
    assert described(refusing)["paths"]["/things"]["get"]["x-refusals"] == [{"param": "n", "why": "One is enough."}]
