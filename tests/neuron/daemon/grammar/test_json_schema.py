from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError as ReferenceError_
from neuron.daemon.grammar.json_schema import SchemaError, check
from neuron.daemon.text.limits import MAX_SCHEMA_DEPTH


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (3, ""),
        ({"type": "nonsense"}, "/type"),
        ({"type": ["string", 3]}, "/type"),
        ({"properties": 3}, "/properties"),
        ({"properties": {"a": 3}}, "/properties/a"),
        ({"properties": {"a": {"type": "strin"}}}, "/properties/a/type"),
        ({"required": "a"}, "/required"),
        ({"required": [1]}, "/required"),
        ({"enum": "a"}, "/enum"),
        ({"anyOf": {}}, "/anyOf"),
        ({"anyOf": [{"minLength": "3"}]}, "/anyOf/0/minLength"),
        ({"items": {"maximum": "x"}}, "/items/maximum"),
        ({"items": [{"type": 1}]}, "/items/0/type"),
        ({"pattern": "("}, "/pattern"),
        ({"patternProperties": {"[": {}}}, "/patternProperties"),
        ({"multipleOf": 0}, "/multipleOf"),
        ({"minItems": -1}, "/minItems"),
        ({"$ref": "#/$defs/x"}, "/$ref"),
        ({"$defs": {"x": []}}, "/$defs/x"),
        ({"not": 1}, "/not"),
    ],
)
def test_faults_are_found_where_they_are(schema: Any, path: str) -> None:
    with pytest.raises(SchemaError) as caught:
        check(schema)
    assert caught.value.path == path


KEYS = st.sampled_from(
    ["type", "properties", "required", "items", "enum", "anyOf", "minLength", "pattern", "maximum", "$defs", "title"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["string", "object", "a", "^x+$", "("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS | st.just("name"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_passes_is_a_schema_for_the_reference_too(schema: dict[str, Any]) -> None:
    try:
        check(schema)
    except SchemaError:
        return
    lists = {key: value for key, value in schema.items() if not isinstance(value, list)}
    try:
        Draft202012Validator.check_schema(lists)
    except ReferenceError_ as exc:
        # older drafts and empty or repeated lists are let through on purpose, titles are not looked at
        assert {"items", "anyOf", "enum", "required", "title", "$defs", "type", "properties"} & set(map(str, exc.path))


def test_size_and_depth_are_bounded() -> None:
    deep: dict[str, Any] = {}
    for _ in range(MAX_SCHEMA_DEPTH + 2):
        deep = {"items": deep}
    for schema in (deep, {"enum": ["x" * 1000] * 1000}):
        with pytest.raises(SchemaError):
            check(schema)
    endless: dict[str, Any] = {}
    endless["items"] = endless
    with pytest.raises(SchemaError):
        check(endless)
