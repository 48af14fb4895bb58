"""The operations that gateways and neurons have in common, and the schemas that they refer to."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import msgspec
from cortex_core.openapi.document import document
from cortex_core.openapi.inference import (
    component_schemas,
    described_itself,
    inference_operations,
    model_operation,
    model_operations,
)

from tests.openapi_document import check_document


class Shelf(msgspec.Struct):
    """Something of one server only."""

    num_books: int


def test_every_schema_is_json_schema() -> None:
    for name, schema in component_schemas().items():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}), name
        msgspec.json.encode(schema)


def test_structs_of_one_server_stand_beside_the_common_schemas() -> None:
    schemas = component_schemas(Shelf)
    assert set(schemas) - set(component_schemas()) == {"Shelf"}
    assert set(schemas["Shelf"]["properties"]) == {"num_books"}


def test_every_route_is_there_with_and_without_its_prefix() -> None:
    paths = [operation.path for operation in inference_operations(())]
    assert len(paths) == len(set(paths))
    prefixed = {path for path in paths if path.startswith("/v1/")}
    assert set(paths) - prefixed == {path.removeprefix("/v1") for path in prefixed}


def test_overloaded_is_529_in_anthropics_dialect_alone() -> None:
    for operation in inference_operations((503,)):
        is_anthropic = "/messages" in operation.path
        assert (529 in operation.errors, 503 in operation.errors) == (is_anthropic, not is_anthropic), operation.path


def test_what_only_counts_does_not_stream() -> None:
    streaming = {each.path for each in inference_operations(()) if "text/event-stream" in each.answers}
    counting = {"/v1/messages/count_tokens", "/v1/responses/input_tokens"}
    assert not counting & streaming and "/v1/messages" in streaming and "/v1/responses" in streaming


def test_a_document_of_them_all_is_openapi() -> None:
    operations = [
        *inference_operations((429, 503)),
        *model_operations(("/v1/models", "/models"), errors=(403,)),
        described_itself(),
    ]
    made: dict[str, Any] = document("A server", "1", "About", operations, component_schemas(), everywhere=(421,))
    check_document(made)
    assert "403" in made["paths"]["/v1/models/{model}"]["get"]["responses"]
    assert model_operation("/v1/models").path in made["paths"]
