"""Types that a schema allows, and texts made into values of them."""

from __future__ import annotations

from typing import Any

import pytest
from neuron.daemon.grammar.json_schema import resolve
from neuron.daemon.grammar.schema_types import ArgumentTypes, SchemaTypes, StepBudget, coerce, types_of
from neuron.daemon.output.tool_formats import QwenXmlParser
from neuron.daemon.text import limits

from tests.counting import assert_linear, steps
from tests.neuron.daemon.grammar.harness import chain, fanned_out


def test_references_and_types() -> None:
    root = {"$defs": {"a/b": {"type": ["string", "null"]}, "loop": {"$ref": "#/$defs/loop"}}}
    assert resolve("#/$defs/a~1b", root) == {"type": ["string", "null"]}
    assert resolve("#/$defs/none", root) is None
    assert types_of({"$ref": "#/$defs/a~1b"}, root) == {"string", "null"}
    assert types_of({"$ref": "#/$defs/loop"}, root) == frozenset()
    assert types_of({"anyOf": [{"type": "integer"}, {"const": None}]}, root) == {"integer", "null"}
    assert types_of({"enum": [1.5, True, "x", [], {}]}, root) == {"number", "boolean", "string", "array", "object"}
    assert types_of({"properties": {}}, root) == {"object"}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("12", {"type": "string"}, "12"),
        ("12", {"type": "integer"}, 12),
        (" 12 ", {"type": "integer"}, 12),
        ("12.0", {"type": "integer"}, 12),
        ("12.5", {"type": "integer"}, "12.5"),
        ("12", {"type": "number"}, 12),
        ("1e3", {"type": "number"}, 1000.0),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
        ("null", {"type": ["integer", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("NaN", {"type": "number"}, "NaN"),
        ("12", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 12),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("7", None, 7),
        ("true", {}, True),
        ('"quoted"', {}, '"quoted"'),
        ("plain text", {}, "plain text"),
        ("[1, 2]", None, [1, 2]),
        ("null", None, None),
    ],
)
def test_coercion(text: str, schema: Any, value: Any) -> None:
    result = coerce(text, types_of(schema, schema or {}))
    assert result == value
    assert type(result) is type(value)


def test_H1_a_reference_that_is_being_resolved_adds_nothing() -> None:
    root: dict[str, Any] = {
        "$defs": {
            "a": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "string"}]},
            "b": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}, {"$ref": "#"}]},
        },
        "oneOf": [{"$ref": "#/$defs/a"}, {"properties": {}}],
    }
    assert types_of(root, root) == {"string", "integer", "object"}
    assert types_of(root["$defs"]["b"], root) == {"string", "integer", "object"}
    assert types_of({"anyOf": [{"title": "x"}], "properties": {}}, root) == {"object"}
    assert types_of(fanned_out(40), fanned_out(40)) == frozenset()


def test_H1_types_are_found_in_work_linear_in_the_schema() -> None:
    def wide(n: int) -> int:
        schema = fanned_out(n)
        return steps(lambda: types_of(schema, schema))

    def doubled(n: int) -> int:
        """2^n paths lead to the last definition."""
        schema = chain(n, lambda reference: {"anyOf": [reference, reference]}, title="x")
        return steps(lambda: types_of(schema, schema))

    assert_linear(wide, 200)
    assert_linear(doubled, 200)


def test_H1_types_are_remembered_and_their_steps_budgeted() -> None:
    schema = {"properties": {"p": {"enum": ["x"] * 1000}, "q": {"enum": ["x"] * 1000}}}
    types = SchemaTypes(schema)
    first = steps(lambda: types.of(schema["properties"]["p"]))
    assert types.of(schema["properties"]["p"]) == {"string"}
    assert steps(lambda: types.of(schema["properties"]["p"])) < first / 100
    budget = StepBudget(1500)
    types = SchemaTypes(schema, budget)
    assert types.of(schema["properties"]["p"]) == {"string"}
    assert types.of(schema["properties"]["q"]) == frozenset(), "over the budget, the schema does not say"


def test_H1_arguments_of_a_schema_that_nobody_checked_are_typed_within_a_budget() -> None:
    """Under `auto` no schema is checked: 1,000 properties that each look through the same 20,000 values."""
    values = {"enum": ["x"] * 20_000}
    names = [f"p{n}" for n in range(1000)]
    schema = {"properties": {name: {"anyOf": [{"$ref": "#/$defs/v"}, fanned_out(40)]} for name in names}}
    root = {**schema, "$defs": {"v": values}}
    types = ArgumentTypes(root, StepBudget())
    parser = QwenXmlParser(lambda name: True, lambda name: types)

    def work() -> None:
        parser.feed("<function=f>")
        for name in names:
            parser.feed(f"<parameter={name}>7</parameter>")

    assert steps(work) < 200 * len(names) + 20 * limits.MAX_TYPE_STEPS
