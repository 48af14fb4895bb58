"""One models list for the clients of both dialects."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import ModelInfo
from cortex_core.dialects.models import (
    ModelEntry,
    Page,
    anthropic_model_body,
    anthropic_models_body,
    model_body,
    models_body,
    parse_page,
)
from cortex_core.errors import ApiError
from cortex_core.fleet import ContextLimit, ModelCost, ModelLocation
from openai.types import Model

FULL = ModelEntry(
    id="org/name",
    created=1_760_000_000,
    loaded=False,
    modalities=("text", "vision"),
    limit=ContextLimit(32768, 24576, 8192),
    cost=ModelCost(1.0, 2.0),
    tool_call=True,
    reasoning=True,
    feasible_on=("beast",),
    locations=(ModelLocation("beast", "loading"),),
)
BARE = ModelEntry(id="m", created=0)
FIVE = [ModelEntry(id=name, created=0) for name in "abcde"]


def ids(body: bytes) -> tuple[list[str], bool]:
    value = json.loads(body)
    names = [model["id"] for model in value["data"]]
    assert (value["first_id"], value["last_id"]) == ((names[0], names[-1]) if names else (None, None))
    return names, value["has_more"]


@pytest.mark.parametrize("entry", [FULL, BARE])
def test_one_object_satisfies_the_types_of_both_sdks(entry: ModelEntry) -> None:
    value = json.loads(model_body(entry))
    Model.model_validate(value)
    info = ModelInfo.model_validate(value)
    assert info.created_at == datetime.fromtimestamp(entry.created, UTC)
    assert info.capabilities is not None
    assert info.capabilities.image_input.supported == ("vision" in entry.modalities)
    assert info.capabilities.thinking.supported == info.capabilities.effort.supported == entry.reasoning


def test_fields_of_the_reference_and_flat_limits() -> None:
    value = json.loads(model_body(FULL))
    assert {name: value[name] for name in ("loaded", "feasible_on", "locations", "limit", "cost", "tool_call")} == {
        "loaded": False,
        "feasible_on": ["beast"],
        "locations": [{"node": "beast", "status": "loading"}],
        "limit": {"context": 32768, "input": 24576, "output": 8192},
        "cost": {"input": 1.0, "output": 2.0},
        "tool_call": True,
    }
    assert {name: value[name] for name in value if name.startswith("max_")} == {
        "max_model_len": 32768,
        "max_input_tokens": 24576,
        "max_tokens": 8192,
        "max_output_tokens": 8192,
    }
    assert value["context_length"] == 32768
    assert value["display_name"] == "org/name"


def test_what_is_not_known_is_left_out() -> None:
    value = json.loads(model_body(BARE))
    unknown = {"limit", "cost", "feasible_on", "locations", "max_model_len", "max_tokens", "context_length"}
    assert not unknown & set(value)
    assert json.loads(model_body(ModelEntry("m", 0, limit=ContextLimit(4096))))["max_input_tokens"] == 4096


def test_the_whole_list_is_the_default() -> None:
    assert ids(models_body(FIVE)) == (list("abcde"), False)
    assert ids(models_body([])) == ([], False)
    assert json.loads(models_body(FIVE))["object"] == "list"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"limit": "2"}, (["a", "b"], True)),
        ({"limit": "1000"}, (list("abcde"), False)),
        ({"limit": "2", "after_id": "b"}, (["c", "d"], True)),
        ({"after_id": "c"}, (["d", "e"], False)),
        ({"after_id": "e"}, ([], False)),
        ({"limit": "2", "before_id": "d"}, (["b", "c"], True)),
        ({"before_id": "b"}, (["a"], False)),
        ({"limit": "", "after_id": "", "beta": "true"}, (list("abcde"), False)),
    ],
)
def test_pages(query: dict[str, str], expected: tuple[list[str], bool]) -> None:
    assert ids(models_body(FIVE, parse_page(query))) == expected


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "1.5", "99999999999"])
def test_a_bad_limit_is_refused(limit: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_page({"limit": limit})
    assert caught.value.param == "limit"


@pytest.mark.parametrize("page", [Page(after_id="zz"), Page(before_id="zz")])
def test_a_cursor_that_names_no_model_is_refused(page: Page) -> None:
    with pytest.raises(ApiError, match="no model has the id 'zz'"):
        models_body(FIVE, page)


def test_both_official_clients_list_and_retrieve(openai_client: Any, anthropic_client: Any) -> None:
    listed = models_body([FULL, BARE])
    one: openai.OpenAI = openai_client(200, "application/json", listed)
    assert [model.id for model in one.models.list()] == ["org/name", "m"]
    other: anthropic.Anthropic = anthropic_client(200, "application/json", listed)
    assert [model.id for model in other.models.list()] == ["org/name", "m"]
    other = anthropic_client(200, "application/json", model_body(FULL))
    assert other.models.retrieve("org/name").max_input_tokens == 24576


def test_anthropics_own_shape_has_its_fields_and_no_others(anthropic_client: Any) -> None:
    listed = anthropic_models_body([FULL, BARE], Page(limit=1))
    value = json.loads(listed)
    assert set(value) == {"data", "has_more", "first_id", "last_id"} and value["has_more"]
    declared = set(ModelInfo.model_fields)
    assert set(value["data"][0]) <= declared
    assert {"max_tokens", "max_input_tokens", "capabilities"} <= set(value["data"][0])
    one = json.loads(anthropic_model_body(BARE))
    assert set(one) <= declared and "max_tokens" not in one
    other: anthropic.Anthropic = anthropic_client(200, "application/json", anthropic_models_body([FULL, BARE]))
    assert [model.id for model in other.models.list()] == ["org/name", "m"]
